"""`goe generate`: text from a trained language model.

goe generate --run latest --prompt "ROMEO:" --temperature 0.8 --max_new_tokens 300
goe generate --run runs/20260531-101500-0a1b2c3d --prompt_file prompts.txt --num_samples 3 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP
from research_eval.errors import ConfigError
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase
from research_eval.system.untrusted import parse_json, user_path

if TYPE_CHECKING:
    from research_eval.generation.decoding import Generated

DESCRIPTION = "text from a trained language model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe generate`."""
    parser.add_argument(
        "--run",
        required=True,
        metavar="RUN",
        help="experiment id, the beginning of one, latest, a run's folder, or an exported model",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", default="", help="text to continue, in which \\n is a line break (default: the beginning of a text)"
    )
    source.add_argument(
        "--prompt_file", "--prompt-file", metavar="FILE", help='a prompt per line, or .jsonl with the field "prompt"'
    )
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=200, help="length of a sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most probable token")
    parser.add_argument("--top_k", "--top-k", type=int, help="draw from the K most probable tokens")
    parser.add_argument("--top_p", "--top-p", type=float, help="draw from the smallest set with this probability")
    parser.add_argument("--min_p", "--min-p", type=float, help="leave out what is less probable than P times the best")
    parser.add_argument(
        "--repetition_penalty", "--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions"
    )
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts")
    parser.add_argument("--num_samples", "--num-samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (\\n: line break); repeatable"
    )
    parser.add_argument("--no_stream", "--no-stream", action="store_true", help="print a text when it is complete")
    parser.add_argument("--no_cache", "--no-cache", action="store_true", help="compute all tokens again at each step")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each sample")
    parser.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--quiet", action="store_true", help="print text and warnings only")


def generate_command(arguments: argparse.Namespace) -> int:
    """Print the samples for each prompt. The speed goes to standard error."""
    from research_eval.runs.locate import find_folder

    prompts = [_unescaped(arguments.prompt)] if arguments.prompt_file is None else read_prompts(arguments.prompt_file)
    folder = find_folder(arguments.run, arguments.db)
    import_torch()
    with phase("importing the program"):
        from research_eval.generation.sampling import SamplingSettings
        from research_eval.generation.trained import TrainedLanguageModel

    settings = SamplingSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
        stop=tuple(map(_unescaped, arguments.stop)),
    )
    model = TrainedLanguageModel(folder, arguments.device)
    streams = not (arguments.no_stream or arguments.json or arguments.num_samples > 1)
    for prompt in prompts:
        model.check_prompt(prompt)  # before anything is printed
    speeds = []
    for number, prompt in enumerate(prompts):
        if number and not arguments.json:
            print_product("\n")
        if streams:
            print_product(prompt)
        found = model.samples(prompt, settings, not arguments.no_cache, _stream if streams else None)
        speeds.append(found[0].tokens_per_second)
        if streams:
            print_product("\n")
        else:
            for one in found:
                between = "\n" if one.sample else ""  # an empty line between the samples of a prompt
                print_product(_json_line(one) if arguments.json else f"{between}{prompt}{one.text}\n")
    if not arguments.quiet:
        print(f"{sum(speeds) / len(speeds):,.0f} tokens/s", file=sys.stderr)
    return 0


def _unescaped(text: str) -> str:
    """The text with line breaks and tabs for the two characters that stand for them on the command line."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _stream(_: int, text: str) -> None:
    """Print a piece of text at once."""
    print_product(text)


def _json_line(one: Generated) -> str:
    """One JSON object on a line, in ASCII."""
    record: dict[str, Any] = {"prompt": one.prompt, "text": one.text, "finish_reason": one.finish_reason}
    record |= {"tokens": len(one.tokens), "sample": one.sample, "seed": one.seed}
    return json.dumps(record) + "\n"


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or the field "prompt" of JSON lines. Raises ConfigError."""
    from research_eval.runs.inputs import read_texts

    lines = read_texts(path, "--prompt_file")
    if path.endswith(".jsonl"):
        lines = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompt_file: {path} has no line")
    return lines


def _prompt_of(line: str, where: str) -> str:
    """The prompt in one JSON line. Raises ConfigError."""
    found = parse_json(line, where)
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str):
        raise ConfigError(f'{where}: expected an object with a text "prompt"')
    return prompt


EXPORT_DESCRIPTION = "write a language model as a folder that other programs can open"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe export-model`."""
    parser.add_argument(
        "--run", required=True, metavar="RUN", help="experiment id, the beginning of one, latest, or a folder"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--quiet", action="store_true", help="print warnings only")


def export_command(arguments: argparse.Namespace) -> int:
    """Write the folder and print its files."""
    from research_eval.runs.locate import find_folder

    folder = find_folder(arguments.run, arguments.db)
    out: Path = user_path(arguments.out, "--out")
    import_torch()
    from research_eval.generation.trained import TrainedLanguageModel

    TrainedLanguageModel(folder, "cpu").export(out)
    if not arguments.quiet:
        for file in sorted(out.iterdir()):
            print_product(f"{out / file.name}\n")
    return 0

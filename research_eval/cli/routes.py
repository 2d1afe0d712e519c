"""`goe routes`: a page that shows which expert reads which token of a text.

goe routes --run latest --out routes.html
goe routes --run ID ID2 --text_file chapter.txt --out routes.html
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from research_eval.cli.common import DB_HELP
from research_eval.errors import ConfigError
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase

if TYPE_CHECKING:
    from research_eval.generation.trained import TrainedLanguageModel

DESCRIPTION = "a page with the experts of every token of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe routes`."""
    parser.add_argument(
        "--run", required=True, nargs="+", metavar="RUN", help="one or two runs: ids, latest, folders, exported models"
    )
    parser.add_argument(
        "--text_file", "--text-file", metavar="FILE", help="UTF-8 text to show (default: the run's validation text)"
    )
    parser.add_argument("--out", default="routes.html", metavar="FILE", help="the page (default: routes.html)")
    parser.add_argument("--max_tokens", "--max-tokens", type=int, default=20_000, help="tokens that are read")
    parser.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--quiet", action="store_true", help="print warnings only")


def routes_command(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from research_eval.runs.inputs import output_file, read_text
    from research_eval.runs.locate import find_folder

    if len(arguments.run) > 2:
        raise ConfigError(f"--run: expected one or two runs, got {len(arguments.run)}")
    if arguments.max_tokens < 2:
        raise ConfigError(f"--max_tokens: expected at least 2, got {arguments.max_tokens}")
    out = output_file(arguments.out, [] if arguments.text_file is None else [arguments.text_file])
    given = None if arguments.text_file is None else read_text(arguments.text_file, "--text_file")
    folders = [find_folder(run, arguments.db) for run in arguments.run]
    import_torch()
    with phase("importing the program"):
        from research_eval.analysis.token_page import PageRun, write_token_page
        from research_eval.generation.trained import TrainedLanguageModel

    models = [TrainedLanguageModel(folder, arguments.device) for folder in folders]
    text = models[0].validation_text() if given is None else given
    runs = []
    for model in models:
        report = model.tokens_of(text, arguments.max_tokens)
        if report.paths_UT is None or model.model.routes is None:
            raise ConfigError(f"--run: {model.folder.name} ({model.config.model_type}) has no experts to show")
        runs.append(PageRun(_title(model), report, model.model.routes.num_experts))
    if len(runs) > 1 and runs[0].report.inputs_U.tolist() != runs[1].report.inputs_U.tolist():
        raise ConfigError("--run: the two runs have different tokenizers, so their tokens cannot be compared")
    heading = f"Routes of {' and '.join(model.folder.name for model in models)}"
    write_token_page(out, runs, heading)
    if not arguments.quiet:
        print_product(f"{out}\n")
    return 0


def _title(model: TrainedLanguageModel) -> str:
    return f"{model.config.experiment_name}, seed {model.config.seed}"

"""The documentation is run: every command, file, config and query of every page, in a copy of the source.

Conventions for the pages:

- ```bash     every command is run and has to end with exit code 0
- ```console  `$ command` and what it prints ("..." stands for anything)
- ```python, ```json  with a first line `# file: path` or `// file: path` are written there, for the commands that
              follow; other Python is run, other configs are checked
- ```sql      is run on `experiment_results.db` after the page's commands and has to find rows
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import doctest
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command_server
import pytest
import yaml
from command_server import CLIENT
from pydantic import BaseModel
from support import MODELS, ROOT, without_phases

from research_eval import experiment, main
from research_eval.cli import analyze, measure, run, suggest, tune
from research_eval.datasets.text import TextDataset
from research_eval.db_utils import DB_FILE, STATUSES, Store
from research_eval.registry import LANGUAGE_MODELS, MODELS_MAP, SYNTHETIC_DATASETS
from research_eval.schema import (
    INT_MAX,
    MODEL_PROVIDED,
    SYNTHETIC_PROVIDED,
    TEXT_PROVIDED,
    ExperimentConfig,
    OptimizerParams,
    ParallelParams,
    SchedulerParams,
    TrainingParams,
    config_from_dict,
    fields_of,
    parse_config,
    signature_model,
    spellings_of,
)
from research_eval.store.csv_file import CSV_FILE
from research_eval.studies.space import build_space

PACKAGE = ROOT / "research_eval"
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md")])

SERVER = "GOE_STORAGE=postgresql://goe@localhost/goe GOE_DB=postgresql://goe@localhost/goe"
TORCHRUN = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
# What cannot be run as it stands: (the whole command, what is run instead, why).
REWRITES = [
    (r"git clone .*|cd [\w-]+", ":", "the sandbox is the clone"),
    (r"python\S* -m venv .*|source \S*activate", ":", "the environment is there"),
    (r"(?:\S*python -m )?pip install .*-r (\S+)", r"test -s \1", "the environment stays as it is"),
    (r"pip install 'graph-of-experts\[dashboard\]'", "python -c 'import starlette'", "the environment stays as it is"),
    (r"pip install 'graph-of-experts\[trace\]'", "python -c 'import transformers'", "the environment stays as it is"),
    (r"goe dashboard", "goe dashboard --help", "serves until it is stopped; test_dashboard.py drives it"),
    (r"\.venv/bin/(goe atlas .*)", r"\1", "the environment is elsewhere"),
    (r"pip install scikit-learn", "python -c 'import sklearn'", "the environment stays as it is"),
    (r"make (test|check|lint|bench|fuzz|demo-lm)", r"make -n \1", "would run these tests, or for minutes"),
    (r"pip-audit .*", ":", "needs the network"),
    (r"(?:\./)?\.ci/run", "bash -n .ci/run", "would run these tests"),
    (r"(?:python -m )?pytest.*", "test -d tests", "would run these tests"),
    (r"python benchmarks/overhead\.py.*", r"\g<0> --steps 4 --repeats 1", "takes minutes"),
    (r"python benchmarks/real_text\.py.*", r"\g<0> --sets ag_news --models dense --seeds 0", "takes hours"),
    (r"python benchmarks/(\w+\.py).*", r"python benchmarks/\1 --help", "takes minutes"),
    (r"goe compare majority --models dense,moe .*", "goe compare --help", "comparing.md has one that is run"),
    (r"(goe compare .*--seeds) 3(.*)", r"\1 1\2", "takes half a minute"),
    (r"goe benchmark (?:smoke|core).*", "goe benchmark --help", "takes minutes; test_suites.py has a smaller suite"),
    (r"cat README\.md docs/\*\.md > (\S+)", r"head -qc 3000 README.md docs/*.md > \1", "scoring it takes seconds"),
    (r"torchrun .* -m research_eval.main (.*parallel\.json)", r"goe run \1 --dry_run", "test_group.py trains with it"),
    (r"torchrun (.*)", rf"{TORCHRUN} \1", "torchrun is a script of the environment, which is not on every path"),
    (r"goe tune .*--launcher (?:submitit|ray).*", rf"{SERVER} \g<0> --dry_run", "test_launchers.py has the engines"),
    (r"goe run .*--launcher submitit.*", rf"{SERVER} \g<0> --dry_run", "test_batch.py has a job"),
    (r"(.*)postgresql://\S+(.*)", r"\1sqlite:///cluster.db\2", "test_db_utils.py has a server"),
    (r"(.*--device) cuda\S*(.*)", r"\1 cpu\2", "not every machine has a GPU"),
]
FEWER = {"n_trials": 3, "syn_num_samples": 150, "n_jobs": 1}  # flag: the largest value in the sandbox
# Smaller numbers in the sandbox's copies of the example configs, so that the commands run as they are written.
SMALLER = {
    r'"epochs": \d+': '"epochs": 1',
    r'"max_steps": \d+': '"max_steps": 10',
    r'"batch_size": \d+': '"batch_size": 4',
    r'"num_samples": \d+': '"num_samples": 200',
}
TEXT_SETS = {"ag_news": (4, "test"), "imdb": (2, "test"), "sst2": (2, "validation"), "trec": (6, "validation")}


# ------------------------------------------------------------------------------------------------ reading the pages


class Block(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """Where the block is to be written."""
        match = re.match(r"(?:#|//) file: (\S+)\n", self.text)
        return match[1] if match else None


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\s*$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(match[2], textwrap.dedent(match[3])) for match in found]


def commands(text: str) -> list[str]:
    """The commands of a bash block, with continued lines and here-documents."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        command = line
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        while command.endswith("\\"):
            command += "\n" + next(lines)
        if end := re.search(r"<<-?\s*'?(\w+)'?", command):
            for body in lines:
                command += "\n" + body
                if body.strip() == end[1]:
                    break
        found.append(command)
    return found


def rewritten(command: str) -> str:
    for flag, most in FEWER.items():
        command = re.sub(
            rf"(--{flag}) (\d+)", lambda match, most=most: f"{match[1]} {min(int(match[2]), most)}", command
        )
    plain = re.sub(r"\s*\\\n\s*", " ", command.split("  #")[0].strip()) if "<<" not in command else command
    for pattern, replacement, _ in REWRITES:
        if match := re.fullmatch(pattern, plain):
            return match.expand(replacement)
    return command


class Table(NamedTuple):
    heading: str
    header: list[str]
    rows: list[list[str]]

    def names(self) -> list[str]:
        """The first name of each row."""
        return [re.findall(r"`([^`]+)`", row[0])[0] for row in self.rows]


def tables(page: Path) -> list[Table]:
    found: list[Table] = []
    heading, before = "", ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not before.startswith("|"):
                found.append(Table(heading, cells, []))
            elif not set(line) <= set("|-: "):
                found[-1].rows.append(cells)
        before = line
    return found


def one_table(page: Path, heading: str, first_cell: str) -> Table:
    (table,) = [table for table in tables(page) if table.heading == heading and table.header[0] == first_cell]
    return table


# ---------------------------------------------------------------------------------------------------- running pages


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """The source, small text sets, and a `.venv` that `make` takes for installed."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        env=without(os.environ, r"GIT_.*"),
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path / "graph-of-experts"
    for name in listing.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for config in (folder / "examples" / "configs").glob("*.json"):
        text = config.read_text()
        for pattern, smaller in SMALLER.items():
            text = re.sub(pattern, smaller, text)
        config.write_text(text)
    for name, (num_classes, other_split) in TEXT_SETS.items():
        write_text_set(folder / "data" / name, num_classes, other_split)
    for cache in PACKAGE.rglob("__pycache__"):  # so that the copy need not be compiled
        shutil.copytree(cache, folder / cache.relative_to(ROOT))
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(tmp_path / "bin")
    for stamp in (".created", ".runtime", ".dev"):
        (folder / ".venv" / stamp).touch()
    shims = tmp_path / "bin"
    shims.mkdir()
    python = shlex.quote(sys.executable)
    (tmp_path / "client.py").write_text(CLIENT)
    ask = f"exec {python} -I -S {tmp_path}/client.py {tmp_path}/server"
    goe = f'if test -e {tmp_path}/server; then {ask} goe "$@"; fi\n' + (
        f'exec {python} -c "from research_eval.main import cli; raise SystemExit(cli())" "$@"\n'
    )
    script = f'case "$1" in *.py|-m) if test -e {tmp_path}/server; then {ask} "$@"; fi;; esac\n'
    for name, text in {"python": f'{script}exec {python} "$@"\n', "goe": goe}.items():
        (shims / name).write_text(f"#!/bin/sh\n{text}")
        (shims / name).chmod(0o755)
    return folder


def write_text_set(folder: Path, num_classes: int, other_split: str) -> None:
    folder.mkdir(parents=True)
    for split, num_rows in (("train", 40), (other_split, 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(num_rows):
                label = row % num_classes
                writer.writerow([f"word{label} and word{(row + label) % 5}, the {'very ' * (row % 3)}end", label])


def without(environment: Any, *patterns: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not re.fullmatch("|".join(patterns), name)}


def environment_of(sandbox: Path) -> dict[str, str]:
    """What the commands of a page see."""
    return without(os.environ, r"GIT_.*", "GOE_.*", "MAKE.*", "COV_.*") | {
        "PATH": f"{sandbox.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(sandbox),  # as the editable installation of this copy would
        "GOE_CACHE": str(sandbox / ".goe_cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def shell(sandbox: Path, script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = environment_of(sandbox)
    return subprocess.run(
        ["bash", "-c", script], cwd=sandbox, env=environment, text=True, stdin=subprocess.DEVNULL, **options
    )


def run_bash(sandbox: Path, text: str) -> None:
    """Every command of the block; one that fails is named."""
    script = ["set -o pipefail"]
    for command in map(rewritten, commands(text)):
        failure = shlex.quote(f"failed: {command}")
        script += [command, f"status=$?; if [ $status -ne 0 ]; then echo {failure} >&2; exit $status; fi"]
    script.append("echo every command was run")  # an `exit` in a block would skip the rest
    done = shell(sandbox, "\n".join(script), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("every command was run\n"), done.stdout + done.stderr


def check_console(sandbox: Path, text: str) -> None:
    """The output of the commands behind `$`, all in one shell, is what stands below them."""
    lines = text.splitlines(keepends=True)
    script = "".join(line.removeprefix("$ ") for line in lines if line.startswith("$ "))
    expected = "".join(line for line in lines if not line.startswith("$ "))
    done = shell(sandbox, script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = without_phases(done.stdout)
    assert doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS), printed


def run_sql(database: Path, query: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute(query).fetchall(), f"found nothing:\n{query}"


CHANGE_THE_SOURCE = ("extending.md",)  # pages whose commands find another source than those before


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_everything_on_the_page_works(page: Path, sandbox: Path) -> None:
    options = ["changes"] if page.name in CHANGE_THE_SOURCE else []
    with command_server.commands(sandbox.parent / "server", environment_of(sandbox), *options):
        everything_works(page, sandbox)


def everything_works(page: Path, sandbox: Path) -> None:
    found = blocks(page)
    for number, (language, text) in enumerate(found):
        file = found[number].file
        if file is not None:
            later = "".join(block.text for block in found[number + 1 :])
            assert Path(file).stem in later, f"{file} is written and never used"
            (sandbox / file).parent.mkdir(parents=True, exist_ok=True)
            content = text.split("\n", 1)[1]
            (sandbox / file).write_text(fewer_samples(content) if file.endswith(".json") else content)
        elif language == "bash":
            run_bash(sandbox, text)
        elif language == "console":
            check_console(sandbox, text)
        elif language == "python":
            (sandbox / "block.py").write_text(text)
            run_bash(sandbox, "python block.py")
        elif language == "json":
            if '"model_type"' in text:
                parse_config(text, page.name)
            else:
                json.loads(text)
        elif language == "yaml":
            for command in commands_of_manifest(list(yaml.safe_load_all(text))):
                places = [f"export {variable}=postgresql://goe@localhost/goe" for variable in ("GOE_STORAGE", "GOE_DB")]
                run_bash(sandbox, "\n".join([*places, command]))
        elif language != "sql":
            assert language in ("", "text"), f"nobody checks a block of {language}"
            assert not re.search(r"^\s*(\$|python|goe|make|pip) ", text, re.MULTILINE), f"a command in:\n{text}"
    for language, text in found:
        if language == "sql":
            run_sql(sandbox / DB_FILE, text)


def fewer_samples(config: str) -> str:
    return re.sub(r'"num_samples": (\d+)', lambda match: f'"num_samples": {min(int(match[1]), 200)}', config)


def commands_of_manifest(part: Any) -> list[str]:
    """The command lines of a manifest for a cluster: lists or texts that begin with `goe`."""
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, str):
        return [part] if part.startswith("goe ") else []
    if not isinstance(part, list):
        return []
    if part[:1] == ["goe"]:
        return [shlex.join(part)]
    return [command for one in part for command in commands_of_manifest(one)]


def test_manifests_tell_their_commands() -> None:
    found = [c for _, text in blocks_of("yaml") for c in commands_of_manifest(list(yaml.safe_load_all(text)))]
    assert found == ["goe worker --study shared"] * len(blocks_of("yaml")) and found


def blocks_of(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def test_a_command_that_fails_or_is_skipped_is_noticed(sandbox: Path) -> None:
    run_bash(
        sandbox, "# a comment\nexport NUMBER=1\ntest \\\n  $NUMBER = 1\ncat > a.txt <<'END'\n# text\nEND\ntest -s a.txt"
    )
    for block in (
        "false",
        "false && true\ntrue",
        "false | true",
        "true\nexit 0\nfalse",
        "true\ngit clone x\nno-such-command",
    ):
        with pytest.raises(AssertionError):
            run_bash(sandbox, block)
    check_console(sandbox, "$ echo a b\na ...\n$ false\n$ echo $?\n1\n")
    with pytest.raises(AssertionError):
        check_console(sandbox, "$ echo a\nb\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_fence_is_a_block_and_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    written = {block.file for block in blocks(page)}
    for name in re.findall(r"`((?:research_eval|tests|benchmarks|examples|docs)/[\w/.-]+)`", page.read_text()):
        assert (ROOT / name).exists() or name in written, name


def test_the_index_lists_every_page_once() -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text())
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "index.md")


def test_the_readme_fits_two_screens_and_its_intervals_are_those_of_the_pages() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 90
    pages = "".join((DOCS / name).read_text() for name in ("research.md", "real_text.md", "language_model.md"))
    intervals = re.findall(r"[\d.]+ (?:± [\d.]+|\[[\d.]+, [\d.]+\])", text)
    assert intervals
    assert [interval for interval in intervals if interval not in pages] == []


# ------------------------------------------------------------------------------------------------ configuration.md


def allowed_values(schema: dict[str, Any]) -> str:
    """What a key takes, in the words of the page."""
    if "anyOf" in schema:
        return " or ".join(map(allowed_values, schema["anyOf"]))
    if "$ref" in schema or schema.get("type") == "object":
        return "section"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    word = {"string": "text", "null": "`null`", "boolean": "`true`, `false`"}.get(schema["type"], schema["type"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]}" for name, sign in signs.items() if schema.get(name, INT_MAX) != INT_MAX]
    return f"{word} {', '.join(bounds)}".strip()


def documented_keys(model: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Spellings, values and default of every key, as cells."""
    schema = model.model_json_schema()
    rows = []
    for name, field in fields_of(model).items():
        spellings = [name, *(other for other, key in spellings_of(model).items() if key == name != other)]
        entry = schema["properties"][name]
        default = f"`{json.dumps(entry['default'])}`" if "default" in entry else "-"
        cells = allowed_values(entry), "required" if field.is_required() else default
        rows.append((", ".join(f"`{spelling}`" for spelling in spellings), *cells))
    return rows


def sections() -> Iterator[tuple[list[str], type[BaseModel]]]:
    """Headings of the tables that describe a section, and the section."""
    yield ["Top level"], ExperimentConfig
    yield ["optimizer"], OptimizerParams
    yield ["scheduler"], SchedulerParams
    yield ["training"], TrainingParams
    yield ["parallel"], ParallelParams
    yield ["text"], signature_model(TextDataset, TEXT_PROVIDED)
    for name, cls in MODELS_MAP.items():
        if cls.__module__.startswith("research_eval."):
            complete = name in ("goe_scan", "lstm")  # no Transformers: their tables have all their keys
            yield [name] if complete else ["all models", name], signature_model(cls, MODEL_PROVIDED)
    for name, cls in LANGUAGE_MODELS.items():
        common = [] if name == "lstm" else ["all language models"]
        routes = ["routes"] if name in ("moe", "goe", "goe_original") else []
        yield [*common, *routes, f"language model: {name}"], signature_model(cls, MODEL_PROVIDED)
    for name, cls in SYNTHETIC_DATASETS.items():
        if cls.__module__.startswith("research_eval."):
            yield [name], signature_model(cls, SYNTHETIC_PROVIDED)


@pytest.mark.parametrize(("headings", "model"), [pytest.param(*section, id=section[0][-1]) for section in sections()])
def test_every_key_stands_on_the_page_with_its_values_and_default(headings: list[str], model: type[BaseModel]) -> None:
    page = DOCS / ("language_model.md" if "language" in headings[-1] else "configuration.md")
    rows = [row for heading in headings for row in one_table(page, heading, "key").rows]
    assert sorted((row[0], row[1], row[2]) for row in rows) == sorted(documented_keys(model))
    assert all(row[3] for row in rows)


def flags_of(*adders: Callable[[argparse.ArgumentParser], None]) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    for add in adders:
        add(parser)
    return {action.dest for action in parser._actions}


def flags_on(page: str, heading: str) -> set[str]:
    rows = one_table(DOCS / page, heading, "flag").rows
    return {name for row in rows for name in re.findall(r"--(\w+)", row[0])}


def test_what_studies_search_is_on_the_page() -> None:
    base = {"dataset_type": "real_world", "dataset_name": "trec", "epochs": 1, "batch_size": 1}
    models = [name for name, cls in MODELS_MAP.items() if cls.__module__.startswith("research_eval.")]
    spaces = build_space(models, base, {}).parameters.values()
    rows = one_table(DOCS / "studies.md", "Search space", "parameter").rows
    found = sorted({(f"`{parameter.name}`", str(parameter)) for space in spaces for parameter in space})
    assert sorted((row[0], row[1]) for row in rows) == found


def test_the_flags_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert flags_on("configuration.md", "Command line") == flags_of(run.add_run_arguments, run.add_common_arguments)
    common = {"epochs", "batch_size", "seed", "dry_run", "set"}  # that mean something else in a study
    assert flags_on("studies.md", "Flags") == flags_of(tune.add_study_arguments) | common
    assert flags_on("suggestions.md", "Flags") == flags_of(suggest.add_arguments)
    assert flags_on("evaluation.md", "Measure latency again") == flags_of(measure.add_arguments)
    assert flags_on("analysis.md", "Flags") == flags_of(analyze.add_arguments)
    for command in ("predict", "init-db"):
        with pytest.raises(SystemExit):
            main.cli([command, "--help"])
        sentence = re.search(
            rf"`goe {command}`(.*?)(?:; |\.$)", (DOCS / "configuration.md").read_text(), re.DOTALL | re.MULTILINE
        )
        assert sentence is not None
        printed = set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}
        assert printed == set(re.findall(r"--\w+", sentence[1]))


def test_the_environment_variables_are_those_of_the_code() -> None:
    read = {name for path in PACKAGE.rglob("*.py") for name in re.findall(r'"(GOE_\w+)"', path.read_text())}
    documented = one_table(DOCS / "configuration.md", "Environment variables", "variable").names()
    assert {name for name in documented if name.startswith("GOE_")} == read


# ------------------------------------------------------------------------------------ evaluation.md and results.md


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of every model, one that uses every option of goe_original, and one on text."""
    folder = tmp_path_factory.mktemp("runs")
    write_text_set(folder / "data", 2, "validation")
    common = {"epochs": 1, "batch_size": 32, "training_params": {"test": True, "device": "cpu"}}
    task = {"dataset_type": "synthetic", "dataset_name": "parity", "dataset_params": {"num_samples": 160, "seq_len": 6}}
    small = {"embed_dim": 8, "num_heads": 2}
    configs = [{**common, **task, "model_type": name, "model_params": small} for name in MODELS]
    rest = {"halt": "ponder", "contrastive_loss_coef": 0.1}
    configs.append({**common, **task, "model_type": "goe_original", "model_params": small | rest})
    text = {
        "dataset_type": "real_world",
        "dataset_name": "two",
        "dataset_params": {"data_dir": "data", "cache_dir": "c"},
    }
    configs.append({**common, **text, "model_type": "goe_original", "model_params": small, "training_params": {}})
    with contextlib.chdir(folder):
        for config in configs:
            assert experiment.run(config_from_dict(config), db=DB_FILE, quiet=True).status == "finished"
    return folder


def listed(page: str, first_cell: str) -> list[str]:
    """The names in all tables of a page whose first column is called so."""
    return [name for table in tables(DOCS / page) if table.header[0] == first_cell for name in table.names()]


def test_the_metrics_and_series_of_the_page_are_those_that_are_stored(runs: Path) -> None:
    with Store(str(runs / DB_FILE), read_only=True) as store:
        rows = store.experiments()
        metrics = {row["experiment_id"]: store.metrics(row["experiment_id"]) for row in rows}
        series = {(row["model_type"], point.name) for row in rows for point in store.history(row["experiment_id"])}
    assert set(listed("evaluation.md", "metric")) == {name for values in metrics.values() for name in values}
    terms = {(model, name.removesuffix("_raw")) for model, name in series if name.endswith("_raw")}
    (table,) = [table for table in tables(DOCS / "evaluation.md") if table.header[0] == "term"]
    documented = {(model, row[0].strip("`")) for row in table.rows for model in MODELS if f"`{model}`" in row[1]}
    assert documented == terms
    named = set(listed("evaluation.md", "series")) | {
        f"{term}_{end}" for _, term in terms for end in ("raw", "weighted")
    }
    assert {name for _, name in series} == named
    for values in list(metrics.values())[:4]:  # parity is not padded, and these paths are full
        assert values["inference_flops_per_sample"] == values["active_flops_per_sample"]


def test_the_tables_of_the_database_are_those_of_the_page(runs: Path) -> None:
    with contextlib.closing(sqlite3.connect(runs / DB_FILE)) as connection:
        for table in tables(DOCS / "results.md"):
            if table.header[0] == "column":
                name = re.findall(r"`(\w+)`", table.heading)[0]
                columns = connection.execute(f"PRAGMA table_info({name})").fetchall()
                assert [(column[1], column[2]) for column in columns] == [
                    (row[0].strip("`"), row[1]) for row in table.rows
                ]
        (environment,) = connection.execute("SELECT env_details_json FROM experiments LIMIT 1").fetchone()
    assert set(listed("results.md", "key of `env_details_json`")) == set(json.loads(environment))
    assert listed("results.md", "status") == list(STATUSES)


def test_the_files_of_a_run_are_those_of_the_page(runs: Path) -> None:
    found = {path.name for folder in (runs / "runs").iterdir() for path in folder.iterdir()}
    assert found == set(listed("results.md", "file"))


def test_the_columns_of_the_csv_file_are_those_of_the_page(runs: Path) -> None:
    with (runs / CSV_FILE).open(newline="") as file:
        header = next(csv.reader(file))
    (paragraph,) = re.findall(
        r"^`json_experiment_results.csv`.*?then every metric", (DOCS / "results.md").read_text(), re.S | re.M
    )
    assert header[: header.index("status") + 1] == re.findall(r"`(\w+)`", paragraph)
    assert set(header[header.index("status") + 1 :]) - {"flops_version"} <= set(listed("evaluation.md", "metric"))


# ------------------------------------------------------------------------------------------------- architecture.md


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules that a file imports when it is imported, and those inside its functions."""

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                names = {f"{child.module}.{alias.name}" for alias in child.names}
            elif isinstance(child, ast.Import):
                names = {alias.name for alias in child.names}
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            else:
                visit(child, inside or isinstance(child, ast.FunctionDef))
                continue
            (late if inside else early).update(names)

    early: set[str] = set()
    late: set[str] = set()
    visit(ast.parse(path.read_text()), inside=False)
    return early, late


def part_of(module: str) -> str | None:
    """The entry of the map that a module of the package belongs to."""
    words = module.split(".")
    return words[1] if words[0] == "research_eval" and len(words) > 1 and words[1] != "__version__" else None


def test_imports_point_the_way_the_map_says() -> None:
    table = one_table(DOCS / "architecture.md", "Map and direction of imports", "row")
    rank = {name: int(row[0]) for row in table.rows for name in re.findall(r"`(\w+)`", row[1])}
    exceptions = set()
    third_party: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        here = part_of(module)
        if here == "__init__":
            continue
        assert here in rank, f"{module} is not on the map"
        early, late = imports(path)
        for name in early | late:
            there = part_of(name)
            if there is None or there == here:
                third_party[here].update({name.split(".")[0]} if name in early else ())
            elif rank[there] >= rank[here]:
                exceptions.add((here, there, name in early))
    assert exceptions == set()
    assert set(rank) == {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_." and path.suffix != ".json"}
    light = {name for name in rank if rank[name] <= 5 or rank[name] >= 17} | {"config", "schema"}
    assert {name for name in light if "torch" in third_party[name]} == set()

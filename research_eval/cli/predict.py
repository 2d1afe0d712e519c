"""`goe predict`: what a trained model answers to a text, or to every text of files.

goe predict --run latest --text "a good film"
goe predict --run runs/20260531-101500-0a1b2c3d --file new.csv more.txt --out answers.jsonl
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP
from research_eval.files import write_atomically
from research_eval.store.csv_file import csv_lines
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase, report
from research_eval.wording import printable

if TYPE_CHECKING:
    from research_eval.runs.inputs import Input
    from research_eval.runs.predict import Prediction

DESCRIPTION = "answers of a trained model to your own text"
FORMATS = ("text", "jsonl", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe predict`. They have one spelling, because no name has an underscore."""
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        metavar="RUN",
        help="experiment id, the beginning of one, latest, or a run's folder; of several runs, such as the seeds of a "
        "config, the mean of their probabilities",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", action="append", help="one text (synthetic tasks: token ids with blanks); may be given again"
    )
    source.add_argument(
        "--file",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="one text per line (- reads standard input), or a table (.csv, .tsv, .jsonl, .json or .parquet, also .gz "
        "or .zst) with the run's text column",
    )
    parser.add_argument("--format", choices=FORMATS, help="of the output (default: what --out ends with, else text)")
    parser.add_argument("--out", metavar="FILE", help="write the answers there, and not to the screen")
    parser.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--quiet", action="store_true", help="print answers and warnings only")


def predict_command(arguments: argparse.Namespace) -> int:
    """Print or write the answer to each text, in the order of the texts."""
    from research_eval.runs.inputs import Input, check_files, output_file
    from research_eval.runs.locate import find_folder

    files = arguments.file or []
    out = None if arguments.out is None else output_file(arguments.out, files)
    check_files(files)
    folders = [find_folder(run, arguments.db) for run in arguments.run]
    import_torch()  # after what can be checked without it
    with phase("importing the program"):
        from research_eval.runs.ensemble import Ensemble
        from research_eval.runs.predict import TrainedModel

    model = TrainedModel(folders[0], arguments.device) if len(folders) == 1 else Ensemble(folders, arguments.device)
    with phase("reading the texts"):
        given = [Input("", number, text) for number, text in enumerate(arguments.text or [], 1)]
        inputs = given or model.read_inputs(files)
    form = arguments.format or (out.suffix[1:] if out is not None and out.suffix[1:] in FORMATS else "text")
    answers = zip(inputs, model.answers(inputs), strict=True)
    if form == "csv":
        lines = _csv(answers, model.label_names, model.num_outputs, with_files=len(files) > 1)
    else:
        write_one = _json_line if form == "jsonl" else _text_lines
        lines = (write_one(one, prediction, len(files) > 1) for one, prediction in answers)
    if out is None:
        for line in lines:
            print_product(line)
        return 0
    content = io.StringIO()
    with phase("predicting"):
        for number, line in enumerate(lines):
            report(f"{number:,} of {len(inputs):,}")
            content.write(line)
    write_atomically(out, content.getvalue().encode())
    return 0


def _text_lines(one: Input, prediction: Prediction, with_files: bool) -> str:
    """For a reader: `str` of the prediction, after the file and the number of the text if there are several files."""
    return f"{f'{printable(one.where)}: ' if with_files else ''}{prediction}\n"


def _json_line(one: Input, prediction: Prediction, with_files: bool) -> str:
    """One JSON object on a line, in ASCII: the `file` if there are several, the number of the `input`, its answer."""
    record: dict[str, Any] = {"file": one.file} if with_files else {}
    record |= {"input": one.number, "text": one.text, "blank": prediction.is_blank}
    if prediction.label_names:
        shares = dict(zip(prediction.label_names, prediction.probabilities, strict=False))
        record |= {"label": prediction.label if shares else None, "probabilities": shares}
    else:
        record["values"] = prediction.values
    return json.dumps({**record, "path": prediction.path}) + "\n"


def _csv(
    answers: Iterable[tuple[Input, Prediction]], label_names: Sequence[str], num_outputs: int, with_files: bool
) -> Iterator[str]:
    """A header, and a row per text. Cells that a spreadsheet would take for formulas begin with an apostrophe."""
    shares = [f"probability_{name}" for name in label_names]
    outputs = ["label", *shares] if label_names else [f"value_{number}" for number in range(num_outputs)]
    yield csv_lines([[*(["file"] if with_files else []), "input", "text", "blank", *outputs, "path"]])
    for one, prediction in answers:
        known: list[Any] = [prediction.label, *prediction.probabilities] if prediction.probabilities else []
        cells = known or prediction.values or [None] * len(outputs)
        front = [one.file] if with_files else []
        yield csv_lines([[*front, one.number, one.text, prediction.is_blank, *cells, prediction.path]])

"""`goe predict`: what a trained model answers to a text, or to every line of a file.

goe predict --run 20260531 --text "a good film"
"""

from __future__ import annotations

import argparse

from research_eval.cli.common import DB_HELP
from research_eval.system.best_effort import print_product

DESCRIPTION = "answers of a trained model to your own text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe predict`. They have one spelling, because no name has an underscore."""
    parser.add_argument("--run", required=True, metavar="ID", help="experiment id, or the beginning of one")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text (synthetic tasks: token ids with blanks)")
    source.add_argument("--file", metavar="FILE", help="one text per line")
    parser.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def predict_command(arguments: argparse.Namespace) -> int:
    """Print a line for each text."""
    from research_eval.runs.predict import predict, read_texts  # imports torch

    texts = [arguments.text] if arguments.text is not None else read_texts(arguments.file)
    for prediction in predict(arguments.run, texts, db=arguments.db, device=arguments.device):
        print_product(f"{prediction}\n")
    return 0

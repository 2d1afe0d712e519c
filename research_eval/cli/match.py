"""`goe match`: configs of other models that cost what a given config costs.

goe match base.json --axis flops --models moe goe_original --out matched
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from research_eval.cli.common import add_flag
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase
from research_eval.system.untrusted import user_path

if TYPE_CHECKING:
    from research_eval.comparing.match import Match

log = logging.getLogger(__name__)

DESCRIPTION = "configs of other models that cost what a config costs"
AXES_HELP = "what shall be equal: total_params, active_params, flops (of a forward pass) or latency (default: flops)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe match`."""
    parser.add_argument("base", metavar="FILE", help="the config that the others shall cost as much as")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="model types, such as moe goe")
    parser.add_argument("--axis", default="flops", metavar="AXIS", help=AXES_HELP)
    parser.add_argument(
        "--tol", type=float, default=0.02, help="largest difference of costs, as a share (default 0.02)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the configs (default: matched)", default="matched")
    add_flag(parser, "data_dir", metavar="PATH", help="a local copy of the data set: a folder, or one file")
    add_flag(parser, "quiet", action="store_true", help="print warnings only")


def match_command(arguments: argparse.Namespace) -> int:
    """Write one config for each model type and print what they cost. Exit code 1 if one of them is not matched."""
    from research_eval.config.check import check_early, load_config

    if not 0 < arguments.tol < 1:
        raise ConfigError(f"--tol: expected a share between 0 and 1, got {arguments.tol:g}")
    overrides = {} if arguments.data_dir is None else {"dataset_params.data_dir": arguments.data_dir}
    out = user_path(arguments.out, "--out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {arguments.out!r} is not a folder")
    check_early(arguments.base, overrides, needs_data=True)
    import_torch()
    with phase("importing the program"):
        from research_eval.comparing.match import check_axis, match
        from research_eval.datasets.providers import load_splits
    check_axis(arguments.axis)
    base = load_config(arguments.base, overrides)
    data = load_splits(base.dataset_type, base.dataset_name, base.dataset_params, base.seed)
    found = []
    for model_type in model_names(arguments.models):
        with phase(f"matching {model_type}"):
            found.append(match(base, model_type, arguments.axis, arguments.tol, data))
    paths = [out / f"{file_stem(base.experiment_name)}_{one.config.model_type}.json" for one in found]
    _write(paths, found)
    if not arguments.quiet:
        print_product(_table(paths, found))
    for one in found:
        if one.is_matched:
            continue
        if one.speed is not None and abs(one.ratio - 1) <= arguments.tol:
            log.warning(
                "%s takes %.3f to %.3f times as long as the base: this machine is too busy to say more. Try again when "
                "nothing else runs, or give a larger --tol.",
                *(one.config.model_type, one.speed.low, one.speed.high),
            )
        else:
            log.warning(
                "%s costs %.3f times the base: no sizes within %g were found. Change the base, such as its embed_dim, "
                "or give a larger --tol.",
                *(one.config.model_type, one.ratio, arguments.tol),
            )
    return 0 if all(one.is_matched for one in found) else 1


def model_names(words: list[str]) -> list[str]:
    """The model types of a flag that takes them with blanks or commas between them, each once."""
    names = [name.strip() for word in words for name in word.split(",")]
    if not all(names):
        raise ConfigError(f"--models: expected names such as dense,moe, got {' '.join(words)!r}")
    return list(dict.fromkeys(names))


def _write(paths: list[Path], found: list[Match]) -> None:
    """Write the configs. Raises ConfigError before the first one if another file has such a name."""
    texts = []
    for path, one in zip(paths, found, strict=True):
        name = f"{one.config.experiment_name}_{one.config.model_type}"
        config = one.config.to_dict() | {"experiment_name": name}
        texts.append(json.dumps(config, indent=2) + "\n")
        if path.exists() and not (path.is_file() and path.read_bytes() == texts[-1].encode()):
            raise ConfigError(f"--out: {path} exists and is another file. Give another folder, or remove it.")
    for path, text in zip(paths, texts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def _table(paths: list[Path], found: list[Match]) -> str:
    """The cost of the base, then a line for each config: its cost, also as a multiple of the base's, and its sizes.

    A multiple that was timed has its interval.
    """
    lines = [f"{found[0].axis} of the base: {found[0].target:,.4g}"]
    for path, one in zip(paths, found, strict=True):
        sizes = ", ".join(f"{name} {value}" for name, value in one.sizes.items()) or "the base"
        mark = "" if one.is_matched else "  NOT MATCHED"
        between = "" if one.speed is None else f" ({one.speed.low:.4f} to {one.speed.high:.4f})"
        lines.append(
            f"{one.config.model_type:<14} {one.cost:>14,.4g}  x {one.ratio:.4f}{between}{mark}  {sizes}  {path}"
        )
    return "\n".join(lines) + "\n"

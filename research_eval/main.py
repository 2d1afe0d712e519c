"""Run one experiment from a JSON config, or a study of many.

With --json_config_path one experiment (or several seeds of it) is run; without it a hyper-parameter study.
"""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from research_eval.cli import app
from research_eval.registry import MODELS_MAP as MODELS_MAP

if TYPE_CHECKING:
    import argparse

    import optuna
    import torch
    from torch import nn

# A file in `research_eval/models/` with `@MODELS_MAP.register("name")` is found by itself. A class from elsewhere is
# entered here: MODELS_MAP["my_new_model"] = MyNewModelClass


def get_trainable_parameter_count(model: nn.Module) -> int:
    """Number of parameters that receive a gradient."""
    from research_eval.models import base_model

    return base_model.get_trainable_parameter_count(model)


def _create_model_internal(
    model_type: str,
    vocab_size: int,
    num_classes: int,
    padding_idx: int,
    model_params_dict: dict[str, Any],
    device: torch.device | str,
) -> nn.Module:
    """Build the model of a config. Raises ConfigError for parameters that do not fit.

    To accept another spelling of a parameter, write it into the annotation of the constructor (`Aka`), not here.
    """
    import torch

    from research_eval.config.construction import model_arguments
    from research_eval.runs.prepare import create_model

    context = {"vocab_size": vocab_size, "num_classes": num_classes, "padding_idx": padding_idx}
    return create_model(model_type, model_arguments(model_type, model_params_dict), context, torch.device(device))


def objective(trial: optuna.Trial, args: argparse.Namespace | Mapping[str, Any] | None = None) -> Any:
    """One trial, to be called by `optuna.Study.optimize`. `args` has the flags of a study, such as `dataset_name`.

    The values come from the annotations of the constructors (docs/studies.md). Returns the value of the objective; a
    tuple if `--objectives` names several. Raises ConfigError, optuna.TrialPruned, or RuntimeError for a failed run.
    """
    import argparse

    from research_eval.cli.tune import study_options
    from research_eval.studies import tune

    given = vars(args) if isinstance(args, argparse.Namespace) else dict(args or {})
    return tune.objective(trial, study_options(argparse.Namespace(**given)))


def main(argv: list[str] | None = None) -> int:
    """`python research_eval/main.py`: with --json_config_path one experiment, without it a study."""
    return app.main(argv, __doc__)


def cli(argv: list[str] | None = None) -> int:
    """The console command `goe`, with a subcommand for everything."""
    return app.goe(argv)


if __name__ == "__main__":
    raise SystemExit(main())

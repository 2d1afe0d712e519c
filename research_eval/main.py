"""Run one experiment from a JSON config, or a study of many.

With --json_config_path one experiment (or several seeds of it) is run; without it a hyper-parameter study.
"""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from research_eval.commands import DB_HELP, add_flag, guarded, parse_or_suggest
from research_eval.errors import ConfigError
from research_eval.registry import MODELS_MAP as MODELS_MAP
from research_eval.study_command import STUDY_ONLY, add_study_arguments, tune_command

if TYPE_CHECKING:
    import optuna
    import torch
    from torch import nn

    from research_eval.experiment import Result
    from research_eval.schema import ExperimentConfig

log = logging.getLogger("research_eval.main")  # not __name__: as a script that would be __main__

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
    """The model of a config. Other spellings of a parameter belong into its annotation (`Aka`), not here."""
    import torch

    from research_eval.experiment import create_model
    from research_eval.schema import model_arguments

    context = {"vocab_size": vocab_size, "num_classes": num_classes, "padding_idx": padding_idx}
    return create_model(model_type, model_arguments(model_type, model_params_dict), context, torch.device(device))


def objective(trial: optuna.Trial, args: argparse.Namespace | Mapping[str, Any] | None = None) -> Any:
    """What `optuna.Study.optimize` calls: one trial with the study's flags as `args`, such as `dataset_name`.

    The values come from the annotations of the constructors (docs/studies.md). Returns the value of `--objectives`, a
    tuple where there are several.
    """
    from research_eval import hpo, study_command

    given = vars(args) if isinstance(args, argparse.Namespace) else dict(args or {})
    return hpo.objective(trial, study_command.study_options(argparse.Namespace(**given)))


MAX_SEEDS = 10_000

# Flags that replace a value of the file, and where the file has it.
OVERRIDES = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "seed": "seed",
    "device": "training_params.device",
    "precision": "training_params.precision",
    "data_dir": "dataset_params.data_dir",
}
RUN_ONLY = ("seeds", "resume")


def add_common_arguments(parser: argparse._ActionsContainer) -> None:
    """The flags of experiments and studies alike."""
    add_flag(parser, "epochs", type=int, help="passes over the training split (default: the file's; in a study 10)")
    add_flag(parser, "batch_size", type=int, help="samples per batch (default: the file's; in a study 32)")
    add_flag(parser, "data_dir", metavar="PATH", help="a local copy of the data set: a folder, or one file")
    add_flag(parser, "seed", type=int, help="instead of the file's seed; in a study that of all trials (default 0)")
    add_flag(parser, "device", help="auto, cpu, cuda, cuda:N or mps")
    add_flag(parser, "precision", choices=["fp32", "bf16"], help="bf16: mixed precision")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_flag(parser, "dry_run", action="store_true", help="check and describe, do not train")
    add_flag(parser, "quiet", action="store_true", help="print the final result only")


def add_run_arguments(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """The flags of one experiment."""
    add_flag(parser, "json_config_path", metavar="FILE", required=required, help="the experiment (JSON with comments)")
    add_flag(parser, "seeds", metavar="A-B", help="one run per seed, such as 0-4 or 0,2,5")
    add_flag(parser, "resume", action="store_true", help="go on with the newest unfinished run of the same config")


def parse_seeds(text: str) -> list[int]:
    """Seeds of a range "0-4" or a list "0,2,5". Raises ConfigError."""
    try:
        seeds: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            seeds += range(int(first), int(last if dash else first) + 1)[: MAX_SEEDS + 1]
    except ValueError:
        seeds = []
    if not 0 < len(seeds) <= MAX_SEEDS:
        raise ConfigError(f"--seeds: expected a range such as 0-4 or a list such as 0,2,5, got {text!r}")
    return list(dict.fromkeys(seeds))


def run_command(arguments: argparse.Namespace) -> int:
    """Exit code 0; 1 for a run that diverged; 128 + signal for one that was stopped."""
    from research_eval.schema import load_config

    overrides = {
        key: getattr(arguments, name) for name, key in OVERRIDES.items() if getattr(arguments, name) is not None
    }
    if arguments.seeds is not None and arguments.seed is not None:
        raise ConfigError("--seed and --seeds: give one of them")
    seeds = [None] if arguments.seeds is None else parse_seeds(arguments.seeds)
    configs = [
        load_config(arguments.json_config_path, overrides | ({} if seed is None else {"seed": seed})) for seed in seeds
    ]
    for key, value in overrides.items():
        log.info("%s = %r from the command line replaces the file's value", key, value)
    if arguments.dry_run:
        from research_eval.dry_run import describe

        print(describe(configs[0]))
        return 0
    from research_eval.experiment import run_all

    exit_code = 0
    results = run_all(configs, db=arguments.db, resume=arguments.resume, quiet=arguments.quiet)
    for config, result in zip(configs, results, strict=False):
        print(summary(config, result))
        exit_code = max(exit_code, result.exit_code)
    return exit_code


def summary(config: ExperimentConfig, result: Result) -> str:
    """The lines a run ends with."""
    lines = [
        f"{config.experiment_name} ({config.model_type} on {config.dataset_name}, seed {config.seed}): {result.status}"
    ]
    if result.error:
        lines.append(f"  {result.error}")
    shown = {
        "final_val_f1": "{:.4f}",
        "final_val_acc": "{:.4f}",
        "final_val_loss": "{:.4f}",
        "test_f1": "{:.4f}",
        "param_count": "{:,.0f}",
        "active_param_count": "{:,.0f}",
        "inference_flops_per_sample": "{:,.0f}",
        "inference_latency_ms_batch": "{:.2f}",
        "training_duration_seconds": "{:.1f}",
        "mean_path_length": "{:.2f}",
    }
    for name, form in shown.items():
        if name in result.metrics:
            lines.append(f"  {name:<28} {form.format(result.metrics[name])}")
    for path, count in result.metrics.get("common_paths", [])[:5]:
        lines.append(f"  {count:6d} samples took {' -> '.join(['start', *map(str, path), 'stop'])}")
    lines.append(f"  run {result.experiment_id} in {result.folder}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`python research_eval/main.py`: with --json_config_path one experiment, without it a study."""
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, allow_abbrev=False)
    add_common_arguments(parser.add_argument_group("experiments and studies"))
    add_run_arguments(parser.add_argument_group("one experiment"), required=False)
    add_study_arguments(parser.add_argument_group("a study (without --json_config_path)"))
    arguments = parse_or_suggest(parser, argv)
    return guarded(run_or_tune, arguments, arguments.quiet)


def run_or_tune(arguments: argparse.Namespace) -> int:
    """The mode follows from --json_config_path. Raises ConfigError for flags of the other one."""
    single = arguments.json_config_path is not None
    given = [name for name in (STUDY_ONLY if single else RUN_ONLY) if getattr(arguments, name) not in (None, False)]
    if single and given:
        raise ConfigError(f"--{given[0]}: is a flag of studies, and --json_config_path runs one experiment: drop one")
    if given == ["resume"]:
        log.info("--resume: a study goes on by itself")
    elif given:
        raise ConfigError("--seeds: is a flag of one experiment; a study takes --seed and --seeds_per_trial")
    if not single and arguments.dataset_name is None:
        raise ConfigError(
            "give --json_config_path FILE for one experiment, or at least --dataset_name for a study of many (--help)"
        )
    return run_command(arguments) if single else tune_command(arguments)


def cli(argv: list[str] | None = None) -> int:
    """The console command `goe`."""
    from research_eval import analyze_results, init_db, store_commands, suggest_configs

    parser = argparse.ArgumentParser(
        prog="goe", description="Train and compare dense, MoE and Graph-of-Experts models."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    run_parser = add("run", run_command, "run one experiment from a JSON config")
    add_run_arguments(run_parser)
    add_common_arguments(run_parser)
    tune_parser = add("tune", tune_command, "a study: many experiments whose settings a sampler chooses")
    add_study_arguments(tune_parser, required=True)
    add_common_arguments(tune_parser)
    analyze_results.add_arguments(add("analyze", analyze_results.analyze_command, "tables, plots and reports"))
    suggest_configs.add_arguments(add("suggest", suggest_configs.suggest_command, "new configs from the best runs"))
    for name, text in store_commands.DESCRIPTIONS.items():
        add_arguments, command = store_commands.COMMANDS[name]
        add_arguments(add(name, command, text))
    init_db.add_arguments(add("init-db", init_db.init_db_command, "create or migrate the results database"))
    predict = add("predict", predict_command, "probabilities of a trained model for your own text")
    predict.add_argument("--run", required=True, metavar="ID", help="experiment id, or the beginning of one")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text (synthetic tasks: token ids with blanks)")
    source.add_argument("--file", metavar="FILE", help="one text per line")
    predict.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    predict.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    arguments = parse_or_suggest(parser, argv)
    return guarded(arguments.command, arguments, getattr(arguments, "quiet", False))


def predict_command(arguments: argparse.Namespace) -> int:
    from research_eval.predict import predict, read_texts

    texts = [arguments.text] if arguments.text is not None else read_texts(arguments.file)
    for prediction in predict(arguments.run, texts, db=arguments.db, device=arguments.device):
        print(prediction)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

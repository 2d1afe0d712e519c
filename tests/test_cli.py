"""The commands as a user types them: files, flags, messages, exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, Ended, command, python, results, small_config, small_settings, write_config

from research_eval.cli.run import parse_seeds, parse_sets
from research_eval.config.check import parse_config
from research_eval.db_utils import DB_FILE, Store
from research_eval.errors import ConfigError
from research_eval.experiment import Journal
from research_eval.main import cli, main

SCRIPT = ROOT / "research_eval" / "main.py"
HEAVY = {"torch", "pydantic", "sqlalchemy", "numpy", "optuna"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_json(folder: Path, *flags: str, **changes: Any) -> Ended:
    return command(main, "--json_config_path", write_config(folder, **changes), *flags)


def stored_configs(folder: Path) -> list[dict[str, Any]]:
    with results(folder) as store:
        return [json.loads(row["full_config_json"]) for row in store.experiments()]


# ----------------------------------------------------------------------------------------------------- processes


def test_the_script_runs_from_any_directory_with_its_files_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    write_config(tmp_path / "configs", epochs=1)
    ended = python(SCRIPT, "--json_config_path", "configs/config.json", folder=tmp_path, PYTHONPATH="")
    assert ended.code == 0, ended.err
    assert "dense_parity (dense on parity, seed 0): finished" in ended.out
    assert "final_val_f1" in ended.out and "epoch 1/1  val_loss" in ended.err
    with results(tmp_path) as store:
        (row,) = store.experiments()
    assert (tmp_path / "runs" / row["experiment_id"] / "model.safetensors").is_file()
    assert f"run {row['experiment_id']} in runs/{row['experiment_id']}" in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        (SCRIPT, "--help"),
        ("-m", "research_eval.main", "--help"),
        *((SCRIPT.with_name(f"{name}.py"), "--help") for name in ("init_db", "analyze_results", "suggest_configs")),
    ],
    ids=["script", "module", "init_db", "analyze_results", "suggest_configs"],
)
def test_help_is_quick(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = python("-X", "importtime", *arguments, folder=tmp_path, fresh=True)
    assert ended.code == 0 and "usage:" in ended.out
    imported = {line.rpartition("|")[2].strip() for line in ended.err.splitlines()}
    assert "argparse" in imported and not imported & HEAVY
    assert names_in(tmp_path) == []


def test_the_help_of_every_command_is_quick(tmp_path: Path) -> None:
    program = """
import contextlib, re, subprocess, sys
from research_eval.main import cli

def help_of(*command):
    import io
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli([*command, "--help"])
    return out.getvalue()

overview = help_of()
names = re.findall(r"^    ([a-z-]+) ", overview, re.MULTILINE)
for name in names:
    assert f"usage: goe {name}" in help_of(name), name
print(*names)
print(*sys.modules)
"""
    ended = python("-c", program, folder=tmp_path, fresh=True)
    assert ended.code == 0, ended.err
    names, modules = ended.out.splitlines()
    assert {"run", "init-db", "predict"} <= set(names.split())
    assert not HEAVY & set(modules.split())


def test_datasets_is_the_hugging_face_package_for_the_script(tmp_path: Path) -> None:
    """Python puts the folder of a script first, and there `datasets` is ours."""
    program = f"""
import importlib.util, runpy, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
print(importlib.util.find_spec("datasets").origin)
sys.argv = ["main.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    pass
print(importlib.util.find_spec("datasets").origin)
print(importlib.util.find_spec("research_eval.datasets").origin)
"""
    ended = python("-c", program, folder=tmp_path, fresh=True, PYTHONPATH="")
    before, *_, after, ours = ended.out.splitlines()
    assert Path(before) == Path(ours) == SCRIPT.parent / "datasets" / "__init__.py"
    assert "site-packages" in after


def test_the_console_command_is_the_function(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"goe": "research_eval.main:cli"}
    installed = shutil.which("goe", path=str(Path(sys.executable).parent))
    if installed is None:
        pytest.skip("the package is not installed")
    assert "usage: goe" in python(installed, "--help", folder=tmp_path, fresh=True).out


# --------------------------------------------------------------------------------------------------------- flags


def test_goe_run_is_main(tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=1)
    ended = command(cli, "run", "--json-config-path", config, "--quiet")
    assert ended.code == 0 and ": finished" in ended.out
    assert [stored["epochs"] for stored in stored_configs(tmp_path)] == [1]


def test_flags_replace_values_of_the_file_with_a_log_line(tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--batch-size", "40", "--seed", "5", "--device", "cpu", "--precision", "bf16"]
    ended = run_json(tmp_path, *flags)
    assert ended.code == 0
    (stored,) = stored_configs(tmp_path)
    expected = small_config(epochs=1, batch_size=40, seed=5, training_params={"device": "cpu", "precision": "bf16"})
    assert stored == expected.to_dict()
    for line in ("epochs = 1", "batch_size = 40", "seed = 5", "training_params.precision = 'bf16'"):
        assert f"{line} from the command line replaces the file's value" in ended.err
    assert "epoch 1/1" in ended.err


def test_without_flags_the_file_counts(tmp_path: Path) -> None:
    assert "command line" not in run_json(tmp_path, epochs=1).err
    assert stored_configs(tmp_path) == [small_config(epochs=1).to_dict()]


def test_data_dir_names_another_copy_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 20)
    changes = {"dataset_type": "real_world", "dataset_name": "films", "dataset_params": {}, "epochs": 1}
    ended = run_json(tmp_path, "--data_dir", str(tmp_path / "data.csv"), **changes)
    assert ended.code == 0, ended.err
    assert stored_configs(tmp_path)[0]["dataset_params"]["data_dir"] == str(tmp_path / "data.csv")


def test_quiet_prints_the_result_alone(tmp_path: Path) -> None:
    ended = run_json(tmp_path, "--quiet", "--epochs", "1")
    assert (ended.code, ended.err) == (0, "")
    first, *lines, last = ended.out.splitlines()
    assert first == "dense_parity (dense on parity, seed 0): finished"
    assert last.startswith("  run ") and all(line.startswith("  ") for line in lines)


def test_a_terminal_gets_a_bar_unless_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what is written to counts as a terminal
    assert run_json(tmp_path, "--quiet", epochs=1).err == ""
    err = run_json(tmp_path, epochs=1).err
    assert "epoch 1/1" in err and "samples/s" in err and "5/5" in err


def test_every_seed_is_a_run(tmp_path: Path) -> None:
    ended = run_json(tmp_path, "--seeds", "0-1", "--quiet", epochs=1)
    assert ended.code == 0
    assert sorted(stored["seed"] for stored in stored_configs(tmp_path)) == [0, 1], "they train side by side"
    assert ended.out.count(": finished") == 2


def test_the_results_go_where_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--db` before $GOE_DB before the default."""
    monkeypatch.setenv("GOE_DB", str(tmp_path / "variable.db"))
    for flags in ([], ["--db", "flag.db"], ["--db", f"sqlite:///{tmp_path}/url.db"]):
        assert run_json(tmp_path, *flags, "--quiet", epochs=1).code == 0
    for name in ("variable.db", "flag.db", "url.db"):
        with Store(name, read_only=True) as store:
            assert [row["status"] for row in store.experiments()] == ["finished"]
    assert not (tmp_path / DB_FILE).exists()


def test_goe_init_db_makes_the_results(tmp_path: Path) -> None:
    for _ in range(2):
        ended = command(cli, "init-db", "--db", "new.db")
        assert ended.code == 0 and str(tmp_path / "new.db") in ended.out
    with Store("new.db", read_only=True) as store:
        assert store.experiments() == []


def test_a_dry_run_describes_and_does_nothing(tmp_path: Path) -> None:
    before = names_in(tmp_path)
    ended = run_json(tmp_path, "--dry_run", model_type="goe_original", epochs=7)
    assert ended.code == 0
    assert names_in(tmp_path) == [*before, "config.json"]
    text, _, shapes = ended.out.partition("\n}\n")
    assert json.loads(text + "\n}") == small_config(model_type="goe_original", epochs=7).to_dict()
    for words in (
        "device, precision",
        "train 80, validation 20, test 20",
        "[16, 6] ids -> [16, 2] logits",
        "in all,",
        "FLOPs per sample",
        "FLOPs of the training",
        "MiB for weights, gradients and optimiser",
        "MiB for the largest batch",
    ):
        assert words in shapes
    assert "head.linear.weight" in shapes and "2 x 8" in shapes


def test_a_dry_run_counts_what_a_run_counts(tmp_path: Path) -> None:
    described = run_json(tmp_path, "--dry-run", epochs=1).out
    assert run_json(tmp_path, "--quiet", epochs=1).code == 0
    with results(tmp_path) as store:
        (row,) = store.experiments()
        metrics = store.metrics(row["experiment_id"])
    assert f"{metrics['param_count']:,.0f} in all, {metrics['active_param_count']:,.0f} active" in described
    assert f"forward {metrics['inference_flops_per_sample']:,.0f}," in described
    assert f"{metrics['train_flops']:.3g}\n" in described


@pytest.mark.parametrize("model_type", ["dense", "goe_original"])
def test_the_memory_estimate_grows_with_the_batch_and_the_weights(model_type: str, tmp_path: Path) -> None:
    def estimate(**changes: Any) -> list[float]:
        out = run_json(tmp_path, "--dry_run", model_type=model_type, **changes).out
        line = next(line for line in out.splitlines() if line.startswith("memory of training"))
        return [float(word) for word in line.split() if word[0].isdigit()]

    wide = {"embed_dim": 128, "num_heads": 2}
    weights, activations = estimate(model_params=wide, batch_size=16)
    assert estimate(model_params=wide, batch_size=64)[0] == weights
    assert 3 < estimate(model_params=wide, batch_size=64)[1] / activations < 5
    averaged = estimate(model_params=wide, batch_size=16, training_params={"ema_decay": 0.9})[0]
    assert averaged == pytest.approx(weights * 5 / 4, abs=0.2)  # weights, gradients, two moments; and the average


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("flags", "changes", "complaint"),
    [
        ([], {"epoch": 3}, "config.json:1: unknown key 'epoch'. Did you mean 'epochs'?"),
        ([], {"model_params": {"embed_dim": 9}}, "num_heads=2 does not divide embed_dim=9"),
        (["--epochs", "0"], {}, "--epochs: must be >= 1, got 0."),
        (["--seed", "-1"], {}, "--seed: must be >= 0, got -1."),
        (["--device", "gpu"], {}, "--device: expected auto, cpu, cuda, cuda:N or mps"),
        (["--seeds", "3-1"], {}, "--seeds: expected a range such as 0-4 or a list such as 0,2,5, got '3-1'"),
        (["--seeds", "0-99999999999999999999"], {}, "--seeds: expected a range"),
        (["--seeds", "0-1", "--seed", "0"], {}, "--seed and --seeds: give one of them"),
        (["--data_dir", "nowhere"], {}, "data_dir"),
    ],
)
def test_mistakes_end_with_2_before_anything_is_written(
    flags: list[str], changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    ended = run_json(tmp_path, *flags, **changes)
    assert (ended.code, ended.out) == (2, "")
    assert complaint in ended.err and "Traceback" not in ended.err
    assert names_in(tmp_path) == ["config.json"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    ended = command(main, "--json_config_path", "nowhere.json")
    assert (ended.code, ended.out, ended.err) == (2, "", "nowhere.json: cannot be read: No such file or directory\n")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("function", [main, cli])
def test_a_device_that_is_not_there_ends_with_2(function: Callable[[list[str]], int], tmp_path: Path) -> None:
    before = ["run"] if function is cli else []
    ended = command(function, *before, "--json_config_path", write_config(tmp_path), "--device", "cuda:77")
    assert ended.code == 2 and "this machine has no 'cuda:77'" in ended.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [("--epoch", "'--epochs'"), ("--json_config", "'--json_config_path'"), ("--dryrun", "'--dry_run'")],
)
def test_an_unknown_flag_is_not_guessed_but_suggested(flag: str, suggestion: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for function, before in ((main, []), (cli, ["run"])):
        ended = command(function, *before, "--json_config_path", config, flag, "3")
        assert ended.code == 2
        assert f"unknown argument {flag!r}. Did you mean {suggestion}?" in ended.err
    assert names_in(tmp_path) == ["config.json"]


def test_no_flags_at_all(tmp_path: Path) -> None:
    ended = command(cli)
    assert ended.code == 2 and "COMMAND" in ended.err


def test_a_run_that_diverges_ends_with_1(tmp_path: Path) -> None:
    sgd = {"name": "sgd", "lr": 1e38, "grad_clip_norm": None}
    ended = run_json(tmp_path, "--quiet", optimizer_params=sgd)
    assert ended.code == 1
    assert "seed 0): diverged\n  the loss is nan at step 2" in ended.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_seeds_and_the_run_can_be_resumed(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Journal.train_values

    def reporting(self: Journal, step: int, values: dict[str, float]) -> None:
        report(self, step, values)
        if step == 4:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "train_values", reporting)
        patch.setattr("research_eval.studies.seeds.pool_size", lambda *_: 1)  # one after the other, as on a GPU
        ended = run_json(tmp_path, "--seeds", "0-2", model_type="moe")
    assert ended.code == code
    assert f"interrupted\n  signal {int(number)} after step 4" in ended.out
    assert [stored["seed"] for stored in stored_configs(tmp_path)] == [0]
    resumed = run_json(tmp_path, "--seed", "0", "--resume", model_type="moe")
    assert resumed.code == 0 and "resuming run " in resumed.err
    again = run_json(tmp_path, "--seed", "0", "--resume", model_type="moe")
    assert again.code == 0 and "is finished: nothing to resume" in again.err
    assert again.out == resumed.out
    with results(tmp_path) as store:
        assert [row["status"] for row in store.experiments()] == ["finished"]


@given(st.lists(st.integers(0, 60) | st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=5))
def test_seeds_are_numbers_and_ranges(parts: list[Any]) -> None:
    text = ",".join(str(part) if isinstance(part, int) else f"{part[0]}-{sum(part)}" for part in parts)
    expected = [seed for part in parts for seed in ([part] if isinstance(part, int) else range(part[0], sum(part) + 1))]
    assert parse_seeds(text) == list(dict.fromkeys(expected))


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "5-4", "1-2-3", "0.5", "0-10000"])
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds: expected"):
        parse_seeds(text)


# ------------------------------------------------------------------------------------------------ --set


@pytest.mark.parametrize(
    "flags",
    [
        ("--set", "optimizer_params.lr=0.25", "--set", "model_params.embed_dim=16", "--set", "experiment_name=a=b"),
        ("--optimizer_params.lr", "0.25", "--model_params.embed_dim=16", "--set", 'experiment_name="a=b"'),
    ],
)
@pytest.mark.parametrize("entry", [main, lambda words: cli(["run", *words])])
def test_any_key_may_be_replaced(entry: Callable[[list[str]], int], flags: tuple[str, ...], tmp_path: Path) -> None:
    ended = command(entry, "--json_config_path", write_config(tmp_path), "--dry_run", *flags)
    assert ended.code == 0, ended.err
    config = json.loads(ended.out[: ended.out.index("\n}") + 2])
    assert (config["optimizer_params"]["lr"], config["model_params"]["embed_dim"]) == (0.25, 16)
    assert config["experiment_name"] == "a=b"
    assert "optimizer_params.lr = 0.25 from the command line replaces the file's value" in ended.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "optimizer_params.lr=fast"], "--set optimizer_params.lr: expected float, got"),
        (["--set", "optimizer_params.rate=1"], "--set optimizer_params.rate: optimizer_params: unknown key 'rate'"),
        (["--set", "optimizer_parms.lr=1"], "unknown key 'optimizer_parms'. Did you mean 'optimizer_params'?"),
        (["--set", "lr"], "--set: expected KEY=VALUE such as optimizer_params.lr=1e-3, got 'lr'"),
        (["--set", "a.b.c=1"], "--set: expected KEY=VALUE"),
        (["--set", "epochs=1", "--set", "epochs=2"], "--set: epochs is given twice"),
        (["--set", "epochs=1", "--epochs", "2"], "--set: epochs is given by another flag too"),
        (["--set", "seed=1", "--seeds", "0-1"], "--set: seed is given by another flag too"),
        (
            ["--lr", "1"],
            "unknown argument '--lr'. It is a key of the config: write it into the file, or give --set opt",
        ),
    ],
)
def test_a_key_that_cannot_be_replaced_is_explained(flags: list[str], message: str, tmp_path: Path) -> None:
    ended = command(main, "--json_config_path", write_config(tmp_path), *flags)
    assert ended.code == 2 and message in ended.err, ended.err


SMALL_STUDY = ("--dataset_name", "parity", "--model_types", "dense")


def test_a_study_takes_fixed_values_with_set() -> None:
    sets = ("--set", "model_params.embed_dim=16", "--optimizer_params.lr", "[0.1, 0.2]", "--set", "batch_size=4")
    ended = command(cli, "tune", *SMALL_STUDY, *sets, "--dry_run")
    assert ended.code == 0, ended.err
    assert "optimizer_params.lr: one of 0.1, 0.2" in ended.out
    assert "embed_dim:" not in ended.out and "batch_size" not in ended.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "epochs=1"), "--set: epochs of a study is given by --epochs"),
        (("--set", "model_type=moe"), "--set: model_type of a study is given by --model_types"),
        (
            ("--set", "dataset_params.seq_len=1", "--syn_seq_len", "4"),
            "--set: dataset_params.seq_len is given by another",
        ),
        (("--set", "optimizer_params.learning=1"), "--set: optimizer_params: unknown key 'learning'"),
        (("--set", "optimizer_parms.lr=1"), "--set: unknown key 'optimizer_parms'. Did you mean 'optimizer_params'?"),
        (("--set", "model_params.embed_dim=wide"), "--set: model_params.embed_dim: input should be a valid integer"),
        (
            ("--lr", "1"),
            "unknown argument '--lr'. It is a key of the config: write it into the file, or give --set opt",
        ),
    ],
)
def test_a_value_that_a_study_cannot_fix_is_explained(flags: tuple[str, ...], message: str) -> None:
    ended = command(cli, "tune", *SMALL_STUDY, *flags, "--dry_run")
    assert ended.code == 2 and message in ended.err, ended.err


def test_set_replaces_another_spelling_of_the_same_key(tmp_path: Path) -> None:
    changes = {"model_type": "moe", "model_params": {"num_experts_per_layer": 2, "embed_dim": 8}}
    ended = run_json(tmp_path, "--set", "model_params.num_experts=3", "--dry_run", **changes)
    assert ended.code == 0 and '"num_experts": 3' in ended.out
    twice = ("--set", "model_params.num_experts=3", "--set", "model_params.num_experts_per_layer=3")
    ended = run_json(tmp_path, *twice, "--dry_run", **changes)
    assert ended.code == 2 and "two spellings of one key" in ended.err


@given(st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3), st.lists, max_leaves=4))
def test_a_value_of_set_is_that_of_the_file(value: Any) -> None:
    """Whatever the value is: checked in the same way, with the same complaint."""
    settings = small_settings()
    overrides = parse_sets([f"model_params.dropout={json.dumps(value)}"])
    assert overrides == {"model_params.dropout": value}

    def outcome(text: str, flags: dict[str, Any]) -> Any:
        try:
            return parse_config(text, "c.json", flags, {"model_params.dropout": "--set model_params.dropout"}).to_dict()
        except ConfigError as error:
            return str(error).rpartition("dropout: ")[2]

    in_file = settings | {"model_params": {**settings["model_params"], "dropout": value}}
    assert outcome(json.dumps(settings), overrides) == outcome(json.dumps(in_file), {})


def test_a_number_for_a_text_says_how_to_write_a_text(tmp_path: Path) -> None:
    ended = run_json(tmp_path, "--set", "experiment_name=2024", "--dry_run")
    assert (
        ended.code == 2
        and """expected str, got 2024. For text, give it in quotes of JSON, such as '"2024"'""" in ended.err
    )
    ended = run_json(tmp_path, "--set", 'experiment_name="2024"', "--dry_run")
    assert ended.code == 0 and '"experiment_name": "2024"' in ended.out


# ---------------------------------------------------------------------------------------- what was meant, empty paths


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("anlyze",), "unknown command 'anlyze'. Did you mean 'analyze'?"),
        (("zzz",), "unknown command 'zzz'. Known: analyze, atlas, benchmark, compare"),
        (("runs", "--modle_type", "moe"), "unknown argument '--modle_type'. Did you mean '--model_type'?"),
        (("runs", "--model_type", "dnse"), "--model_type: no run has 'dnse' in"),
        (("export", "x.csv", "--dataset_name", "pairty"), "Did you mean 'parity'?"),
        (("run", "--json_config_path", "config.json", "--embed_dim", "8"), "give --set model_params.embed_dim=VALUE"),
        (("run", "--json_config_path", "config.json", "--seqlen=8"), "give --set dataset_params.seq_len=VALUE"),
        (("run", "--json_config_path", "config.json", "--model_type", "moe"), "give --set model_type=VALUE"),
    ],
)
def test_what_was_meant_is_said(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    with Store() as store:
        start_run(store, "a")
    ended = command(cli, *words)
    assert ended.code == 2 and message in ended.err, ended.err


def start_run(store: Store, name: str) -> None:
    row = {"experiment_name": "n", "model_type": "dense", "dataset_name": "parity", "dataset_type": "synthetic"}
    numbers = {"epochs": 1, "batch_size": 1, "seed": 0}
    store.start_experiment(experiment_id=name, run_type="json", **row, **numbers, config={}, environment={})


def test_a_model_type_without_runs_is_no_mistake() -> None:
    with Store() as store:
        start_run(store, "a")
    ended = command(cli, "runs", "--model_type", "moe")
    assert ended.code == 0 and "no runs in" in ended.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--syn_seq_len", "8"),
            "write dataset_params.seq_len into the file, or give --set dataset_params.seq_len=VALUE",
        ),
        (("--dataset_name", "copying"), "write dataset_name into the file, or give --set dataset_name=VALUE"),
        (("--n_trials", "8"), "--json_config_path runs one experiment: drop one"),
    ],
)
def test_a_flag_of_studies_that_belongs_into_the_file_is_answered_with_the_key(
    flags: tuple[str, str], message: str, tmp_path: Path
) -> None:
    ended = run_json(tmp_path, *flags)
    assert ended.code == 2 and message in ended.err, ended.err


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--json_config_path", ""),
        ("run", "--json_config_path", "config.json", "--db", ""),
        ("run", "--json_config_path", "config.json", "--data_dir", " "),
        ("tune", *SMALL_STUDY, "--storage", ""),
        ("tune", *SMALL_STUDY, "--search_space="),
        ("analyze", "--dataset_name", "parity", "--output_dir", ""),
        ("suggest", "--dataset_name", "parity", "--model_type", "moe", "--output_dir", ""),
        ("export", ""),
        ("merge", ""),
        ("predict", "--run", "latest", "--file", ""),
        *((name, "--db", "") for name in ("runs", "doctor", "init-db")),
        ("replay", "latest", "--db", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_called_an_empty_path(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = command(cli, *words)
    assert ended.code == 2 and "an empty path" in ended.err
    assert names_in(tmp_path) == []

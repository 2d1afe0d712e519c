"""A database of the project's public original is adopted at once, and its trials are configs to start from."""

from __future__ import annotations

import errno
import json
import sqlite3
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MODELS, Ended, command, results, small_settings

from research_eval import analyze_results, init_db, suggest_configs
from research_eval.cli.tune import study_options
from research_eval.config.check import config_from_dict
from research_eval.db_utils import DB_FILE, SCHEMA_VERSION, Store
from research_eval.errors import ConfigError
from research_eval.main import cli
from research_eval.store import migrate
from research_eval.studies.initial_trials import add_past_runs
from research_eval.studies.original_trials import translated
from research_eval.studies.queue import TrialQueue

TABLES = """
CREATE TABLE experiments (
    experiment_id TEXT PRIMARY KEY, run_type TEXT NOT NULL, timestamp DATETIME DEFAULT CURRENT_TIMESTAMP,
    experiment_name TEXT, model_type TEXT NOT NULL, dataset_name TEXT NOT NULL, dataset_type TEXT NOT NULL,
    epochs INTEGER NOT NULL, batch_size INTEGER NOT NULL, full_config_json TEXT, env_details_json TEXT
);
CREATE TABLE metrics (
    metric_id INTEGER PRIMARY KEY AUTOINCREMENT, experiment_id TEXT NOT NULL, metric_name TEXT NOT NULL,
    metric_value REAL, FOREIGN KEY (experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
CREATE INDEX idx_metric_name ON metrics (metric_name);
"""
SHARED = {
    "embed_dim": 16,
    "num_heads": 2,
    "dim_feedforward_factor": 2,
    "dropout": 0.1,
    "optimizer_name": "sgd",
    "lr": 3e-3,
    "weight_decay": 1e-4,
    "use_grad_clip": False,
    "scheduler_name": "cosine_warmup",
    "warmup_factor": 0.05,
}
OWN: dict[str, dict[str, Any]] = {
    "dense": {"dt_num_layers": 3},
    "moe": {"moe_num_layers": 1, "moe_num_experts_per_layer": 4, "moe_top_k": 2, "aux_loss_coeff": 0.05},
    "goe": {
        "goe_num_layers": 2,
        "goe_num_total_experts_pool": 6,
        "goe_max_path_len": 3,
        "goe_router_hidden_dim": 16,
        "goe_gumbel_tau": 1.5,
        "aux_loss_coeff": 0.05,
    },
    "goe_original": {
        "goe_original_num_total_experts": 6,
        "goe_original_max_path_len": 3,
        "goe_original_router_hidden_dim": 16,
        "goe_original_expert_layers": 2,
        "goe_original_gumbel_tau": 0.7,
        "goe_original_path_penalty_coef": 0.01,
        "goe_original_diversity_loss_coef": 0.02,
        "goe_original_contrastive_loss_coef": 0.03,
        "goe_original_max_visits": 2,
        "aux_loss_coeff": 0.05,
    },
}
DATA = {"parity": ("synthetic", {"syn_seq_len": 12}), "ag_news": ("real_world", {"rw_max_length": 64})}
MODEL_PARAMS = {
    "dense": {"num_layers": 3},
    "moe": {"num_layers": 1, "num_experts": 4, "top_k_experts": 2},
    "goe": {
        "num_layers": 2,
        "num_total_experts": 6,
        "max_path_len": 3,
        "router_hidden_dim": 16,
        "gumbel_tau": 1.5,
    },
    "goe_original": {
        "num_total_experts": 6,
        "max_path_len": 3,
        "router_hidden_dim": 16,
        "expert_layers": 2,
        "gumbel_tau": 0.7,
        "path_penalty_coef": 0.01,
        "diversity_loss_coef": 0.02,
        "contrastive_loss_coef": 0.03,
        "max_visits": 2,
    },
}


def trial_row(model_type: str, dataset: str = "parity", number: int = 0, **params: Any) -> dict[str, Any]:
    """A row of a trial, as the original stored it."""
    dataset_type, data = DATA[dataset]
    stored = {**data, "model_type": model_type, **SHARED, **OWN[model_type], **params}
    return {
        "experiment_id": f"optuna_st_{number}",
        "run_type": "optuna_trial",
        "timestamp": "2025-06-01 10:00:00",
        "experiment_name": "st",
        "model_type": model_type,
        "dataset_name": dataset,
        "dataset_type": dataset_type,
        "epochs": 3,
        "batch_size": 16,
        "full_config_json": json.dumps(stored),
        "env_details_json": "{}",
    }


def json_row(**config: Any) -> dict[str, Any]:
    """A row of a run from JSON; the original stored what the user had written."""
    settings = {**small_settings(**config), "experiment_name": "my run"}
    settings.pop("training_params", None)
    row = trial_row("dense") | {
        "experiment_id": "json_my run_1a2b3c4d",
        "run_type": "json",
        "experiment_name": "my run",
    }
    return row | {"full_config_json": json.dumps(settings), "epochs": 2, "env_details_json": None}


def make(path: Path, rows: list[dict[str, Any]], tables: str = TABLES) -> None:
    """The database with these rows, each with a score, a size and a list; the first one has the best score."""
    with sqlite3.connect(path) as connection:
        connection.executescript(tables)
        for number, row in enumerate(rows):
            columns, marks = ", ".join(row), ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO experiments ({columns}) VALUES ({marks})", list(row.values()))
            for name, value in (("final_val_f1", 0.9 - number / 20), ("param_count", 123), ("usage", "[10, 5, 8]")):
                connection.execute(
                    "INSERT INTO metrics (experiment_id, metric_name, metric_value) VALUES (?, ?, ?)",
                    (row["experiment_id"], name, value),
                )
    connection.close()


def contents(path: Path) -> list[Any]:
    """What the original's columns hold."""
    with sqlite3.connect(path) as connection:
        columns = ", ".join(trial_row("dense"))
        found = connection.execute(f"SELECT {columns} FROM experiments ORDER BY 1").fetchall()
        found += connection.execute(
            "SELECT metric_id, experiment_id, metric_name, metric_value FROM metrics"
        ).fetchall()
    connection.close()
    return found


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def ours(name: str) -> Ended:
    """A command that reads or writes the results, as a user calls it first."""
    make(Path("other.db"), [trial_row("dense", number=9)])
    calls: dict[str, tuple[Any, ...]] = {
        "runs": (cli, "runs"),
        "show": (cli, "runs", "show", "optuna_st_1"),
        "analyze": (analyze_results.main, "--dataset_name", "parity", "--run_summary_table"),
        "suggest": (suggest_configs.main, "--dataset_name", "parity", "--model_type", "moe"),
        "init_db": (init_db.main,),
        "export": (cli, "export", "all.csv"),
        "merge": (cli, "merge", "other.db"),
    }
    return command(*calls[name])


@pytest.mark.parametrize("name", ["runs", "show", "analyze", "suggest", "init_db", "export", "merge"])
def test_the_first_command_adopts_it_and_loses_nothing(name: str, tmp_path: Path) -> None:
    make(Path(DB_FILE), [trial_row("moe", number=7), trial_row("moe", number=1, lr=1e-3), json_row()])
    before = contents(Path(DB_FILE))
    ended = ours(name)
    assert ended.code == 0, ended.err
    after = contents(Path(DB_FILE))
    assert [row for row in after if row in before] == before
    (backup,) = tmp_path.glob("experiment_results.backup-*.db")
    assert contents(backup) == before
    with results(tmp_path) as store:
        assert store.schema_version == SCHEMA_VERSION
        assert store.metrics("optuna_st_7") == {"final_val_f1": 0.9, "param_count": 123.0, "usage": [10.0, 5.0, 8.0]}
    assert ours_again(name).code == 0 and list(tmp_path.glob("experiment_results.backup-*.db")) == [backup]


def ours_again(name: str) -> Ended:
    """The command once more; what it wrote is moved away, because it replaces no file."""
    for path in (Path("all.csv"), Path("other.db")):
        path.unlink(missing_ok=True)
    return ours(name)


@pytest.mark.parametrize("dataset", DATA)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_trial_is_a_config(model_type: str, dataset: str) -> None:
    config, left_out = translated(trial_row(model_type, dataset, router_temperature=1.0))
    assert left_out == ["router_temperature"]
    complete = config_from_dict(config).to_dict()
    wanted = {"embed_dim": 16, "num_heads": 2, "dim_feedforward_factor": 2, "dropout": 0.1, **MODEL_PARAMS[model_type]}
    assert {key: complete["model_params"][key] for key in wanted} == wanted
    optimizer = complete["optimizer_params"]
    assert (optimizer["name"], optimizer["lr"], optimizer["weight_decay"]) == ("sgd", 3e-3, 1e-4)
    assert optimizer["grad_clip_norm"] is None
    assert optimizer["aux_loss_coeff"] == (1.0 if model_type == "dense" else 0.05)
    assert complete["scheduler_params"]["name"] == "cosine_warmup"
    assert complete["scheduler_params"]["warmup_factor"] == 0.05
    assert complete["dataset_params"]["seq_len" if dataset == "parity" else "max_length"] in (12, 64)
    assert (complete["epochs"], complete["batch_size"], complete["experiment_name"]) == (3, 16, "st")


@given(st.sampled_from(MODELS), st.sampled_from([8, 16, 24, 36]), st.sampled_from([1, 2, 3, 4, 5, 8]))
def test_heads_that_do_not_divide_the_width_are_those_that_the_original_took(
    model_type: str, width: int, heads: int
) -> None:
    config, _ = translated(trial_row(model_type, embed_dim=width, num_heads=heads))
    taken = config["model_params"]["num_heads"]
    assert width % taken == 0
    assert taken == heads if width % heads == 0 else taken == max(n for n in (1, 2, 4, 8) if width % n == 0)


def test_a_run_from_json_keeps_what_still_exists() -> None:
    params = {"embed_dim": 8, "dt_num_layers": 3, "gone": 1}
    config, left_out = translated(json_row(model_params=params, optimizer_params={"lr": 0.5, "amsgrad": True}))
    assert left_out == ["model_params.gone", "optimizer_params.amsgrad"]
    assert config_from_dict(config).model_params["num_layers"] == 3
    assert config["optimizer_params"] == {"lr": 0.5}


def test_suggestions_and_studies_start_from_the_trials(tmp_path: Path) -> None:
    rows = [trial_row("moe", number=number, lr=rate, gone=1) for number, rate in enumerate((1e-3, 2e-3, 3e-3))]
    make(Path(DB_FILE), rows)
    flags = ("--dataset_name", "parity", "--model_type", "moe", "--top_n", "1")
    ended = command(suggest_configs.main, *flags)
    assert ended.code == 0 and "from run optuna_st_0 (final_val_f1 0.9)" in ended.out
    assert "3 run(s) of an earlier program, such as optuna_st_0" in ended.err and "left out: gone" in ended.err
    for path in (tmp_path / "suggested_configs").iterdir():
        config = config_from_dict(json.loads(path.read_text()))
        assert (config.model_type, config.dataset_params["seq_len"], config.epochs) == ("moe", 12, 3)
    assert command(suggest_configs.main, *flags, "--strategy", "tpe").code == 0


def test_a_study_learns_from_the_trials(tmp_path: Path) -> None:
    make(
        Path(DB_FILE),
        [trial_row("moe", embed_dim=32, lr=1e-3, weight_decay=1e-3, use_grad_clip=True, grad_clip_norm=1.0)],
    )
    given = {"dataset_name": "parity", "model_types": ["moe"], "epochs": 3, "batch_size": 16, "syn_seq_len": 12}
    sets = ["optimizer_params.name=sgd", "optimizer_params.aux_loss_coeff=0.05"]
    queue = TrialQueue(study_options(Namespace(**given, set=sets, storage=str(tmp_path / "s.db"))))
    try:
        add_past_runs(queue)
        (trial,) = queue.stored.trials()
    finally:
        queue.close()
    assert trial.user_attrs["warm_start"] == "optuna_st_0" and trial.values == [0.9]
    assert trial.params["optimizer_params.lr"] == 1e-3 and trial.params["moe.num_experts"] == 4


def test_numbers_in_a_text_column_become_numbers(tmp_path: Path) -> None:
    tables = TABLES.replace("metric_value REAL", "metric_value TEXT, note TEXT DEFAULT 'kept'")
    make(Path(DB_FILE), [trial_row("moe"), trial_row("dense", number=1)], tables)
    with results(tmp_path) as store:
        assert store.metrics("optuna_st_0") == {"final_val_f1": 0.9, "param_count": 123.0, "usage": [10.0, 5.0, 8.0]}
        assert [row.metrics for row in store.runs("parity", ["final_val_f1"])] == [
            {"final_val_f1": 0.9},
            {"final_val_f1": 0.85},
        ]
    with sqlite3.connect(DB_FILE) as connection:
        assert connection.execute("SELECT DISTINCT note FROM metrics").fetchall() == [("kept",)]
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'idx_metric_name'").fetchone()
        connection.execute("DELETE FROM experiments")  # the foreign key is still that of the original
    connection.close()


def test_the_last_of_two_equal_metrics_counts(tmp_path: Path) -> None:
    """The original added the metrics of a run again if it was logged again."""
    make(Path(DB_FILE), [trial_row("moe")])
    with sqlite3.connect(DB_FILE) as connection:
        connection.execute("INSERT INTO metrics VALUES (NULL, 'optuna_st_0', 'final_val_f1', 0.25)")
    connection.close()
    with results(tmp_path) as store:
        assert store.runs("parity", ["final_val_f1"])[0].metrics == {"final_val_f1": 0.25}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            TABLES.replace("dataset_type TEXT NOT NULL,", ""),
            "its table 'experiments' belongs to another program (it has no dataset_type)",
        ),
        (
            TABLES.replace("metric_name TEXT NOT NULL,", "").replace("(metric_name)", "(experiment_id)"),
            "its table 'metrics' belongs to another program (it has no metric_name)",
        ),
        (TABLES + "CREATE TABLE history (a);", "its table 'history' belongs to another program"),
        ("CREATE TABLE customers (a);", "it has a table 'customers'"),
    ],
)
def test_tables_of_another_kind_are_left_alone(tables: str, message: str, tmp_path: Path) -> None:
    with sqlite3.connect(DB_FILE) as connection:
        connection.executescript(tables)
    connection.close()
    before = Path(DB_FILE).read_bytes()
    for ended in (command(cli, "runs"), command(init_db.main)):
        assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert Path(DB_FILE).read_bytes() == before and not list(tmp_path.glob("*backup*"))


def test_unknown_tables_beside_the_two_stay(tmp_path: Path) -> None:
    make(Path(DB_FILE), [trial_row("moe")], TABLES + "CREATE TABLE notes (a); INSERT INTO notes VALUES (1);")
    assert command(cli, "runs").code == 0
    with sqlite3.connect(DB_FILE) as connection:
        assert connection.execute("SELECT a FROM notes").fetchall() == [(1,)]
    connection.close()


@pytest.mark.parametrize("where", ["copy_database", "locked"])
def test_a_file_that_cannot_be_written_is_one_message(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", DB_FILE)

    make(Path(DB_FILE), [trial_row("moe")])
    before = contents(Path(DB_FILE))
    monkeypatch.setattr(migrate, where, refuse)
    ended = command(cli, "runs")
    assert ended.code == 2 and "failed: Read-only file system. Nothing was changed. Copy it" in ended.err
    assert len(ended.err.splitlines()) == 1 and contents(Path(DB_FILE)) == before
    with pytest.raises(ConfigError, match="Read-only file system"):
        Store(read_only=True)

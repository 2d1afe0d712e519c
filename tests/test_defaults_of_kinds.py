"""Options of a model that have another default for text, and the runs that are older than such an option."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest

from research_eval.config.check import config_from_dict, parse_config, stored_config
from research_eval.config.defaults import stored_forms
from research_eval.db_utils import DB_FILE, Store
from research_eval.main import cli
from research_eval.store.values import canonical_json
from tests.support import command, results, run_in, small_settings

NAME = "expert_sharing"


def text_settings(data: Path | str = "data", model_type: str = "goe_original", **options: Any) -> dict[str, Any]:
    return small_settings(
        model_type=model_type,
        dataset_type="real_world",
        dataset_name="mine",
        dataset_params={"data_dir": str(data), "max_length": 8},
        model_params={"embed_dim": 8, "num_heads": 2, **options},
        epochs=1,
    )


def write_data(folder: Path) -> None:
    rows = [f"{word},{label}" for word, label in zip("abcdefgh" * 4, [0, 1] * 16, strict=True)]
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")


@pytest.mark.parametrize("read", [config_from_dict, lambda settings: parse_config(json.dumps(settings), "file")])
def test_experts_share_gradients_on_text_unless_the_config_says_otherwise(read: Any) -> None:
    assert read(text_settings()).model_params[NAME] == 0.5
    for given in (0.0, 0.25):
        assert read(text_settings(expert_sharing=given)).to_dict()["model_params"][NAME] == given
    assert NAME not in read(text_settings(model_type="dense")).model_params
    generated = small_settings(model_type="goe_original", model_params={})
    assert NAME not in read(generated).model_params


def test_a_config_reads_back_as_it_was_stored() -> None:
    for options in ({}, {NAME: 0.0}, {NAME: 0.25}):
        config = config_from_dict(text_settings(**options))
        for read in (config_from_dict(config.to_dict()), stored_config(config.to_dict(), "run")):
            assert read == config


def test_a_stored_config_without_the_option_is_older_than_the_option() -> None:
    newer = config_from_dict(text_settings(expert_sharing=0.0)).to_dict()
    older = json.loads(json.dumps(newer))
    del older["model_params"][NAME]
    assert stored_config(older, "run").to_dict() == newer
    assert stored_forms(newer) == [newer, older]
    other = config_from_dict(text_settings()).to_dict()
    assert stored_forms(other) == [other]


def test_only_a_run_that_computed_the_same_is_resumed(tmp_path: Path) -> None:
    """A run without the option is resumed by a config that turns it off, and not by one that leaves it out."""
    write_data(tmp_path)
    off = config_from_dict(text_settings(tmp_path, expert_sharing=0.0))
    first = run_in(tmp_path, off).experiment_id
    with results(tmp_path) as store:
        config = json.loads(store.experiment(first)["full_config_json"])
    del config["model_params"][NAME]
    with sqlite3.connect(tmp_path / DB_FILE) as database:
        database.execute("update experiments set full_config_json = ?", (canonical_json(config),))
    assert run_in(tmp_path, off, resume=True).experiment_id == first
    assert run_in(tmp_path, config_from_dict(text_settings(tmp_path)), resume=True).experiment_id != first


def test_a_study_keeps_the_default_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    space = {"model_params": {"embed_dim": 8, "num_heads": 2}, "batch_size": 16}
    Path("space.json").write_text(json.dumps(space))
    options = {"study_name": "s", "storage": "sqlite:///s.db", "model_types": "goe_original", "epochs": 1}
    options |= {"dataset_type": "real_world", "dataset_name": "mine", "data_dir": ".", "search_space": "space.json"}
    line = ["tune", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    assert command(cli, *line, "--n_trials", "1").code == 0
    assert sharing_of_runs() == [0.5]

    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    settings = study.user_attrs["settings"]
    del settings["fixed"]["goe_original"][NAME]  # as a program without the option stored it
    study.set_user_attr("settings", settings)
    refused = command(cli, *line, "--n_trials", "2")
    assert refused.code == 2
    assert '"expert_sharing": 0.0' in refused.err
    continued = command(cli, *line, "--n_trials", "2", "--set", "model_params.expert_sharing=0.0")
    assert continued.code == 0, continued.err
    assert sharing_of_runs() == [0.0, 0.5]


def sharing_of_runs() -> list[float]:
    with Store(DB_FILE, read_only=True) as store:
        configs = [json.loads(row["full_config_json"]) for row in store.experiments()]
    return sorted(config["model_params"][NAME] for config in configs)

"""Every alarm fires where its rule says, and nowhere else. The sick configs set off their own."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, history, run_in

from research_eval.routing.alarms import RULES, SCORE, STILL_LEARNING, Circumstances, find_alarms
from research_eval.schema import config_from_dict, load_config

SICK = sorted((ROOT / "examples" / "sick").glob("*.json"))
EPOCHS = 8
HALTING = Circumstances(EPOCHS, halting=True)
HEALTHY = {
    "expert_load": [[0.3, 0.2, 0.3, 0.2]],
    "dead_experts": 0,
    "expert_load_cv": 0.2,
    "router_entropy": 0.5,
    "path_length_histogram": [0, 1600, 1200, 1200],
    "logits_at_limit_share": 0.2,
    "training_mode_gap": -0.01,
    "router_change": 0.4,
    "expert_similarity": 0.01,
}
# What makes a healthy report sick, the value of the alarm, and the first epoch of eight in which it may fire.
ILLNESSES: list[tuple[str, dict[str, Any], float, int]] = [
    ("dead_experts", {"dead_experts": 2}, 2, 5),
    ("load_imbalance", {"expert_load_cv": math.sqrt(3)}, 1, 5),
    ("entropy_low", {"router_entropy": 0.01}, 0.01, 2),
    ("entropy_high", {"router_entropy": 0.99}, 0.99, 5),
    ("path_length_stuck", {"path_length_histogram": [0, 100, 0, 0]}, 1, 7),
    ("path_length_stuck", {"path_length_histogram": [1, 0, 0, 99]}, 0.99, 7),
    ("logits_at_limit", {"logits_at_limit_share": 0.6}, 0.6, 2),
    ("mode_gap", {"training_mode_gap": -0.1}, 0.1 - 1 / math.sqrt(1000), 5),
    ("router_frozen", {"router_change": 0.0}, 0, 2),
    ("experts_alike", {"expert_similarity": 1.0}, 1, 2),
]


def names(reports: list[dict[str, Any]], circumstances: Circumstances = HALTING) -> list[str]:
    return [alarm.name for alarm in find_alarms(reports, circumstances)]


def test_a_healthy_run_has_no_alarms() -> None:
    assert names([HEALTHY] * EPOCHS) == []
    assert {name for name, *_ in ILLNESSES} == {rule.name for rule in RULES}, "every rule is tested below"


@pytest.mark.parametrize(("name", "changes", "value", "first"), ILLNESSES)
def test_an_illness_sets_off_its_alarm_once_it_has_lasted(
    name: str, changes: dict[str, Any], value: float, first: int
) -> None:
    sick = HEALTHY | changes
    (alarm,) = find_alarms([sick] * EPOCHS, HALTING)
    assert (alarm.name, alarm.epoch, alarm.value) == (name, first, pytest.approx(value))
    assert names([sick] * (first - 1)) == []
    assert names([sick] * first + [HEALTHY] * (EPOCHS - first)) == [name], "an alarm that fired stays in the record"
    swings = [sick if epoch % 2 else HEALTHY for epoch in range(EPOCHS)]
    assert names(swings) == [], "one epoch alone may be a swing"
    late = [HEALTHY] * (EPOCHS - 2) + [sick] * 2
    assert [alarm.epoch for alarm in find_alarms(late, HALTING)] == [EPOCHS]


def test_only_what_a_run_is_meant_to_do_can_go_wrong() -> None:
    for name, changes, *_ in ILLNESSES:
        sick = [HEALTHY | changes] * EPOCHS
        fixed = names(sick, Circumstances(EPOCHS, halting=True, learned_route=False))
        assert fixed == ([] if name in ("entropy_low", "entropy_high", "router_frozen") else [name])
        without_halting = names(sick, Circumstances(EPOCHS))
        assert without_halting == ([] if name == "path_length_stuck" else [name])
        alone = names([report | {"expert_load": [[1.0]]} for report in sick])
        assert alone == ([name] if name in ("path_length_stuck", "mode_gap") else [])
        (missing,) = changes
        assert names([{key: value for key, value in HEALTHY.items() if key != missing}] * EPOCHS) == []
    assert names([{}] * EPOCHS) == []


def test_a_length_in_between_or_the_only_possible_one_is_not_stuck() -> None:
    for counts in ([0, 0, 100, 0], [0, 100], [50, 0, 0, 50], [0, 98, 2, 0]):
        assert names([HEALTHY | {"path_length_histogram": counts}] * EPOCHS) == []


def test_a_gap_that_few_samples_show_by_chance_is_none() -> None:
    few = HEALTHY | {"path_length_histogram": [0, 10, 8, 6], "training_mode_gap": 0.2}
    assert names([few] * EPOCHS) == []
    assert names([few | {"training_mode_gap": 0.3}] * EPOCHS) == ["mode_gap"]


RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.72]


@pytest.mark.parametrize(
    ("scores", "gain"),
    [
        (RISING, 0.12),
        ([0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.65, 0.72], 0.02),
        ([0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.65, 0.71], None),  # too little
        ([0.5, 0.9, 0.6, 0.6, 0.6, 0.7, 0.8, 0.85], None),  # not better than before
        ([-0.9, -0.8, -0.7, -0.6, -0.5, -0.5, -0.5, -0.4], 0.2),  # an error that is to be small: relative
        ([-900, -800, -700, -600, -500, -500, -500, -495], None),
        (RISING[:7], None),  # stopped early
        (RISING[3:], None),  # an earlier version did not keep the first scores
    ],
)
def test_a_score_that_rises_in_the_last_quarter_is_said_for_every_model(
    scores: list[float], gain: float | None
) -> None:
    for others in ({}, HEALTHY):
        found = find_alarms([others | {SCORE: score} for score in scores], Circumstances(EPOCHS))
        assert [(alarm.name, alarm.epoch) for alarm in found] == ([] if gain is None else [(STILL_LEARNING, EPOCHS)])
        assert [alarm.value for alarm in found] == ([] if gain is None else [pytest.approx(gain)])


def test_fewer_than_four_epochs_have_no_last_quarter() -> None:
    for epochs in range(1, 6):
        found = find_alarms([{SCORE: score} for score in RISING[:epochs]], Circumstances(epochs))
        assert len(found) == (epochs >= 4)


def test_a_dense_model_that_still_learns_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(ROOT / "examples" / "configs" / "quickstart.json", {"epochs": 4}).to_dict()
    config |= {"model_type": "dense", "model_params": {"embed_dim": 32, "num_heads": 2}}
    config["dataset_params"] = {"num_samples": 4000, "num_tables": 1}
    with caplog.at_level(logging.WARNING):
        result = run_in(tmp_path, config_from_dict(config))
    (alarm,) = result.metrics["alarms"]
    curve = [value for _, name, value in history(tmp_path, result.experiment_id) if name == "val_f1"]
    assert alarm["name"] == STILL_LEARNING
    assert alarm["value"] == pytest.approx(curve[3] - max(curve[:3]))
    assert any(record.message.startswith("still_learning in epoch 4") for record in caplog.records)
    assert SCORE not in result.metrics


def test_circumstances_are_those_of_the_config() -> None:
    assert Circumstances.of(3, {}) == Circumstances(3, halting=False, learned_route=True)
    assert Circumstances.of(3, {"halt": "ponder", "route": "hash"}) == Circumstances(3, True, False)
    assert Circumstances.of(3, {"halt": "off", "route": "learned"}) == Circumstances(3, False, True)


def test_every_alarm_has_its_section_on_the_page() -> None:
    page = (ROOT / "docs" / "collapse.md").read_text()
    headings = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert headings == [*(rule.name for rule in RULES), STILL_LEARNING]
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        assert all(f"**{part}.**" in section for part in ("Signature", "Why", "Cure")), section
    table = {match[0]: match[1] for match in re.findall(r"^\| `(\w+)` \|(.*)", page, re.MULTILINE)}
    assert list(table) == headings
    for rule in RULES:
        threshold = f"{rule.threshold:.6f}".rstrip("0").rstrip(".")
        assert threshold in table[rule.name] or f"{rule.threshold:.0%}".replace("%", " %") in table[rule.name]
    for rule in RULES:
        (alarm,) = {a.name: a for a in find_alarms([_sick(rule.name)] * EPOCHS, HALTING)}.values()
        file, anchor = alarm.link.split("#")
        assert (ROOT / file).exists()
        assert anchor in headings
        assert str(alarm).startswith(f"{rule.name} in epoch {alarm.epoch} (")


def _sick(name: str) -> dict[str, Any]:
    return HEALTHY | next(changes for other, changes, *_ in ILLNESSES if other == name)


@pytest.mark.parametrize("path", SICK, ids=lambda path: path.stem)
def test_a_sick_config_sets_off_its_own_alarm(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The alarm that the file names is on the screen, in the metrics and in the history."""
    expected = re.search(r"Expected alarm: (\w+)", path.read_text())
    assert expected is not None
    with caplog.at_level(logging.WARNING):
        result = run_in(tmp_path, load_config(path))
    alarms = {alarm["name"]: alarm for alarm in result.metrics["alarms"]}
    assert expected[1] in alarms
    assert result.metrics["num_alarms"] == len(result.metrics["alarms"])
    assert json.loads(json.dumps(result.metrics["alarms"])) == result.metrics["alarms"]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split()[0] for message in warnings] == list(alarms)
    points = {name: value for _, name, value in history(tmp_path, result.experiment_id) if name.startswith("alarm_")}
    assert points == {f"alarm_{name}": alarm["value"] for name, alarm in alarms.items()}


def test_five_illnesses_are_on_show() -> None:
    shown = {re.search(r"Expected alarm: (\w+)", path.read_text())[1] for path in SICK}  # type: ignore[index]
    assert shown == {"entropy_high", "entropy_low", "router_frozen", "experts_alike", "load_imbalance"}
    page = (ROOT / "docs" / "collapse.md").read_text()
    assert all(f"examples/sick/{path.name}" in page for path in SICK)


def test_the_quickstart_sets_off_no_sign_of_collapse(tmp_path: Path) -> None:
    """A third of the epochs, of half as many samples."""
    text = (ROOT / "examples" / "configs" / "quickstart.json").read_text()
    shorter = text.replace('"epochs": 12', '"epochs": 4').replace("12000", "6000")
    assert shorter.count("6000") == shorter.count('"epochs": 4') == 1
    (tmp_path / "config.json").write_text(shorter)
    result = run_in(tmp_path, load_config(tmp_path / "config.json"))
    assert [alarm["name"] for alarm in result.metrics["alarms"]] == [STILL_LEARNING], "a third of the epochs is too few"

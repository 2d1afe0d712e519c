"""Curating results: what is archived, deleted, tagged or noted is never lost, and a list has what it should have."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import filelock
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import run_in, small_config, stop_at
from test_analyze_results import Lab, lab  # noqa: F401 - a fixture
from test_db_utils import db, raw, start  # noqa: F401 - fixtures
from test_store_tools import fill, goe, listed, record

from research_eval.analysis.runs import load_results
from research_eval.cli.filters import filter_of
from research_eval.db_utils import DB_FILE, HistoryRow, Store, canonical_json, database_url
from research_eval.errors import ConfigError
from research_eval.experiment import TrialRun, run
from research_eval.store.find import find_run, parse_tag, parse_time
from research_eval.store.merge import merge
from research_eval.store.records import ALL, RunFilter
from research_eval.store.tables import CURATION
from research_eval.store.trash import TRASH_FOLDER, delete, restore

START = datetime(2026, 3, 1, tzinfo=UTC)
IDS = ["run-a", "run-b"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def make(*ids: str, **changes: Any) -> None:
    """Finished runs with metrics, points and folders."""
    fill(DB_FILE, *(record(name, {"final_val_f1": 0.5, "usage": [0.5, 1.0]}, **changes) for name in ids))
    with Store() as store:
        for name in ids:
            store.add_history(name, [HistoryRow(step, step / 2, "val_f1", step / 3) for step in range(3)])
            folder = Path("runs", name)
            (folder / "routing").mkdir(parents=True)
            (folder / ".lock").touch()
            (folder / "weights").write_bytes(name.encode() * 3)
            (folder / "routing" / "epoch.parquet").write_bytes(b"\x00\xff")
            (folder / "link").symlink_to("weights")


def folders() -> dict[str, bytes]:
    """Every file below runs/ with its content."""
    return {str(path): path.read_bytes() for path in sorted(Path("runs").rglob("*")) if path.is_file()}


def held(store: Store, *, curation: bool = True) -> str:
    """All that the store holds of the runs; text, in which NaN equals NaN."""
    records = store.records(IDS)
    if not curation:
        records = {
            key: one._replace(
                experiment={name: value for name, value in one.experiment.items() if name not in CURATION}
            )
            for key, one in records.items()
        }
    return repr(sorted(records.items()))


# --------------------------------------------------------------------------------------------------------- round trips

steps = st.tuples(
    st.sampled_from(IDS),
    st.sampled_from(["tag", "untag", "note", "archive", "delete", "restore"]),
    st.sampled_from(["paper", "a.b", "x"]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=6))
def test_whatever_is_said_about_runs_in_any_order_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, str, str]]
) -> None:
    """A model of what is said follows; two restores of each run bring back every row and every byte."""
    base = tmp_path_factory.getbasetemp() / "two runs"
    if not base.exists():
        base.mkdir()
        with contextlib.chdir(base):
            make(*IDS)
    with contextlib.chdir(shutil.copytree(base, tmp_path_factory.mktemp("round") / "copy", symlinks=True)):
        with Store() as store:
            before, files = held(store, curation=False), folders()
        tags: dict[str, set[str]] = {name: set() for name in IDS}
        notes: dict[str, str | None] = dict.fromkeys(IDS)
        hidden: dict[str, set[str]] = {name: set() for name in IDS}
        for name, verb, word in asked:
            words = {"tag": [word], "untag": [word, "--remove"], "note": [word], "delete": ["--yes"]}.get(verb, [])
            ended = goe("runs", verb.removeprefix("un"), name, *words)
            possible = bool(hidden[name]) if verb == "restore" else "delete" not in hidden[name]
            assert ended.code == (0 if possible else 2), ended.err
            if not possible:
                continue
            if verb == "tag":
                tags[name].add(word)
            elif verb == "untag":
                tags[name].discard(word)
            elif verb == "note":
                notes[name] = word
            elif verb == "restore":
                hidden[name].discard("delete" if "delete" in hidden[name] else "archive")
            else:
                hidden[name].add(verb)
            with Store(read_only=True) as store:
                active = {row["experiment_id"] for row in store.find_runs()}
                assert active == {key for key, ways in hidden.items() if not ways}
                assert held(store, curation=False) == before
            for key, ways in hidden.items():
                assert (TRASH_FOLDER / key).is_dir() == ("delete" in ways) != Path("runs", key).is_dir()
        with Store(read_only=True) as store:
            rows = {row["experiment_id"]: row for row in store.find_runs(RunFilter(view=ALL))}
        assert {key: set(json.loads(row["tags"] or "[]")) for key, row in rows.items()} == tags
        assert {key: row["note"] for key, row in rows.items()} == notes
        for name, ways in hidden.items():
            for _ in ways:
                assert goe("runs", "restore", name).code == 0
        with Store(read_only=True) as store:
            assert held(store, curation=False) == before and store.count_runs() == 2
        assert folders() == files


def test_curating_does_not_touch_the_heartbeat_that_merging_compares() -> None:
    make(*IDS)
    with Store(read_only=True) as store:
        before = held(store, curation=False)
    for words in (["tag", "run-a", "x"], ["note", "run-a", "text"], ["archive", "run-a"], ["delete", "run-b", "--yes"]):
        assert goe("runs", *words).code == 0
    with Store(read_only=True) as store:
        assert held(store, curation=False) == before


@pytest.mark.parametrize("where", ["before the folder is moved", "after the folder is moved back"])
def test_a_crash_between_row_and_folder_is_mended_by_restore(where: str) -> None:
    make(*IDS)
    files = folders()
    with Store() as store:
        if where == "before the folder is moved":
            store.curate(["run-a"], deleted_at=START)
        else:
            delete(store, store.experiment("run-a"))
            (TRASH_FOLDER / "run-a").rename("runs/run-a")
        restore(store, find_run(store, "run-a", "deleted"))
        assert store.count_runs() == 2
    assert {name: content for name, content in folders().items() if name in files} == files


def test_a_folder_that_cannot_be_moved_leaves_the_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    make(*IDS)
    before = folders()

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    ended = goe("runs", "delete", "run-a", "--yes")
    assert (ended.code, "Permission denied" in ended.err) == (1, True)
    assert folders() == before and len(listed()) == 2


# ------------------------------------------------------------------------------------------------------------- delete


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "code", "left"), [("y\n", 0, 1), ("YES\n", 0, 1), ("n\n", 1, 2), ("\n", 1, 2), ("", 1, 2)]
)
def test_delete_asks(answer: str, code: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make(*IDS)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ended = goe("runs", "delete", "run-a")
    assert (ended.code, len(listed())) == (code, left)
    assert "run-a  finished  a name\nMove 1 run (0.0 MB) to the trash? [y/N] " in ended.err


def test_without_a_terminal_nothing_is_deleted_unless_yes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    make(*IDS)
    before = folders()
    for words in (["delete", "run-a"], ["delete", "--purge"]):
        if "--purge" in words:
            assert goe("runs", "delete", "run-b", "--yes").code == 0
            before = folders()
        for stdin in (io.StringIO("y\n"), None):
            monkeypatch.setattr(sys, "stdin", stdin)
            ended = goe("runs", *words)
            assert (ended.code, "Give --yes" in ended.err) == (2, True)
        assert folders() == before


def test_a_run_at_work_cannot_be_deleted_and_no_other_one_is() -> None:
    make(*IDS)
    before = folders()
    with filelock.FileLock("runs/run-b/.lock"):
        ended = goe("runs", "delete", "run-b", "--yes")
        assert (ended.code, "a process works in its folder: stop it first" in ended.err) == (2, True)
        with Store() as store, store._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE experiments SET status = 'running' WHERE experiment_id = 'run-b'")
        ended = goe("runs", "delete", "run-a", "run-b", "--yes")
        assert (ended.code, "run run-b is running: stop it first" in ended.err) == (2, True)
    assert folders() == before and len(listed()) == 2
    with Store() as store:
        store.set_status("run-b", "failed")
    assert goe("runs", "delete", "--yes", "run-b").code == 0, "the flag may stand before the run"
    (row,) = listed("--deleted")
    assert (row["experiment_id"], row["status"]) == ("run-b", "failed")


def test_purge_takes_deleted_runs_only_and_leaves_nothing_of_them() -> None:
    make("run-a", "run-b", "run-c")
    ended = goe("runs", "delete", "run-c", "--purge", "--yes")
    assert (ended.code, "run run-c is not in the trash" in ended.err) == (2, True)
    assert goe("runs", "delete", "run-a", "run-b", "--yes").code == 0
    assert goe("runs", "delete", "--purge", "--yes", "run-a").code == 0
    assert [row["experiment_id"] for row in listed("--deleted")] == ["run-b"]
    assert goe("runs", "delete", "--purge", "--yes").code == 0
    for table in ("experiments", "metrics", "history", "history_runs"):
        assert {row[0] for row in raw(DB_FILE, f"SELECT experiment_id FROM {table}")} == {"run-c"}
    assert {Path(name).parts[1] for name in folders()} == {"run-c"}
    assert goe("doctor").code == 0


def test_the_doctor_weighs_the_trash_and_complains_about_nothing() -> None:
    make(*IDS)
    assert "ok        trash: empty" in goe("doctor").out
    Path("runs/run-a/big").write_bytes(bytes(2_000_000))
    assert goe("runs", "delete", "run-a", "--yes").code == 0
    found = goe("doctor")
    assert "ok        trash: 1 deleted run, 2.0 MB in runs/.trash/." in found.out
    assert "ok        folders: each of 1 runs has its own" in found.out
    assert found.code == 0 and "problem" not in found.out


# ----------------------------------------------------------------------------------------------- resume and studies


def test_resume_never_continues_a_deleted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(training_params={"checkpoint_every": 1})
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        stopped = run_in(tmp_path, config)
    assert stopped.status == "interrupted"
    assert goe("runs", "delete", "latest", "--yes").code == 0
    again = run_in(tmp_path, config, resume=True)
    assert again.status == "finished" and again.experiment_id != stopped.experiment_id
    assert goe("runs", "delete", "latest", "--yes").code == 0
    third = run_in(tmp_path, config, resume=True)
    assert third.experiment_id not in (stopped.experiment_id, again.experiment_id), "nor is its result reported"
    assert goe("runs", "archive", "latest").code == 0
    assert run_in(tmp_path, config, resume=True).experiment_id == third.experiment_id, "an archived run is kept"


def test_the_deleted_run_of_a_trial_is_not_continued_until_it_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training_params={"checkpoint_every": 1})
    trial = TrialRun("study", 0, "trial-run", lambda epoch, scores: None)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run(config, quiet=True, trial=trial).status == "interrupted"
    ended = goe("runs", "delete", "trial-run", "--yes")
    assert "1 of a study: the study keeps the scores of these trials" in ended.out
    with pytest.raises(ConfigError, match="run trial-run was deleted: `goe runs restore trial-run`"):
        run(config, quiet=True, trial=trial)
    assert not Path("runs/trial-run").exists()
    assert goe("runs", "restore", "trial-run").code == 0
    assert run(config, quiet=True, trial=trial).status == "finished"


def test_a_study_whose_runs_are_deleted_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_eval.analysis.study_plots.draw_study", lambda charts, folder: [])
    flags = "tune --study_name s --storage sqlite:///s.db --dataset_name parity --epochs 1 --batch_size 32 --quiet"
    flags += " --dataset_type synthetic --syn_num_samples 60 --syn_seq_len 4 --model_types lstm --n_trials"
    assert goe(*flags.split(), "1").code == 0
    (first,) = listed()
    assert goe("runs", "delete", "latest", "--yes").code == 0
    ended = goe(*flags.split(), "2")
    assert ended.code == 0, ended.err
    rows = Path("optuna_study_s_synthetic_parity_full_results.csv").read_text()
    assert rows.count("COMPLETE") == 2 and first["experiment_id"] in rows


# ------------------------------------------------------------------------------------------------------------ filters


def test_one_set_of_flags_chooses_the_same_runs_for_every_command(lab: Lab) -> None:  # noqa: F811
    """`goe runs`, the analysis and the suggestions, for flags of every kind."""
    ids = [
        lab.add(seed / 10, seed=seed, experiment_name=f"{'pilot' if seed < 2 else 'main'} {seed}") for seed in range(4)
    ]
    wide = lab.add(0.9, model_params={"embed_dim": 16}, experiment_name="wide")
    every = {*ids, wide}
    lab.store.change_tags([ids[0], wide], add=["paper"])
    lab.store.curate([ids[3]], archived_at=START)
    chosen = {
        "--name pilot*": {*ids[:2]},
        "--name pilot*0": {ids[0]},
        "--tag paper": {ids[0], wide},
        "--tag paper --tag other": set(),
        "--where model_params.embed_dim=16": {wide},
        "--where model_params.embed_dim<16": {*ids[:3]},
        "--where seed!=0": {*ids[1:3]},
        "--where model_type=moe": set(),
        "--where final_val_f1>0.05 --where epochs=2": {ids[1], ids[2], wide},
        f"--exclude {wide}": {*ids[:3]},
        "--exclude name=pilot* --exclude tag=paper": {ids[2]},
        "--exclude final_val_f1>0.05": {ids[0]},
        "--exclude model_params.embed_dim=16 --exclude status=failed": {*ids[:3]},
        "--since 1h": every - {ids[3]},
        "--until 1h": set(),
        "--study s": set(),
    }
    for flags, expected in chosen.items():
        rows = listed("--limit", "0", *flags.split())
        assert {row["experiment_id"] for row in rows} == expected, flags
        done = lab.analyze(*flags.split())
        assert (done.code == 0) == bool(expected), done.err
        if expected:
            assert f"Only runs that were chosen by {flags.split()[0]} " in done.out
            groups = load_results(lab.store, "parity", (), _wanted(lab.store, flags)).groups
            assert {one.experiment_id for group in groups for one in group.runs} == expected
        suggested = goe("suggest", "--dataset_name", "parity", "--model_type", "dense", *flags.split())
        assert (suggested.code == 0) == bool(expected), suggested.err
        assert set(re.findall("from run (run-[0-9]+)", suggested.out)) <= expected


def _wanted(store: Store, flags: str) -> RunFilter:
    from argparse import ArgumentParser

    from research_eval.cli.filters import add_filters

    parser = ArgumentParser()
    add_filters(parser)
    return filter_of(parser.parse_args(flags.split()), store)


def test_an_archived_run_is_no_start_and_no_candidate_but_is_known(lab: Lab) -> None:  # noqa: F811
    """It leaves the tables, the list of datasets and the default metric; it does not become new."""
    kept, best = lab.add(0.5), lab.add(0.9, optimizer_params={"lr": 0.123})
    lab.add(0.9, dataset="other", metrics={"final_val_f1": 0.9})
    with Store(read_only=True) as store:
        other = next(row["experiment_id"] for row in store.find_runs(RunFilter("other")))
    assert goe("runs", "archive", best, other).code == 0
    assert lab.analyze().code == 0 and [row["experiment_ids"] for row in lab.rows()] == [kept]
    assert lab.store.dataset_names() == ["parity"]
    assert f"from run {kept}" in (done := goe("suggest", "--dataset_name", "parity", "--model_type", "dense").out)
    assert best not in done
    assert goe("runs", "show", best).code == 0 and find_run(lab.store, "latest")["experiment_id"] == kept
    assert goe("runs", "restore", best).code == 0
    assert lab.analyze().code == 0 and [row["experiment_ids"] for row in lab.rows()] == [best]


def test_names_and_values_that_look_like_sql_are_only_text() -> None:
    config = canonical_json({"model_params": {"positions": 'it\'s "%" OR 1=1'}})
    fill(DB_FILE, record("a", {"f1": 1.0}, experiment_name="%_['\\", full_config_json=config), record("b", {"f1": 2.0}))
    for flags, expected in {
        ("--name", "%_['\\"): ["a"],
        ("--name", "%"): [],
        ("--name", "_*"): [],
        ("--name", "*[*"): ["a"],
        ("--where", 'model_params.positions="it\'s \\"%\\" OR 1"'): [],
        ("--exclude", "name=' OR 1=1 --"): ["a", "b"],
    }.items():
        ended = goe("runs", "--json", *flags)
        assert ended.code == 0, ended.err
        assert sorted(json.loads(line)["experiment_id"] for line in ended.out.splitlines()) == expected, flags


def test_a_time_ago_is_counted_from_now() -> None:
    for text, span in {"12h": timedelta(hours=12), "7d": timedelta(days=7), "2w": timedelta(weeks=2)}.items():
        assert abs(datetime.now(UTC) - span - parse_time(text)) < timedelta(minutes=1)
    for text in ("7", "d", "7m", "-7d", "9999999d", "999999w"):
        with pytest.raises(ConfigError, match="--until: expected a date such as"):
            parse_time(text, "--until")


@given(st.text(max_size=60))
def test_a_tag_needs_no_quotes_anywhere(text: str) -> None:
    try:
        tag = parse_tag(text)
    except ConfigError:
        return
    assert json.dumps(tag) == f'"{text}"' and not set(tag) & set(" ,=<>'\"\\$&|;*?")


# A run 'a' with the metrics final_val_f1 and test_f1; nothing changes.
MISTAKES = {
    "runs tag a": "the last word has to be a tag, and 'a' is run a",
    "runs tag": "expected `tag ID... TAG[,TAG]`",
    "runs tag a b": "the last word has to be a tag, and 'b' is run b",
    "runs tag nobody x": "no experiment 'nobody'",
    "runs tag a x,,y": "goe runs tag: expected at most 50 letters",
    "runs note": "expected `note ID... TEXT`",
    "runs archive": "expected `archive ID...`, or filters such as --name",
    "runs archive a --name x": "--name: `goe runs archive` takes runs or filters, not both",
    "runs archive a --sort f1": "--sort: chooses runs for the list",
    "runs archive a --yes": "--yes: belongs to `goe runs delete`",
    "runs archve a": "Did you mean 'archive'?",
    "runs restore a": "run a is neither archived nor deleted",
    "runs delete --deleted --yes": "has no effect on deleted runs",
    "runs --yes": "--yes: has no effect on `goe runs`",
    "runs --tag ,": "--tag: expected at most 50 letters",
    "runs --exclude nobody": "no experiment 'nobody'",
    "runs --exclude status=done": "--exclude status: unknown 'done'",
    "runs --exclude test_f1>0.5": "--exclude: 'test_f1' is a score of the test split",
    "runs --where model_params.embd_dim=8": "Did you mean 'model_params.embed_dim'?",
    "runs --where final_val_f1=high": "'final_val_f1' is a metric, which is compared with a number",
    "runs --where model_params.embed_dim>wide": "--where: expected a metric or a key of the config",
    "runs --until soon": "--until: expected a date",
    "analyze --dataset_name parity --name nobody": "no run on 'parity' in",
    "suggest --dataset_name parity --model_type dense --tag x": "is left by the filters",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_gets_one_message_and_changes_nothing(words: str) -> None:
    config = canonical_json(small_config().to_dict())
    fill(DB_FILE, *(record(name, {"final_val_f1": 0.5, "test_f1": 0.5}, full_config_json=config) for name in "ab"))
    before, names = raw(DB_FILE, "SELECT * FROM experiments"), sorted(Path().iterdir())
    ended = goe(*words.split())
    assert (ended.code, ended.out) == (2, ""), ended
    assert MISTAKES[words] in ended.err and len(ended.err.splitlines()) == 1
    assert raw(DB_FILE, "SELECT * FROM experiments") == before and sorted(Path().iterdir()) == names


# ----------------------------------------------------------------------------------------------------------- pilot runs


def written(lab: Lab) -> dict[str, str]:  # noqa: F811
    """Everything that the analysis prints and writes as text."""
    done = lab.analyze("--run_summary_table", "--run_comparison", "--run_report", "--list_metrics")
    assert done.code == 0, done.err
    texts = {name: lab.text(name) for name in lab.files() if name.endswith((".csv", ".md", ".tex", ".html"))}
    made = r"Made [^<]*<|\"[0-9a-f-]{36}\""  # the time, and the numbers that plotly draws for its canvases
    return {"screen": done.out, "log": done.err} | {name: re.sub(made, "", text) for name, text in texts.items()}


def test_a_pilot_run_that_was_stopped_changes_one_line(lab: Lab) -> None:  # noqa: F811
    costs = {"param_count": 10.0, "inference_latency_ms_batch": 1.0, "inference_flops_per_sample": 5.0}
    for model in ("dense", "moe"):
        for seed in range(3):
            lab.add(0.5 + seed / 10, model=model, seed=seed, metrics=costs, curve=True)
    before = written(lab)
    other_task = {"num_samples": 40, "seq_len": 4}
    lab.add(status="interrupted", experiment_name="pilot", dataset_params=other_task, curve=True)
    lab.add(status="failed", model="goe", experiment_name="pilot")
    lab.add(status="running", seed=9, experiment_name="pilot")
    after = written(lab)
    assert before.keys() == after.keys()
    line = "Left out: 3 runs without a result (1 failed, 1 interrupted, 1 running), with 1 more seed of the chosen "
    line += "configs."
    for name, text in after.items():
        old, new = before[name].splitlines(), text.splitlines()
        added = [one for one in new if line in one]
        if name == "screen" or ("summary" in name and name.endswith(".md")):
            assert len(added) == 1, name
        if not name.endswith(".html"):
            assert [one for one in new if one not in added] == old, name
        else:
            assert re.sub(r"\s*<[^<>]*>" + re.escape(line) + r"\s*</[^<>]*>", "", text) == before[name]


# ------------------------------------------------------------------------------------------- other stores, old stores


def test_merging_joins_what_is_said_and_leaves_the_trash_behind(db: str) -> None:  # noqa: F811
    fill(
        "theirs.db",
        record("both", {"f1": 0.5}, tags='["a", "b"]', note="theirs"),
        record("hidden", {"f1": 0.5}, tags='["a"]'),
        record("new", {"f1": 0.5}, tags='["n"]', note="new", archived_at=START),
        record("gone", {"f1": 0.5}, deleted_at=START),
        record("later", {"f1": 0.5}, tags='["t"]'),
    )
    fill(
        db,
        record("both", {"f1": 0.5}, tags='["b", "c"]', note="ours"),
        record("hidden", {"f1": 0.5}, deleted_at=START),
        record("later", status="failed", archived_at=START, tags='["o"]'),
    )
    report = merge("theirs.db", db)
    assert (report.copied, report.updated, report.skipped, report.deleted, report.conflicts) == (1, 3, 0, 1, [])
    with Store(db, read_only=True) as store:
        rows = {row["experiment_id"]: row for row in store.find_runs(RunFilter(view=ALL))}
    assert {key: (row["tags"], row["note"], row["archived_at"], row["deleted_at"]) for key, row in rows.items()} == {
        "both": ('["a", "b", "c"]', "ours", None, None),
        "hidden": ('["a"]', None, None, START),
        "new": ('["n"]', "new", START, None),
        "later": ('["o", "t"]', None, START, None),
    }
    assert rows["later"]["status"] == "finished"
    again = merge("theirs.db", db)
    assert (again.copied, again.updated, again.skipped, again.conflicts) == (0, 0, 4, [])


def test_the_fifth_migration_keeps_every_row_and_hides_none(db: str) -> None:  # noqa: F811
    with Store(db) as store:
        for name in IDS:
            start(store, name)
            store.finish_experiment(name, {"f1": 0.5, "usage": [1.0]})
        before = held(store)
    engine = sa.create_engine(database_url(db))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_experiments_hidden")
        for column in CURATION:
            connection.exec_driver_sql(f"ALTER TABLE experiments DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE goe_schema_version SET version_num = '0004'")
    engine.dispose()
    with pytest.raises(ConfigError, match="schema version 0004 is older than"):
        Store(db, read_only=True)
    with Store(db) as store:
        assert held(store) == before and store.count_runs() == 2
        store.change_tags(IDS, add=["x"])
    if not db.startswith("postgresql"):
        (backup,) = Path(db).parent.glob("*.backup-*")
        columns = [row[1] for row in raw(str(backup), "PRAGMA table_info(experiments)")]
        assert not set(columns) & set(CURATION) and len(raw(str(backup), "SELECT * FROM metrics")) == 4


def test_an_export_has_what_is_said_and_chooses_by_it() -> None:
    make(*IDS)
    assert goe("runs", "tag", "run-a", "paper,=1").code == 2, "a formula is no tag"
    assert goe("runs", "tag", "run-a", "paper,v1").code == goe("runs", "note", "run-a", "=1+1").code == 0
    assert goe("export", "out.csv", "--tag", "paper").code == 0
    text = Path("out.csv").read_text()
    assert '"[""paper"", ""v1""]",\'=1+1,' in text and "run-b" not in text

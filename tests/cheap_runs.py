"""Makes runs and studies cheap: in a small one, pictures, latency and the new database take longer than the rest."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.storages._rdb.storage import _VersionManager
from sqlalchemy.engine import Connection

from research_eval.analysis import expert_graph, study_importance, study_plots
from research_eval.store import migrate
from research_eval.training import latency
from research_eval.training.length import Length

_OF_STUDIES = ("draw_history", "draw_importance", "draw_parallel_coordinates", "draw_pareto")
_REAL = {name: getattr(study_plots, name) for name in _OF_STUDIES}
_REAL_GRAPH = expert_graph.draw_expert_graph
_SHUFFLES = study_importance.SHUFFLES
PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAsTjnIgAAAABJRU5ErkJggg==")


def make_runs_cheap(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Blank pictures of the graph of experts and of studies, the fewest repetitions of the latency, quick databases."""
    set_attribute(expert_graph, "draw_expert_graph", blank_picture)
    for name in _OF_STUDIES:
        set_attribute(study_plots, name, blank_picture)
    set_attribute(study_importance, "SHUFFLES", 2)
    set_attribute(latency, "SECONDS", 0.0)
    set_attribute(latency, "FEWEST", 2)
    set_attribute(migrate, "_upgrade", quick_upgrade(migrate._upgrade))
    set_attribute(_VersionManager, "get_head_version", once(_VersionManager.get_head_version))


def once(method: Callable[[Any], str]) -> Callable[[Any], str]:
    """What the method gives at its first call: Optuna reads all its migrations at each opening of a study."""
    given: list[str] = []

    def remembered(self: Any) -> str:
        if not given:
            given.append(method(self))
        return given[0]

    return remembered


def quick_upgrade(upgrade: Callable[[Connection, str], None]) -> Callable[[Connection, str], None]:
    """As the migrations, but an empty SQLite file gets what they have made of the first one in this process."""
    made: list[str] = []

    def quick(connection: Connection, location: str) -> None:
        if connection.dialect.name != "sqlite" or sa.inspect(connection).get_table_names():
            upgrade(connection, location)
        elif made:
            for statement in made:
                connection.exec_driver_sql(statement)
        else:
            upgrade(connection, location)
            made.extend(schema_of(connection))

    return quick


def schema_of(connection: Connection) -> list[str]:
    """The statements that make the tables of a new SQLite file, which has a row only for the version."""
    listed = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
    (version,) = connection.exec_driver_sql(f"SELECT version_num FROM {migrate.VERSION_TABLE}").scalars()
    return [
        *connection.exec_driver_sql(listed).scalars(),
        f"INSERT INTO {migrate.VERSION_TABLE} VALUES ('{version}')",
    ]


def draw_pictures_again(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Undo the blank pictures of `make_runs_cheap`, and the few shuffles behind them."""
    set_attribute(expert_graph, "draw_expert_graph", _REAL_GRAPH)
    draw_studies_again(set_attribute)


def draw_studies_again(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """The same for pictures of studies alone."""
    set_attribute(study_importance, "SHUFFLES", _SHUFFLES)
    for name, draw in _REAL.items():
        set_attribute(study_plots, name, draw)


def make_runs_short(set_attribute: Callable[[Any, str, Any], None], steps: int) -> None:
    """At most so many steps per training and so many evaluations as before."""
    length_of = Length.of

    def shorter(*config_and_data: Any) -> Length:
        whole = length_of(*config_and_data)
        if whole.total <= steps:
            return whole
        period = max(1, steps // whole.evaluations)
        return replace(whole, per_epoch=period, total=period * whole.evaluations, period=period)

    set_attribute(Length, "of", shorter)


def blank_picture(_: Any, path: Path, *title: str) -> None:
    """As the functions that draw the metrics of a run or the charts of a study, with one grey point."""
    path.write_bytes(PIXEL)

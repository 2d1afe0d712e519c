"""How the processes of a pool start."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import research_eval


def process_context(module: str) -> Any:
    """Processes start as copies of a server that has imported `module`, or afresh if copies may hang (macOS)."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    # The server imports what it can find; a script that was started by its path is found by this variable alone.
    paths, root = os.environ.get("PYTHONPATH"), str(Path(research_eval.__file__).parent.parent)
    os.environ["PYTHONPATH"] = root if paths is None else os.pathsep.join([paths, root])
    try:
        forkserver.ensure_running()
    finally:
        if paths is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = paths
    return context

"""How busy other programs keep the machine, for numbers that a clock measures."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

_STATISTICS = Path("/proc/stat")
_LEAST_SECONDS = 0.1  # the operating system counts in steps of 10 ms, so a shorter time tells too little


class LoadMeter:
    """Compares the work of this process with the work of the whole machine, from its construction on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._own_seconds = time.process_time()
        self._thread_seconds = time.thread_time()
        self._all_seconds = _busy_seconds()

    def share(self, computes: bool = True) -> float:
        """The load of other programs so far, from 0 (none) to 1; NaN if the operating system does not tell it.

        It is the larger of two shares: of all cores that other programs used, and of the time for which this thread
        waited for a core. The second is known only if the thread `computes` all the time: it must not wait for a GPU.
        """
        elapsed = time.perf_counter() - self._started
        shares = []
        if computes and elapsed > 0:
            shares.append(1 - (time.thread_time() - self._thread_seconds) / elapsed)
        now = _busy_seconds()
        if now is not None and self._all_seconds is not None and elapsed >= _LEAST_SECONDS:
            own = time.process_time() - self._own_seconds
            shares.append((now - self._all_seconds - own) / (elapsed * (os.cpu_count() or 1)))
        return min(max(0.0, *shares), 1.0) if shares else math.nan


def _busy_seconds() -> float | None:
    """The time that all cores of the machine together have worked since its start; None if it is not known."""
    try:
        name, *ticks = _STATISTICS.read_text().split("\n", 1)[0].split()
        user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, ticks[:8])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + interrupts + soft + stolen
    return busy / os.sysconf("SC_CLK_TCK") if name == "cpu" and busy else None

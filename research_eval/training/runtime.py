"""The device, the precision and the process of a run."""

from __future__ import annotations

import ctypes
import platform
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import numpy as np
import torch

from research_eval.annotations import Precision
from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class Runtime:
    """Device and precision of a run, chosen once at its start.

    Raises ConfigError for a device that this machine does not have.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: Precision = "fp32",
        num_threads: int | None = None,
        keep_memory: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.precision = precision
        # Of the whole process, so every run says it anew.
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if keep_memory:
            keep_freed_memory()

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in bf16 if the precision says so. Parameters and optimiser state stay in fp32."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def seed(self, seed: int, name: str) -> None:
        """Seed the global generators (torch on every device, numpy, Python) for the stream `name`.

        Initial weights and training use different streams, so a change in one does not shift the draws of the other.
        """
        torch.manual_seed(derive_seed(seed, name))
        np.random.seed(derive_seed(seed, name, 1) % 2**32)
        random.seed(derive_seed(seed, name, 2))

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_mb(self) -> float:
        """Largest memory so far in MiB: of the GPU if the run uses one, otherwise of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS reports bytes, Linux KiB.
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` prefers CUDA, then MPS, then the CPU.

    Raises ConfigError for an unknown device or one that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: unknown {name!r}. Use auto, cpu, cuda, cuda:N or mps.") from error
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= count.get(device.type, 0):
        raise ConfigError(f"device: this machine has no {name!r} ({count['cuda']} CUDA devices). Use 'auto' or 'cpu'.")
    return device


def keep_freed_memory() -> None:
    """Let glibc take large blocks from its heap and keep up to 2 GiB of freed memory; elsewhere do nothing.

    By default glibc returns large blocks to the system. Every large tensor then gets new pages, which the system first
    fills with zeros.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class StopRequest:
    """Stores the first SIGINT or SIGTERM. The second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop reads between two steps (main thread only).

    The earlier handlers are restored at the end of the block.
    """
    request, previous = StopRequest(), {}
    try:
        for sign in (signal.SIGINT, signal.SIGTERM):
            previous[sign] = signal.signal(sign, request.receive)
    except ValueError:  # not the main thread: its owner receives the signals
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

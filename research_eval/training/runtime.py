"""The device, the arithmetic and the process a run lives in."""

from __future__ import annotations

import ctypes
import platform
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import numpy as np
import torch

from research_eval.annotations import Kernels
from research_eval.errors import ConfigError
from research_eval.layers.kernels import set_kernels
from research_eval.seeding import derive_seed

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class Runtime:
    """Device and precision of a run, chosen once.

    Raises ConfigError for a device that this machine does not have.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "fp32",
        num_threads: int | None = None,
        kernels: Kernels = "auto",
        keep_memory: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.precision = precision
        set_kernels(kernels)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if keep_memory:
            keep_freed_memory()

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 where asked for; parameters and optimiser stay in fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def seed(self, seed: int, name: str) -> None:
        """Set the global generators (torch on every device, numpy, Python) to the stream `name`."""
        torch.manual_seed(derive_seed(seed, name))
        np.random.seed(derive_seed(seed, name, 1) % 2**32)
        random.seed(derive_seed(seed, name, 2))

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_mb(self) -> float:
        """Largest memory so far in MiB: of the GPU where one is used, of the whole process otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU."""
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
    """Tell glibc to take large blocks from its heap and to keep up to 2 GiB of it; elsewhere nothing happens.

    Otherwise every large tensor is fresh memory whose pages the system fills with zeros first.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waiting = 0
        self.previous: dict[int, Any] = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


_request: StopRequest | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop answers between two steps (main thread only).

    Loops that run side by side share one request, until the last of them has ended.
    """
    global _request
    request = _request or StopRequest()
    if not request.waiting:
        try:
            for sign in (signal.SIGINT, signal.SIGTERM):
                request.previous[sign] = signal.signal(sign, request.receive)
            _request = request
        except ValueError:  # not the main thread: signals go to whoever owns it
            pass
    request.waiting += 1
    try:
        yield request
    finally:
        request.waiting -= 1
        if not request.waiting:
            _request = None if _request is request else _request
            for number, handler in request.previous.items():
                signal.signal(number, handler)

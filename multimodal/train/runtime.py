"""Settings of the training process: malloc, threads, signals."""

import ctypes
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

MALLOC = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


@cache
def keep_freed_memory() -> None:
    """Tell glibc's malloc not to map and unmap each large tensor; does nothing elsewhere.

    A training step frees and asks for the same sizes again. By default every block of more than 32 MB at most is mapped
    anew, and the kernel clears it page by page. Measured in DECISIONS.md. malloc has no way to read its settings, so this
    cannot be undone; settings in the environment are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in MALLOC):
        return
    most_mapped, trim_threshold, grow_by = -4, -1, -2  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    libc = ctypes.CDLL(None)
    for parameter, value in ((most_mapped, 0), (trim_threshold, 2**31 - 1), (grow_by, 2**26)):
        libc.mallopt(parameter, value)


def threads_beside(workers: int) -> int:
    """Threads to compute with while workers prepare data: more threads than unused cores wait for each other at every product."""
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - workers))


@contextmanager
def cores_shared(threads: int) -> Iterator[None]:
    """Computes with this number of threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C and SIGTERM set, so that the current step is finished; a second signal of the same kind stops at
    once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if os.name == "nt":
        numbers.append(signal.SIGBREAK)  # type: ignore[attr-defined]  # launchers send it on Windows
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

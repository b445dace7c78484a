"""Restores the state of the process after a call: random generators, autograd, default dtype, folder, threads, signals."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # how to read it, how to set it


@contextmanager
def preserved_state(*, draws: bool = False) -> Iterator[None]:
    """Restores every setting that changed inside the block, also after an error.

    Outside the main thread only autograd's mode is restored. The other settings belong to the process, in which other threads
    run: from a restored generator they would draw the same numbers twice. draws: restore the generators there too, for a call that
    seeds them itself.
    """
    alone = threading.current_thread() is threading.main_thread()
    settings = list(AUTOGRAD.values())
    if alone or draws:
        settings += _CPU_GENERATORS
        if torch.cuda.is_initialized():
            settings.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        if torch.backends.mps.is_available():
            settings.append((torch.mps.get_rng_state, torch.mps.set_rng_state))
    if alone:
        settings += [*PROCESS.values(), *LIBRARIES.values(), _FILTERS]
        if torch.cuda.is_initialized():
            settings.append((torch.cuda.current_device, torch.cuda.set_device))
    with restored(settings):
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the global generators of random, numpy and torch's CPU."""
    with restored(_CPU_GENERATORS):
        yield


@contextmanager
def restored(settings: Iterable[Setting]) -> Iterator[None]:
    """Restores those of these settings that changed inside the block, also after an error."""
    before = [(read(), read, put) for read, put in settings]
    try:
        yield
    finally:
        for value, read, put in before:
            if not _same(value, read()):
                put(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and any(isinstance(part, (np.ndarray, torch.Tensor)) for part in one):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


AUTOGRAD: dict[str, Setting] = {"autograd (torch.is_grad_enabled)": (torch.is_grad_enabled, torch.set_grad_enabled)}
_CPU_GENERATORS: tuple[Setting, ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return None


PROCESS: dict[str, Setting] = {
    "the current folder": (_folder, lambda folder: folder is None or os.chdir(folder)),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda flags: torch.use_deterministic_algorithms(flags[0], warn_only=flags[1]),
    ),
}
"""Settings of the whole process, by name."""


def _attribute(owner: Any, name: str) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _handler(number: int) -> Setting:
    # None: the handler was not installed from Python, so Python cannot set it again
    return lambda: signal.getsignal(number), lambda value: value is None or signal.signal(number, value)


def _put_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with warnings.catch_warnings():  # makes Python forget its decisions by the old filters
        pass


def _put_handlers(handlers: list[logging.Handler]) -> None:
    logging.root.handlers[:] = handlers


_FILTERS: Setting = (lambda: list(warnings.filters), _put_filters)
LIBRARIES: dict[str, Setting] = {
    **{
        f"torch.backends.cudnn.{n}": _attribute(torch.backends.cudnn, n)
        for n in ("enabled", "benchmark", "deterministic")
    },
    **{f"the handler of {n.name}": _handler(n) for n in (signal.SIGINT, signal.SIGTERM)},
    "sys.excepthook": _attribute(sys, "excepthook"),
    "logging.disable": _attribute(logging.root.manager, "disable"),
    "the level of logging": (lambda: logging.root.level, logging.root.setLevel),
    "the handlers of logging": (lambda: list(logging.root.handlers), _put_handlers),
}
"""Settings of libraries, signals and Python's own, by name; the filters of warnings are apart."""

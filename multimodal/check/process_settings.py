"""Reads, compares and restores settings of the whole process, such as the current folder."""

import locale
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _set_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


def _set_path(before: list[str]) -> None:
    sys.path[:] = before


# name -> how it is read, how it is set
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the current folder": (os.getcwd, os.chdir),
    "autograd (torch.is_grad_enabled)": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (lambda: str(torch.get_default_device()), torch.set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch's matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "numpy's handling of errors": (np.geterr, lambda before: np.seterr(**before)),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL), lambda before: locale.setlocale(locale.LC_ALL, before)),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "environment variables": (lambda: dict(os.environ), _set_environment),
    "sys.path": (lambda: list(sys.path), _set_path),
}
IMPORTS_MAY_CHANGE = ("environment variables", "sys.path", "the recursion limit")  # a library on its first import


def settings() -> dict[str, Any]:
    """The value of every setting in SETTINGS."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def changed(before: dict[str, Any]) -> list[str]:
    """The names of the settings that differ from `before`."""
    return [name for name, now in settings().items() if now != before[name]]


@contextmanager
def kept_settings() -> Iterator[None]:
    """Restores the settings and the filters of warnings."""
    before = settings()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for name in changed(before):
                SETTINGS[name][1](before[name])

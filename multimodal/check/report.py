"""What a check is, how checks are run, and the table of results."""

import gc
import locale
import os
import socket
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile

from multimodal.process_state import AUTOGRAD, LIBRARIES, PROCESS, Setting, preserved_rng, restored
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.tokenizer import Tokenizer, describe

OK, FAILED, SKIPPED, EXPECTED = "ok", "FAILED", "skipped", "expected failure"
in_fresh_process = False  # whether this process was started by `fresh` to encode with an imported class


def _set_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


def _set_path(before: list[str]) -> None:
    sys.path[:] = before


# what a tokenizer could change for the whole process
SETTINGS: dict[str, Setting] = {
    **PROCESS,
    **AUTOGRAD,
    **LIBRARIES,
    "torch's default device": (lambda: str(torch.get_default_device()), torch.set_default_device),
    "numpy's handling of errors": (np.geterr, lambda before: np.seterr(**before)),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL), lambda before: locale.setlocale(locale.LC_ALL, before)),
    "numpy's print options": (np.get_printoptions, lambda before: np.set_printoptions(**before)),
    "garbage collection": (gc.isenabled, lambda before: gc.enable() if before else gc.disable()),
    "the limit of pixels of PIL": (
        lambda: Image.MAX_IMAGE_PIXELS,
        lambda before: setattr(Image, "MAX_IMAGE_PIXELS", before),
    ),
    "PIL's loading of cut pictures": (
        lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
        lambda before: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", before),
    ),
    "the timeout of sockets": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "environment variables": (lambda: dict(os.environ), _set_environment),
    "sys.path": (lambda: list(sys.path), _set_path),
}
IMPORTS_MAY_CHANGE = (  # a library on its first import
    *("environment variables", "sys.path", "the recursion limit", "sys.excepthook"),
    *("the level of logging", "the handlers of logging"),
)


def settings() -> dict[str, Any]:
    """The value of every setting in SETTINGS."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def changed(before: dict[str, Any]) -> list[str]:
    """The names of the settings that differ from `before`."""
    return [name for name, now in settings().items() if now != before[name]]


@contextmanager
def preserved_settings() -> Iterator[None]:
    """Restores SETTINGS and the filters of warnings."""
    with warnings.catch_warnings(), restored(SETTINGS.values()):
        yield


class CheckedAgain(BaseException):
    """Stops the import of a script at its own checks, in a fresh process: all that encoding needs is defined by then."""


class ConformanceError(ValueError):
    """A tokenizer or head breaks the contract; lists every check that failed."""


@dataclass(frozen=True)
class Check:
    """One promise of the contract.

    name: the check's name, as in `expected_failures`.
    says: the promise in one line.
    run: the function that checks it; raises ConformanceError.
    basic: whether all later checks need it.
    """

    name: str
    says: str
    run: Callable[[Any], None]
    basic: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BoundCheck:
    """A check and its subject; calling it raises ConformanceError if it fails, or unittest.SkipTest, which pytest knows too.

    check: the check.
    case: the tokenizer or head with its values.
    reason: why it is expected to fail; empty if it is not.
    """

    check: Check
    case: Any
    reason: str = ""

    def __str__(self) -> str:
        return self.check.name

    def __call__(self) -> None:
        result = self.result()
        if result.status == FAILED:
            raise ConformanceError(f"{result.name}: {result.detail} (promised: {result.says})")
        if result.status != OK:
            raise unittest.SkipTest(f"{result.status}: {result.detail}")

    def result(self) -> "Result":
        if in_fresh_process:
            raise CheckedAgain
        status, detail = OK, ""
        try:
            # every check starts from the same state, whatever an earlier one did
            with preserved_rng(), preserved_settings():
                torch.manual_seed(0)
                self.check.run(self.case)
        except unittest.SkipTest as skip:
            status, detail = SKIPPED, str(skip)
        except ConformanceError as error:
            status, detail = FAILED, str(error)
        except SystemExit as error:
            status, detail = FAILED, f"SystemExit: {error}: it ends the whole program; raise a ValueError"
        except Exception as error:  # a user's code may fail in any way
            status, detail = FAILED, f"{type(error).__name__}: {error}"
        # an expected failure that passes is a failure: the list must not outlive the fault
        if self.reason:
            if status == OK:
                status, detail = (
                    FAILED,
                    f"passes, but is listed in expected_failures ({self.reason}); take it off the list",
                )
            elif status == FAILED:
                status, detail = EXPECTED, self.reason
        return Result(self.check.name, self.check.says, status, detail)


@dataclass(frozen=True)
class Result:
    """The result of one check.

    name: the check's name.
    says: the promise in one line.
    status: "ok", "FAILED", "skipped" or "expected failure".
    detail: why it failed or was skipped.
    """

    name: str
    says: str
    status: str
    detail: str = ""


class Report(list[Result]):
    """The results in order; prints as a table."""

    def __init__(self, who: str, results: Sequence[Result]) -> None:
        super().__init__(results)
        self.who = who

    @property
    def failed(self) -> list[Result]:
        return [result for result in self if result.status == FAILED]

    def __str__(self) -> str:
        width = max(len(result.name) for result in self)
        lines = [
            f"  {r.status:<8} {r.name:<{width}}  {r.says}"
            + (f"\n  {'':<8} {'':<{width}}  {r.detail}" if r.detail else "")
            for r in self
        ]
        counts = {status: sum(r.status == status for r in self) for status in (OK, FAILED, SKIPPED, EXPECTED)}
        shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join([self.who, *lines, f"{len(self)} checks: {shown}"])


def want(condition: Any, problem: str) -> None:
    """Fail this check with `problem` unless the condition holds."""
    if not condition:
        raise ConformanceError(problem)


def promise(checks: list[Check], *, basic: bool = False) -> Callable[[Callable], Callable]:
    """Put a function among checks: its name is the check's name, its docstring what is promised."""

    def put(run: Callable) -> Callable:
        says = " ".join((run.__doc__ or "").split()).rstrip(".")
        checks.append(Check(run.__name__, says, run, basic))
        return run

    return put


def bind(checks: Sequence[Check], case: Any, reasons: Mapping[str, str]) -> list[BoundCheck]:
    names = [check.name for check in checks]
    for name in reasons:
        if name not in names:
            raise ConfigError(
                f"expected_failures: there is no check {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}"
            )
    case.check_given()
    return [BoundCheck(check, case, reasons.get(check.name, "")) for check in checks]


def check_given(tokenizer: Any, values: Sequence[Any]) -> None:
    """Refuse what is no tokenizer, and less than two values."""
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"conformance: {describe(tokenizer)} is not a Tokenizer made by its constructor")
    if len(values) < 2:
        raise ConfigError(f"conformance: {len(values)} values came; give two or more that differ")


def run_checks(who: str, checks: Sequence[BoundCheck], raises: bool) -> Report:
    results: list[Result] = []
    broken: list[str] = []
    for bound in checks:
        if broken:  # a later failure would be a symptom of this one
            results.append(Result(bound.check.name, bound.check.says, SKIPPED, f"needs {broken[0]}"))
            continue
        results.append(bound.result())
        if bound.check.basic and results[-1].status in (FAILED, EXPECTED):
            broken.append(bound.check.name)
    report = Report(who if len(who) <= 120 else who[:117] + "...", results)
    if raises and report.failed:
        lines = [f"  {r.name}: {r.detail} (promised: {r.says})" for r in report.failed]
        raise ConformanceError(f"{report.who} fails {len(lines)} of {len(report)} checks:\n" + "\n".join(lines))
    return report

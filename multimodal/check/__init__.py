"""Checks that a tokenizer, a head or a whole model keeps its promises: in a script, on the command line, or as pytest ids.

In a script:

    print(check_tokenizer(MyTokenizer(), [value, other_value]))

In a test file, a test for each check:

    test_my_tokenizer = mm.check.tests(MyTokenizer(), [value, other_value])
"""

import functools
import unittest
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multimodal.check import (
    embedding,
    encoding,
    heads,
    information,
    leftovers,
    models,
    tasks,
    tokenizers,
    variants,
    writing,
)
from multimodal.check.cases import HeadCase, TokenizerCase
from multimodal.check.equivalence import CHECKS as MODEL_CHECKS
from multimodal.check.equivalence import Measurement, Verification, verify
from multimodal.check.report import (
    FAILED,
    BoundCheck,
    Check,
    ConformanceError,
    Report,
    Result,
    bind,
    run_checks,
)
from multimodal.check.values import plausible_values
from multimodal.heads import Head
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer

_PARTS = (encoding, leftovers, tokenizers, information, variants, writing, embedding, models)
_CHECKS = tuple(check for part in _PARTS for check in part.CHECKS)
# basic checks first: causes before symptoms
TOKENIZER_CHECKS: tuple[Check, ...] = tuple(sorted(_CHECKS, key=lambda check: not check.basic))
HEAD_CHECKS: tuple[Check, ...] = (*heads.CHECKS, *models.CHECKS)
TASK_CHECKS: tuple[Check, ...] = tuple(tasks.CHECKS)
__all__ = [
    "HEAD_CHECKS",
    "MODEL_CHECKS",
    "TASK_CHECKS",
    "TOKENIZER_CHECKS",
    "BoundCheck",
    "Check",
    "ConformanceError",
    "Measurement",
    "Report",
    "Result",
    "Verification",
    "check_head",
    "check_task",
    "check_tokenizer",
    "head_checks",
    "plausible_values",
    "task_checks",
    "tests",
    "tokenizer_checks",
    "verify",
]


def check_tokenizer(
    tokenizer: Tokenizer,
    values: Sequence[Any],
    *,
    expected_failures: Mapping[str, str] | None = None,
    raises: bool = True,
) -> Report:
    """Try every promise of the contract on a tokenizer with two or more different values it can encode.

    expected_failures: check names -> why that is so; one of these that passes is a failure. raises=False only reports.

    Raises:
        ConformanceError: lists every failed check by name.

    Examples:
        >>> report = check_tokenizer(Labels(("cat", "dog")), ["cat", "dog"])
        >>> report.failed
        []
    """
    return run_checks(repr(tokenizer), tokenizer_checks(tokenizer, values, expected_failures=expected_failures), raises)


def check_head(
    head: Head,
    tokenizer: Tokenizer,
    values: Sequence[Any],
    *,
    expected_failures: Mapping[str, str] | None = None,
    raises: bool = True,
) -> Report:
    """Try every promise of the contract on a head that writes values of this tokenizer's kind; see `check_tokenizer`."""
    checks = head_checks(head, tokenizer, values, expected_failures=expected_failures)
    return run_checks(f"{head!r} writing {tokenizer!r}", checks, raises)


def check_task(
    task: str | Task,
    tokenizers: Mapping[str, Tokenizer],
    samples: Sequence[Mapping[str, Any]],
    *,
    expected_failures: Mapping[str, str] | None = None,
    raises: bool = True,
) -> Report:
    """Look in the samples of a task for an answer that is read as well, and for fields on each other's places.

    samples: eight or more, with their answers, so that what they share is no accident. See `check_tokenizer`.

    Examples:
        >>> kinds = {"row": TextBytes(), "label": Labels(("cat", "dog"))}
        >>> samples = [{"row": f"weight {i}, label: {name}", "label": name} for i in range(4) for name in ("cat", "dog")]
        >>> check_task("row -> label", kinds, samples, raises=False).failed[0].detail
        "field 'row' holds the answer in every sample, behind ', label: ': take it out of what is read"
    """
    checks = task_checks(task, tokenizers, samples, expected_failures=expected_failures)
    return run_checks(repr(task), checks, raises)


def tokenizer_checks(
    tokenizer: Tokenizer, values: Sequence[Any], *, expected_failures: Mapping[str, str] | None = None
) -> list[BoundCheck]:
    """The checks as things to call, named by `str`: for pytest.mark.parametrize(..., ids=str)."""
    return bind(TOKENIZER_CHECKS, TokenizerCase(tokenizer, list(values)), expected_failures or {})


def tests(
    tokenizer: Tokenizer,
    values: Sequence[Any] | Callable[[], Sequence[Any]] | None = None,  # noqa: PT028, as it is no test itself
    *,
    expected_failures: Mapping[str, str] | None = None,  # noqa: PT028
) -> Callable[[str], None]:
    """A pytest function with a test for each check: `test_my_kind = mm.check.tests(MyKind(), values)` in a test file is all.

    values: two or more, or a function that returns them, called when the first test runs; None: plausible ones are tried.
    What needs a check that fails is skipped: the cause fails and not its symptoms. Write `mm.check.tests`, since pytest takes a
    function called `tests` in a test file for a test.
    """
    import pytest

    @functools.cache
    def bound() -> dict[str, BoundCheck]:
        given = values() if callable(values) else plausible_values(tokenizer) if values is None else values
        return {str(one): one for one in tokenizer_checks(tokenizer, given, expected_failures=expected_failures)}

    @functools.cache
    def fails(name: str) -> bool:
        return bound()[name].result().status == FAILED

    @pytest.mark.parametrize("check", [one.name for one in TOKENIZER_CHECKS])
    def test(check: str) -> None:
        __tracebackhide__ = True  # pytest then shows the message, and none of this
        for one in TOKENIZER_CHECKS:
            if one.name == check:
                break
            if one.basic and fails(one.name):
                raise unittest.SkipTest(f"needs {one.name}")
        bound()[check]()

    return test


def head_checks(
    head: Head, tokenizer: Tokenizer, values: Sequence[Any], *, expected_failures: Mapping[str, str] | None = None
) -> list[BoundCheck]:
    """The same for a head."""
    return bind(HEAD_CHECKS, HeadCase(head, tokenizer, list(values)), expected_failures or {})


def task_checks(
    task: str | Task,
    tokenizers: Mapping[str, Tokenizer],
    samples: Sequence[Mapping[str, Any]],
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> list[BoundCheck]:
    """The same for a task."""
    case = tasks.TaskCase(Task(task) if isinstance(task, str) else task, tokenizers, list(samples))
    return bind(TASK_CHECKS, case, expected_failures or {})

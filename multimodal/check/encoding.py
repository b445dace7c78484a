"""Checks that encode depends only on the content of the value, and has no side effects."""

import contextlib
import io
import math
import multiprocessing
import random
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multimodal.check.cases import TokenizerCase, close_tokens, contents, equal_tokens
from multimodal.check.fresh import CannotAsk, fresh_answers, names_a_file
from multimodal.check.leftovers import calls
from multimodal.check.report import Check, ConformanceError, changed, promise, settings, want
from multimodal.composite import Composite
from multimodal.positions import check_axes
from multimodal.shapes import AXES, ConfigError
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe

CHECKS: list[Check] = []
MOST_ROWS = 2**26  # ids or features; more are a mistake
WORKER_S = 120  # a worker process that does not answer within this time has failed


@promise(CHECKS, basic=True)
def declared(case: TokenizerCase) -> None:
    """A frozen dataclass that declares either vocab_size or feature_size, axes that begin with time, row and column, and a positive
    step for each."""
    t = case.tokenizer
    params = getattr(type(t), "__dataclass_params__", None)
    want(params is not None and params.frozen and params.eq, f"{type(t).__name__} is no frozen dataclass")
    sizes = {"vocab_size": t.vocab_size, "feature_size": t.feature_size}
    given = [size for size in sizes.values() if size is not None]
    if isinstance(t, Composite):
        want(not given, f"{sizes}: a composite has none of them, as each of its parts declares its own")
        t.resolved()
    else:
        want(len(given) == 1, f"{sizes}: exactly one of them is wanted")
        want(type(given[0]) is int and given[0] > 0, f"{sizes}: a positive int is wanted")
        want(
            given[0] <= MOST_ROWS,
            f"{sizes}: an embedding of {given[0]:,} rows is beyond memory; hash or split such ids into several tokens",
        )
    try:
        check_axes("axes", t.axes)
    except ConfigError as error:
        raise ConformanceError(str(error)) from None
    counts = sorted({len(AXES), len(t.axes)})
    fine = len(t.step) in counts and all(0 < s < math.inf for s in t.step)
    want(
        fine, f"step={t.step}: {' or '.join('three' if n == 3 else str(n) for n in counts)} positive numbers are wanted"
    )
    flags = {name: getattr(t, name) for name in ("causal", "classes", "text", "lossy")}
    want(all(type(flag) is bool for flag in flags.values()), f"{flags}: bools are wanted")
    want(type(t.learned) is int and t.learned >= 0, f"learned={t.learned!r}: a number of tokens, 0 or more, is wanted")
    want(type(t.max_tokens) is int and t.max_tokens > 0, f"max_tokens={t.max_tokens!r}: a positive int is wanted")
    written = t.written_features
    fine = written is None or (t.feature_size is not None and type(written) is int and 0 < written <= t.feature_size)
    want(fine, f"written_features={written!r}: a number of the {t.feature_size} features of a token is wanted")


@promise(CHECKS, basic=True)
def gives_tokens(case: TokenizerCase) -> None:
    """Encode gives Tokens, of two tensors, for every value."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        fine = isinstance(tokens, Tokens) and all(
            isinstance(x, Tensor) and x.dim() > 0 for x in (tokens.content, tokens.position_NA)
        )
        want(
            fine,
            f"{describe(value)} gave {describe(tokens)}, wanted Tokens(content, position) with a row for each token",
        )


@promise(CHECKS, basic=True)
def input_untouched(case: TokenizerCase) -> None:
    """Encoding changes nothing in the value it is given."""
    before = [contents(value) for value in case.copies()]
    _ = case.tokens
    for values in (case.values, case.copies()):
        for i, value in enumerate(values):
            case.tokenizer.encode(value)
            want(
                contents(value) == before[i],
                f"{describe(case.originals[i])} is not what it was before encoding: encode changes its input in place; "
                "work on a copy",
            )


@promise(CHECKS, basic=True)
def process_untouched(case: TokenizerCase) -> None:
    """Encode, decode and picture leave the process as it was: folder, environment, autograd, default dtype, threads, warnings,
    logging, signals; and print nothing."""
    _ = case.tokens
    want(not case.changed, _side_effect("encode", case.changed))
    for name, call in calls(case):
        before, filters, out = settings(), list(warnings.filters), io.StringIO()
        with contextlib.redirect_stdout(out):
            given = sys.stdout
            call()
            found = ["sys.stdout"] * (sys.stdout is not given)
        found += changed(before) + ["the filters of warnings"] * (filters != list(warnings.filters))
        want(not found, _side_effect(name, found))
        want(
            not out.getvalue(),
            f"{name} prints {shortened(repr(out.getvalue()), 60)}, once for each value; print nothing",
        )


def _side_effect(name: str, found: list[str]) -> str:
    return f"{name} changes {' and '.join(found)} for the whole process; leave it, or change it within a context that puts it back"


@promise(CHECKS, basic=True)
def generators_untouched(case: TokenizerCase) -> None:
    """Encode, decode and picture neither seed nor draw from the global random generators."""

    def states() -> dict[str, Any]:
        numpy_state = contents(np.random.get_state())
        return {"random": random.getstate(), "numpy.random": numpy_state, "torch": torch.get_rng_state().tolist()}

    _ = case.tokens
    for name, call in calls(case):
        # so that a call that seeds a generator cannot end in this same state
        _ = random.random(), np.random.random(), torch.rand(1)
        before = states()
        call()
        moved = [generator for generator, state in states().items() if state != before[generator]]
        want(
            not moved,
            f"{name} moved the global generator of {', '.join(moved)}; make one of your own from a fixed seed",
        )


@promise(CHECKS, basic=True)
def deterministic(case: TokenizerCase) -> None:
    """The same value gives the same tokens every time."""
    case.check_same(case.tokenizer, "the next time")


@promise(CHECKS, basic=True)
def copies_agree(case: TokenizerCase) -> None:
    """A value gives the tokens of what it holds: its copy gives the same, and once it holds something else, it gives other ones."""
    for value, tokens in zip(case.copies(), case.tokens, strict=True):
        want(
            equal_tokens(case.tokenizer.encode(value), tokens),
            f"a copy of {describe(value)} gives other tokens: encode depends on which object it is given (its id or its class), "
            "not on what it holds",
        )
    for value, flipped in zip(case.copies(), case.copies(), strict=True):
        if not _reverse(value):
            continue
        try:
            wanted = case.tokenizer.encode(value)
        except ValueError:  # the reversed value is invalid
            continue
        case.tokenizer.encode(flipped)
        _reverse(flipped)
        want(
            equal_tokens(case.tokenizer.encode(flipped), wanted),
            f"{describe(flipped)} was changed after it had been encoded, and still gives its old tokens: encode remembers objects "
            "(by their id), not what they hold",
        )


def _reverse(value: Any) -> bool:
    """Reverse, in place, every list and array in a value; returns whether there was any."""
    if isinstance(value, (list, bytearray)):
        before = contents(value)
        value.reverse()
        return contents(value) != before
    if isinstance(value, np.ndarray) and value.ndim and value.flags.writeable:
        value[...] = np.flip(value).copy()
        return True
    if isinstance(value, Tensor) and value.dim():
        value.copy_(value.flip(tuple(range(value.dim()))))
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return sum([_reverse(part) for part in parts]) > 0  # reverses all of them, where any() would stop at the first


@promise(CHECKS, basic=True)
def memory_own(case: TokenizerCase) -> None:
    """Tokens share no memory with the value or with the tokens of another value: what is done to those changes nothing here."""
    for value in case.values:
        tokens = case.tokenizer.encode(value)
        for name, x in (("content", tokens.content), ("places", tokens.position_NA)):
            shared = any(np.may_share_memory(x.detach().numpy(), array) for array in _arrays(value))
            want(
                not shared,
                f"the {name} of {describe(value)} is a view of the caller's array, which may change; copy it",
            )
    tokens = [case.tokenizer.encode(value) for value in case.values]
    for value, first, wanted in zip(case.values, tokens, case.tokens, strict=True):
        want(
            equal_tokens(first, wanted),
            f"the tokens of {describe(value)} changed when the next was encoded: encode writes into memory that it uses again",
        )


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """The arrays in a value, without copies."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Tensor):
        yield value.detach().cpu().numpy()
    elif isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        yield np.frombuffer(value, np.uint8)
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _arrays(part)


@promise(CHECKS)
def plain_tensors(case: TokenizerCase) -> None:
    """Content and places are on the CPU and carry no gradient."""
    for tokens in case.tokens:
        for x in (tokens.content, tokens.position_NA):
            want(x.device.type == "cpu", f"a tensor is on {x.device}; encode runs on the CPU, in data workers")
            want(not x.requires_grad, "a tensor requires a gradient; what is learned belongs into embed")


@promise(CHECKS)
def fresh_process(case: TokenizerCase) -> None:
    """A fresh Python process gives the same tokens: with another hash seed, in another folder and time zone, in reverse order."""
    if multiprocessing.parent_process() is not None:
        raise unittest.SkipTest("this is itself a process started by another")
    values, elsewhere = case.copies(), not names_a_file(case.values)

    def ask(**how: bool) -> list[Tokens | str]:
        try:
            plainly = {"other_seed": False, "other_zone": False, "elsewhere": False, "backwards": False}
            return fresh_answers(case.tokenizer, values, **plainly | how)
        except CannotAsk as reason:
            raise unittest.SkipTest(str(reason)) from None

    found = ask(elsewhere=elsewhere, backwards=True)
    for i, (tokens, wanted) in enumerate(zip(found, case.tokens, strict=True)):
        if not _agree(tokens, wanted):
            gave = f"fails ({tokens})" if isinstance(tokens, str) else "gives other tokens"
            raise ConformanceError(
                f"{describe(case.values[i])} {gave} in a fresh Python process: encode depends on {_cause(ask)}"
            )


def _cause(ask: Callable[..., list[Tokens | str]]) -> str:
    """The cause of the difference, found by changing one condition at a time."""
    plain = ask()
    causes = {
        "other_seed": "the hash seed, which every process draws anew: hash(), or the order of a set; use hashlib, and sorted()",
        "backwards": "which values came before: something grows or counts while it encodes; what was learnt belongs into a field",
        "other_zone": "the time zone of the machine; give dates and times a zone, such as UTC",
        "elsewhere": "the current folder; hold what a file says in a field, or give it out by files()",
    }
    for name, cause in causes.items():
        if not all(map(_agree, ask(**{name: True}), plain)):
            return cause
    return "what only this process has: a global or environment variable, a setting that is no field, its number, or the time"


def _agree(a: Tokens | str, b: Tokens | str) -> bool:
    return a == b if isinstance(a, str) or isinstance(b, str) else close_tokens(a, b)


@promise(CHECKS)
def worker_process(case: TokenizerCase) -> None:
    """A data worker, started as this platform starts processes, gives the same tokens."""
    if multiprocessing.parent_process() is not None:
        raise unittest.SkipTest("this is itself a process started by another")
    forks = multiprocessing.get_start_method() == "fork"
    interactive = not Path(getattr(sys.modules["__main__"], "__file__", "")).is_file()
    if not forks and interactive and type(case.tokenizer).__module__ == "__main__":
        raise unittest.SkipTest(
            "the class was typed into a session, which a new process cannot import; put it in a file"
        )
    loader = DataLoader(_Encodings(case.tokenizer, case.values), batch_size=None, num_workers=1, timeout=WORKER_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks, which DataLoader makes
            found = list(loader)
    except Exception as error:
        hint = "" if forks else " (does the script guard its start with if __name__ == '__main__'?)"
        raise ConformanceError(f"the worker failed{hint}: {str(error).strip().splitlines()[-1]}") from error
    for value, mine, parts in zip(case.values, case.tokens, found, strict=True):
        want(
            equal_tokens(mine, Tokens(*parts)),
            f"{describe(value)} gives other tokens in a worker process",
        )


class _Encodings(Dataset):
    def __init__(self, tokenizer: Tokenizer, values: list[Any]) -> None:
        self.tokenizer, self.values = tokenizer, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = self.tokenizer(self.values[index])
        return tokens.content, tokens.position_NA, tokens.pairs

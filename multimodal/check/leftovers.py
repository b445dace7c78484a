"""Checks that encoding leaves nothing behind, neither in the tokenizer nor in the process, and works beside other threads."""

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import unittest
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.check.cases import TokenizerCase, contents, copied, equal_tokens, settings_of
from multimodal.check.fresh import names_a_file
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.tokenizer import Tokens, describe

CHECKS: list[Check] = []
THREADS = 4  # that encode at a time
OPEN_FILES = Path("/dev/fd")  # lists the open files of this process, where there is such a folder


@promise(CHECKS, basic=True)
def settings_untouched(case: TokenizerCase) -> None:
    """Encode and decode change no setting of the tokenizer itself: what it has learnt from data is given to its constructor."""
    for name, call in calls(case):
        call()
        now = settings_of(case.tokenizer)
        want(
            now == case.settings,
            f"{name} changes the settings of {type(case.tokenizer).__name__} from {case.settings} to {now}: learn before, and "
            "give the constructor what was learnt",
        )


def calls(case: TokenizerCase) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of encode, decode and picture for every value; other checks report their errors."""
    t = case.tokenizer
    for value, tokens in zip(case.values, case.tokens, strict=True):
        yield "encode", lambda value=value: t.encode(value)
        for name, verb in (("decode", t.decode), ("picture", t.picture)):
            yield name, lambda verb=verb, tokens=tokens: _without_errors(verb, copied(tokens))


def _without_errors(call: Callable[[Tokens], Any], tokens: Tokens) -> None:
    with contextlib.suppress(Exception):
        call(tokens)


@promise(CHECKS, basic=True)
def decode_pure(case: TokenizerCase) -> None:
    """Decode, picture and token_names change nothing in the tokens they are given; decode gives the same value each time."""
    t = case.tokenizer
    for value, tokens in zip(case.values, case.tokens, strict=True):
        given = Tokens(tokens.content.clone(), tokens.position_NA.clone())
        for name, call in (("decode", t.decode), ("picture", t.picture), ("token_names", t.token_names)):
            try:
                found = call(given)
            except Exception:  # other checks report it
                continue
            same = torch.equal(given.content, tokens.content) and torch.equal(given.position_NA, tokens.position_NA)
            want(same, f"{name} changes the tokens of {describe(value)} in place; work on a copy")
            again = call(given)
            want(
                _equal(found, again),
                f"{name} of the same tokens gives {describe(found)}, and the next time {describe(again)}; draw nothing, or from a "
                "generator with a fixed seed",
            )


def _equal(a: Any, b: Any) -> bool:
    try:
        return contents(a) == contents(b)
    except Exception:  # an object that cannot be compared by its contents
        return True


@promise(CHECKS)
def leaves_nothing(case: TokenizerCase) -> None:
    """Encode and decode leave no file in the current or the temporary folder, no file open, and no thread or process running."""
    _ = case.tokens  # the first call may import a library, which may start threads of its own
    here, temporary = os.getcwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        for name in ("current", "temporary"):
            (Path(folder) / name).mkdir()
        try:
            if not names_a_file(case.values):
                os.chdir(Path(folder) / "current")
            tempfile.tempdir = str(Path(folder) / "temporary")
            for name, call in calls(case):
                before = _running(), _open_files()
                try:
                    call()
                except OSError as error:  # a file of the folder where it was tried
                    raise unittest.SkipTest(
                        f"{name} fails in an empty folder, as `fresh_process` says: {error}"
                    ) from None
                left = [f"{file.name} in the {file.parent.name} folder" for file in Path(folder).glob("*/*")]
                want(not left, f"{name} leaves {', '.join(sorted(left))}; hold what is needed in memory, or remove it")
                more = [thread for thread in _running() if thread not in before[0]]
                want(not more, f"{name} leaves {', '.join(map(str, more))} running; end what it starts")
                want(_open_files() <= before[1], f"{name} leaves a file open; open it in a with block")
        finally:
            os.chdir(here)
            tempfile.tempdir = temporary


def _running() -> list[Any]:
    return [*threading.enumerate(), *multiprocessing.active_children()]


def _open_files() -> int:
    return len(os.listdir(OPEN_FILES)) if OPEN_FILES.is_dir() else 0


@promise(CHECKS)
def value_let_go(case: TokenizerCase) -> None:
    """Once a value is encoded, nothing holds on to it: a data worker encodes millions of them."""
    values = case.copies()
    held = [weakref.ref(array) for value in values for array in _arrays(value)]
    if not held:
        raise unittest.SkipTest(f"{describe(values[0])} holds no array that could be watched")
    while values:
        case.tokenizer.encode(values.pop())
    if any(array() is not None for array in held):
        gc.collect()  # slow, and needed only where something of the value refers to itself
    count = sum(array() is not None for array in held)
    want(
        not count,
        f"{count} of {len(held)} arrays are still held after they were encoded: memory grows with every value",
    )


def _arrays(value: Any) -> Iterator[Any]:
    if isinstance(value, (np.ndarray, Tensor)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _arrays(part)


@promise(CHECKS)
def threads_agree(case: TokenizerCase) -> None:
    """Several threads that encode at a time, as those of a service, get the tokens that one alone gets."""
    pairs = list(zip(case.values, case.tokens, strict=True)) * THREADS
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places as often as they can
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = [pool.submit(case.tokenizer.encode, value) for value, _ in pairs]
    finally:
        sys.setswitchinterval(interval)
    for (value, wanted), future in zip(pairs, found, strict=True):
        if (error := future.exception()) is not None:
            raise ConformanceError(f"{describe(value)} fails in another thread ({type(error).__name__}: {error})")
        want(
            equal_tokens(future.result(), wanted),
            f"{describe(value)} gives other tokens while other threads encode: encode writes into something that they share; give "
            "each call memory of its own",
        )

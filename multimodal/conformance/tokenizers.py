"""Checks of what a tokenizer does by itself: encode, decode, embed."""

import copy
import math
import multiprocessing
import pickle
import random
import sys
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multimodal.conformance.cases import CORE, TokenizerCase, check_close, check_gradients, equal_tokens
from multimodal.conformance.report import Check, ConformanceError, promise, want
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, Tokens, describe

CHECKS: list[Check] = []
WORKER_S = 120  # a worker process that says nothing for so long has failed


@promise(CHECKS, basic=True)
def declared(case: TokenizerCase) -> None:
    """A frozen dataclass that declares either vocab_size or feature_size, and three positive steps."""
    t = case.tokenizer
    params = getattr(type(t), "__dataclass_params__", None)
    want(params is not None and params.frozen and params.eq, f"{type(t).__name__} is no frozen dataclass")
    sizes = {"vocab_size": t.vocab_size, "feature_size": t.feature_size}
    given = [size for size in sizes.values() if size is not None]
    want(len(given) == 1, f"{sizes}: exactly one of them is wanted")
    want(type(given[0]) is int and given[0] > 0, f"{sizes}: a positive int is wanted")
    want(
        len(t.step) == 3 and all(0 < s < math.inf for s in t.step), f"step={t.step}: three positive numbers are wanted"
    )
    want(
        type(t.causal) is bool and type(t.classes) is bool,
        f"causal={t.causal!r}, classes={t.classes!r}: bools are wanted",
    )


@promise(CHECKS, basic=True)
def one_place_a_token(case: TokenizerCase) -> None:
    """Every token has one place (time, row, column), and a value has at least one token."""
    for tokens in case.tokens:
        shape = tuple(tokens.position_NA.shape)
        want(len(tokens) > 0, "a value gave no tokens")
        want(shape == (len(tokens), 3), f"{len(tokens)} tokens have places {shape}, wanted ({len(tokens)}, 3)")
        want(len(tokens) == 1 or not case.tokenizer.classes, f"classes=True, but a value has {len(tokens)} tokens")


@promise(CHECKS, basic=True)
def content_as_declared(case: TokenizerCase) -> None:
    """Content is int64 ids (N,) below vocab_size, or float32 features (N, feature_size); places are float32."""
    for tokens in case.tokens:
        x, vocab = tokens.content, case.tokenizer.vocab_size
        came = f"content is {x.dtype} {tuple(x.shape)}"
        if vocab is not None:
            want(x.dtype == torch.int64 and x.dim() == 1, f"{came}, wanted ids: int64 (N,)")
            low, high = int(x.min()), int(x.max())
            want(low >= 0 and high < vocab, f"ids run from {low} to {high}, outside 0..{vocab - 1}")
        else:
            wanted = (len(tokens), case.tokenizer.feature_size)
            want(x.dtype == torch.float32 and x.shape == wanted, f"{came}, wanted features: float32 {wanted}")
        want(tokens.position_NA.dtype == torch.float32, f"places are {tokens.position_NA.dtype}, wanted float32")


@promise(CHECKS, basic=True)
def finite(case: TokenizerCase) -> None:
    """Content and places hold no NaN and no infinity."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        for what, x in (("content", tokens.content), ("places", tokens.position_NA)):
            want(x.isfinite().all(), f"the {what} of {describe(value)} are not finite")


@promise(CHECKS, basic=True)
def deterministic(case: TokenizerCase) -> None:
    """The same value gives the same tokens every time."""
    case.check_same(case.tokenizer, "the next time")


@promise(CHECKS)
def values_differ(case: TokenizerCase) -> None:
    """Different values give different tokens."""
    for i, a in enumerate(case.tokens):
        for j in range(i):
            want(
                not equal_tokens(a, case.tokens[j]), f"values {j} and {i} give the same tokens: give values that differ"
            )


@promise(CHECKS)
def places_differ(case: TokenizerCase) -> None:
    """No two tokens of a value stand at the same place."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        count = len(tokens.position_NA.unique(dim=0))
        want(count == len(tokens), f"the {len(tokens)} tokens of {describe(value)} stand at {count} places")


@promise(CHECKS)
def time_from_zero(case: TokenizerCase) -> None:
    """Time starts at 0 or later (before it lies the field before), and never runs backwards where the kind is causal."""
    for tokens in case.tokens:
        time_N = tokens.position_NA[:, 0]
        want(time_N.min() >= 0, f"a token stands at time {float(time_N.min()):g}, inside the field before")
        ordered = not case.tokenizer.causal or bool((time_N.diff() >= 0).all())
        want(ordered, "this kind is causal, but its tokens do not come in the order of time")


@promise(CHECKS)
def step_fits_places(case: TokenizerCase) -> None:
    """`step` is about the distance of neighbours (0.1 to 100 steps apart), so that the core can tell them apart."""
    for axis, name in enumerate(("time", "row", "column")):
        gaps = [tokens.position_NA[:, axis].unique().diff() for tokens in case.tokens]
        if gap := torch.cat(gaps).tolist():
            typical = sorted(gap)[len(gap) // 2] / case.tokenizer.step[axis]
            want(0.1 <= typical <= 100, f"neighbours along {name} are {typical:.3g} steps apart; declare another step")


@promise(CHECKS)
def input_untouched(case: TokenizerCase) -> None:
    """Encoding changes nothing in the value it is given."""
    for value in case.values:
        try:
            given = copy.deepcopy(value)
            before = _contents(given)
        except Exception as error:  # an open file, for instance
            raise unittest.SkipTest(f"{describe(value)} cannot be copied and compared: {error}") from None
        case.tokenizer(given)
        want(_contents(given) == before, f"{describe(value)} is not what it was before encoding")


def _contents(value: Any) -> Any:
    """Something that is equal for equal contents and does not share memory with the value."""
    if isinstance(value, (Tensor, np.ndarray)):
        array = np.asarray(value)
        return (str(array.dtype), array.shape, array.tobytes())
    if isinstance(value, dict):
        return [(key, _contents(x)) for key, x in value.items()]
    return [_contents(x) for x in value] if isinstance(value, (list, tuple)) else pickle.dumps(value)


@promise(CHECKS)
def generators_untouched(case: TokenizerCase) -> None:
    """Encoding neither seeds nor draws from the global random generators."""

    def states() -> dict[str, Any]:
        numpy_state = _contents(np.random.get_state())
        return {"random": random.getstate(), "numpy.random": numpy_state, "torch": torch.get_rng_state().tolist()}

    before = states()
    for value in case.values:
        case.tokenizer(value)
    moved = [name for name, state in states().items() if state != before[name]]
    want(not moved, f"encode moved the global generator of {', '.join(moved)}; make one of your own from a fixed seed")


@promise(CHECKS)
def plain_tensors(case: TokenizerCase) -> None:
    """Content and places are on the CPU and carry no gradient."""
    for tokens in case.tokens:
        for x in (tokens.content, tokens.position_NA):
            want(x.device.type == "cpu", f"a tensor is on {x.device}; encode runs on the CPU, in data workers")
            want(not x.requires_grad, "a tensor requires a gradient; what is learned belongs into embed")


@promise(CHECKS)
def worker_process(case: TokenizerCase) -> None:
    """A data worker, started as this platform starts processes, gives the same tokens."""
    if multiprocessing.parent_process() is not None:
        raise unittest.SkipTest("this is itself a process started by another")
    forks = multiprocessing.get_start_method() == "fork"
    typed_in = not Path(getattr(sys.modules["__main__"], "__file__", "")).is_file()
    if not forks and typed_in and type(case.tokenizer).__module__ == "__main__":
        raise unittest.SkipTest(
            "the class was typed into a session, which a new process cannot import; put it in a file"
        )
    loader = DataLoader(_Encodings(case.tokenizer, case.values), batch_size=None, num_workers=1, timeout=WORKER_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks: DataLoader's business
            found = list(loader)
    except Exception as error:
        hint = "" if forks else " (does the script guard its start with if __name__ == '__main__'?)"
        raise ConformanceError(f"the worker failed{hint}: {str(error).strip().splitlines()[-1]}") from error
    for value, mine, (content, position_NA) in zip(case.values, case.tokens, found, strict=True):
        want(
            equal_tokens(mine, Tokens(content, position_NA)),
            f"{describe(value)} gives other tokens in a worker process",
        )


class _Encodings(Dataset):
    def __init__(self, tokenizer: Tokenizer, values: list[Any]) -> None:
        self.tokenizer, self.values = tokenizer, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(self.values[index])
        return tokens.content, tokens.position_NA


@promise(CHECKS)
def wrong_type_refused(case: TokenizerCase) -> None:
    """A value of a foreign type raises a ValueError that names the class."""
    for value in (object(), {"foreign": object()}, 3.5j):
        want(_refused(case.tokenizer, value), f"{describe(value)} was encoded without complaint")


@promise(CHECKS)
def empty_refused(case: TokenizerCase) -> None:
    """An empty value raises a ValueError that names the class."""
    tried = {repr(_contents(empty)): empty for value in case.values for empty in _emptied(value)}
    if not tried:
        raise unittest.SkipTest(f"nothing empty can be made of {describe(case.values[0])}")
    for empty in tried.values():
        if not _refused(case.tokenizer, empty):
            want(case.tokenizer.classes, f"{describe(empty)} was encoded without complaint")
            raise unittest.SkipTest(f"{describe(empty)} stands for none of the classes, which is a value")


def _emptied(value: Any) -> Iterator[Any]:
    """Values of the same type with nothing in them, if any can be made."""
    if isinstance(value, (np.ndarray, Tensor)):
        if value.ndim:
            yield from (value[:0], value[..., :0])
    elif isinstance(value, (list, tuple, dict)):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        arrays = [(key, empty) for key, x in items if isinstance(x, (np.ndarray, Tensor)) for empty in _emptied(x)]
        for key, empty in arrays:
            yield type(value)(
                {**dict(items), key: empty} if isinstance(value, dict) else [*value[:key], empty, *value[key + 1 :]]
            )  # type: ignore[operator]
        if not arrays:
            yield type(value)()
    elif isinstance(value, (str, bytes)):
        yield type(value)()


@promise(CHECKS)
def too_long_refused(case: TokenizerCase) -> None:
    """A value of more than max_tokens tokens raises a ValueError that names the class; it is never cut."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        short = copy.copy(case.tokenizer)
        object.__setattr__(short, "max_tokens", len(tokens) - 1)
        want(_refused(short, value), f"max_tokens={len(tokens) - 1} let {describe(value)} of {len(tokens)} tokens pass")


def _refused(tokenizer: Tokenizer, value: Any) -> bool:
    """Whether a ValueError came; its message has to name the tokenizer's class, or the one that it varies."""
    names = [cls.__name__ for cls in type(tokenizer).__mro__ if issubclass(cls, Tokenizer) and cls is not Tokenizer]
    try:
        tokenizer(value)
    except ValueError as error:
        want(any(name in str(error) for name in names), f"the error does not name {names[0]}: {error}")
        return True
    return False


def _decoding(case: TokenizerCase, *, written: bool) -> Tokenizer:
    """The tokenizer, where it decodes, and where asked for, what is written token by token."""
    tokenizer = case.tokenizer
    if type(tokenizer).decode is Tokenizer.decode:
        raise unittest.SkipTest("it has no decode: this kind is only read")
    if written and tokenizer.vocab_size is None and tokenizer.classes:
        raise unittest.SkipTest("several classes at once: nothing is written token by token")
    if written:
        try:
            tokenizer.places(1)
        except ConfigError as error:
            raise unittest.SkipTest(f"as it is set it is only read: {error}") from None
    return tokenizer


@promise(CHECKS)
def decode_inverts_encode(case: TokenizerCase) -> None:
    """What decode makes of a value's tokens encodes to these tokens again: features within 1e-4, or if the kind declares itself
    `lossy`, at the same places and nearer than their own mean is."""
    tokenizer = _decoding(case, written=False)
    lossy = getattr(tokenizer, "lossy", False)
    for value, tokens in zip(case.values, case.tokens, strict=True):
        again = tokenizer(tokenizer.decode(tokens))
        same = again.content.shape == tokens.content.shape and torch.equal(again.position_NA, tokens.position_NA)
        got, wanted = again.content.double(), tokens.content.double()
        if same and lossy and tokenizer.vocab_size is None:
            same = (got - wanted).square().mean() < (wanted - wanted.mean()).square().mean()
        elif same and not lossy:
            same = torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
        want(same, f"{describe(value)} comes back from decode as {describe(tokenizer.decode(tokens))}")


@promise(CHECKS)
def decode_takes_anything(case: TokenizerCase) -> None:
    """Decode takes every row of ids (or of features) that a model could write, the empty one too."""
    tokenizer = _decoding(case, written=True)
    vocab, draw = tokenizer.vocab_size, torch.Generator().manual_seed(0)
    counts = (0, 1, 1, 2, 3, 5, 8, 13, 21)
    if tokenizer.length is not None:  # writing may be cut short, but it never goes on
        counts = (1, tokenizer.length // 2 or 1, tokenizer.length)
    if tokenizer.classes:
        rows = [torch.tensor([c]) for c in range(min(vocab or 0, 100))]
    elif vocab is not None:
        rows = [torch.randint(vocab, (count,), generator=draw) for count in counts]
    else:
        rows = [torch.randn(count, tokenizer.written_features or 0, generator=draw) for count in counts]
    for row in rows:
        try:
            tokenizer.decode(Tokens(row, tokenizer.places(len(row))))
        except Exception as error:
            what = f"the ids {row.tolist()}" if vocab is not None else f"features {tuple(row.shape)}"
            raise ConformanceError(f"decode fails on {what}: {type(error).__name__}: {error}") from error


@promise(CHECKS)
def places_agree(case: TokenizerCase) -> None:
    """`places(n)` and `fed_back`, used while writing, give the places and the content that encode gives."""
    tokenizer = _decoding(case, written=True)
    tried = [tokens for tokens in case.tokens if tokenizer.length in (None, len(tokens))]
    want(tried, f"no value has the {tokenizer.length} tokens that every written one has; give some that do")
    for tokens in tried:
        places = tokenizer.places(len(tokens))
        want(
            torch.equal(places, tokens.position_NA), f"places({len(tokens)}) are not those of a value of as many tokens"
        )
        if tokenizer.vocab_size is None:
            for n in {1, len(tokens)}:  # writing feeds back one token at a time
                fed = tokenizer.fed_back(tokens.content[-n:, : tokenizer.written_features], places[-n:])
                want(
                    fed.shape == tokens.content[-n:].shape and torch.allclose(fed, tokens.content[-n:]),
                    f"fed_back gives {describe(fed)} that is not the content of a value with these features and places",
                )


@promise(CHECKS)
def embed_rows(case: TokenizerCase) -> None:
    """The module that embed makes gives one row of the wanted width for every token."""
    for width in (CORE.width, 2 * CORE.width):
        rows = case.tokenizer.embed(width)(case.tokens[0].content)
        wanted = (len(case.tokens[0]), width)
        want(
            tuple(rows.shape) == wanted and rows.is_floating_point(),
            f"{rows.dtype} {tuple(rows.shape)}, wanted {wanted}",
        )


@promise(CHECKS)
def embed_by_token(case: TokenizerCase) -> None:
    """All values embedded by one call give the rows that one call for each gives."""
    embed = case.tokenizer.embed(CORE.width).eval()
    contents = [tokens.content for tokens in case.tokens]
    with torch.no_grad():
        check_close(embed(torch.cat(contents)), torch.cat([embed(x) for x in contents]), "one call and many")


@promise(CHECKS)
def embed_learns(case: TokenizerCase) -> None:
    """A gradient reaches every parameter of the module that embed makes."""
    embed = case.tokenizer.embed(CORE.width)
    rows = embed(torch.cat([tokens.content for tokens in case.tokens]))
    (rows * torch.randn_like(rows)).sum().backward()
    check_gradients(embed)

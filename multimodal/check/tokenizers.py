"""Checks of what a tokenizer does by itself: encode, decode, embed."""

import copy
import unittest
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.check.cases import (
    CORE,
    TokenizerCase,
    check_close,
    check_gradients,
    contents,
    equal_pairs,
    equal_tokens,
)
from multimodal.check.information import resembles
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.composite import Composed, Composite
from multimodal.heads.each_row import answered_rows, targets_of
from multimodal.positions import in_steps, steps_of
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal.tokenizer import Places, Tokenizer, Tokens, check_pairs, describe, with_next, written_tokens

CHECKS: list[Check] = []


@promise(CHECKS, basic=True)
def one_place_a_token(case: TokenizerCase) -> None:
    """Every token has one place (time, row, column, and further axes of the kind), and a value has at least one token."""
    axes = case.tokenizer.axes
    for tokens in case.tokens:
        shape, wanted = tuple(tokens.position_NA.shape), (len(tokens), len(axes))
        want(len(tokens) > 0, "a value gave no tokens")
        want(shape == wanted, f"{len(tokens)} tokens have places {shape}, wanted {wanted}: {', '.join(axes)}")
        want(len(tokens) == 1 or not case.tokenizer.classes, f"classes=True, but a value has {len(tokens)} tokens")


@promise(CHECKS, basic=True)
def content_as_declared(case: TokenizerCase) -> None:
    """Content is int64 ids (N,) below vocab_size, or float32 features (N, feature_size); places are float32."""
    parts = [part for tokens in case.tokens for part in _by_part(case.tokenizer, tokens)]
    for tokenizer, tokens in parts:
        if isinstance(tokenizer, Composite):
            continue
        x, vocab = tokens.content, tokenizer.vocab_size
        came = f"content is {x.dtype} {tuple(x.shape)}"
        if vocab is not None:
            want(x.dtype == torch.int64 and x.dim() == 1, f"{came}, wanted ids: int64 (N,)")
            low, high = int(x.min()), int(x.max())
            want(low >= 0 and high < vocab, f"ids run from {low} to {high}, outside 0..{vocab - 1}")
        else:
            wanted = (len(tokens), tokenizer.feature_size)
            want(x.dtype == torch.float32 and x.shape == wanted, f"{came}, wanted features: float32 {wanted}")
        want(tokens.position_NA.dtype == torch.float32, f"places are {tokens.position_NA.dtype}, wanted float32")


def _by_part(tokenizer: Tokenizer, tokens: Tokens) -> list[tuple[Tokenizer, Tokens]]:
    """Tokens with their tokenizer; of a composite value those of each part."""
    if not isinstance(tokenizer, Composite):
        return [(tokenizer, tokens)]
    want(isinstance(tokens, Composed), f"encode gave {describe(tokens)}, wanted the runs of its parts")
    return [(tokenizer.at(path), run) for path, run in tokens.runs]  # type: ignore[attr-defined]


@promise(CHECKS, basic=True)
def finite(case: TokenizerCase) -> None:
    """Content and places hold no NaN and no infinity."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        for what, x in (("content", tokens.content), ("places", tokens.position_NA)):
            want(x.isfinite().all(), f"the {what} of {describe(value)} are not finite")


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
        want(
            count == len(tokens),
            f"the {len(tokens)} tokens of {describe(value)} stand at {count} places; self.places(n) gives n of them",
        )


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
    for axis, name in enumerate(case.tokenizer.axes):
        gaps = [tokens.position_NA[:, axis].unique().diff() for tokens in case.tokens]
        if gap := torch.cat(gaps).tolist():
            typical = sorted(gap)[len(gap) // 2] / float(steps_of(case.tokenizer.step, axis + 1)[axis])
            want(0.1 <= typical <= 100, f"neighbours along {name} are {typical:.3g} steps apart; declare another step")


@promise(CHECKS)
def wrong_type_refused(case: TokenizerCase) -> None:
    """A value of a foreign type raises a ValueError that names the class."""
    for value in (object(), {"foreign": object()}, 3.5j):
        want(_refused(case.tokenizer, value), f"{describe(value)} was encoded without complaint")


@promise(CHECKS)
def empty_refused(case: TokenizerCase) -> None:
    """An empty value raises a ValueError that names the class."""
    tried = {repr(contents(empty)): empty for value in case.values for empty in _emptied(value)}
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


def decoding(case: TokenizerCase, *, written: bool) -> Tokenizer:
    """The tokenizer, where it decodes, and where asked for, what is written token by token."""
    tokenizer = case.tokenizer
    if not tokenizer.decodes:
        raise unittest.SkipTest("it has no decode: this kind is only read")
    if written and isinstance(tokenizer, Composite):
        raise unittest.SkipTest("it is written as ids of all its parts: check its `written` too")
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
    `lossy`, at the same places, nearer than their own mean is and nearer to them than to those of other values."""
    tokenizer = decoding(case, written=False)
    lossy, found = tokenizer.lossy, []
    for value, tokens in zip(case.values, case.tokens, strict=True):
        again = tokenizer(tokenizer.decode(tokens))
        found.append(again)
        same = again.content.shape == tokens.content.shape and torch.equal(again.position_NA, tokens.position_NA)
        got, wanted = again.content.double(), tokens.content.double()
        if same and lossy and tokenizer.vocab_size is None:
            same = (got - wanted).square().mean() < (wanted - wanted.mean()).square().mean()
        elif same and not lossy:
            same = torch.allclose(got, wanted, rtol=1e-4, atol=1e-4) and equal_pairs(again, tokens)
        want(same, f"{describe(value)} comes back from decode as {describe(tokenizer.decode(tokens))}")
    if lossy:
        reordered = [Tokens(tokens.content.flip(0), tokens.position_NA) for tokens in case.tokens]
        differ = [not equal_tokens(a, b) for a, b in zip(reordered, case.tokens, strict=True)]
        # reordered tokens may decode to an empty value
        again = [tokenizer(tokenizer.decode(tokens), empty=True) for tokens in reordered]
        survive = [not equal_tokens(a, b) for a, b in zip(again, found, strict=True)]
        want(
            resembles(found, case.tokens) and (any(survive) or not any(differ)),
            "what decode makes of a value's tokens is no nearer to them than to those of other values; nothing of it is left",
        )


@promise(CHECKS, basic=True)
def text_as_declared(case: TokenizerCase) -> None:
    """Where the kind declares `text`, decode gives text (str), of the tokens of a value and of any beginning of them."""
    t = case.tokenizer
    if not t.text:
        return
    want(t.vocab_size is not None, "text=True, but the content is features; text is written by ids, piece by piece")
    decoding(case, written=False)
    for tokens in case.tokens:
        for count in {1, len(tokens)}:
            got = t.decode(Tokens(tokens.content[:count], tokens.position_NA[:count]))
            want(
                isinstance(got, str), f"text=True, but decode gives {describe(got)}; give a str, or take text=True off"
            )


@promise(CHECKS, basic=True)
def relations_as_declared(case: TokenizerCase) -> None:
    """The pairs of a value are of its tokens and of the declared `relations`; `answered` gives a bool for each token."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        try:
            if tokens.pairs is not None and not (isinstance(tokens.pairs, Tensor) and not tokens.pairs.numel()):
                check_pairs(case.tokenizer, tokens)
            answered_rows(case.tokenizer, tokens)
        except MediaError as error:
            raise ConformanceError(f"{describe(value)}: {error}") from error


@promise(CHECKS, basic=True)
def one_hot_as_declared(case: TokenizerCase) -> None:
    """Where the kind declares `one_hot`, features are groups of this many, in which one is 1 and the others are 0, or all are 0."""
    t = case.tokenizer
    if t.one_hot is None:
        return
    want(
        type(t.one_hot) is int and t.one_hot > 0 and t.feature_size is not None and not t.feature_size % t.one_hot,
        f"one_hot={t.one_hot!r}: a whole number that divides feature_size={t.feature_size} is wanted",
    )
    for value, tokens in zip(case.values, case.tokens, strict=True):
        try:
            targets_of(tokens, t)
        except StreamError as error:
            raise ConformanceError(f"{describe(value)}: {error}") from error


@promise(CHECKS, basic=True)
def length_as_declared(case: TokenizerCase) -> None:
    """Where the kind declares a `length`, every value that can be written has as many tokens; `places` refuses more."""
    t = case.tokenizer
    if t.length is None:
        return
    want(type(t.length) is int and t.length > 0, f"length={t.length!r}: a positive int, or None, is wanted")
    counts = [len(tokens) for tokens in case.tokens]
    want(
        t.length in counts, f"no value has the {t.length} tokens of length={t.length}; they have {sorted(set(counts))}"
    )
    for value, tokens in zip(case.values, case.tokens, strict=True):
        flat = not tokens.position_NA[:, 1:].any()
        if len(tokens) == t.length or (len(tokens) < t.length and not flat):
            continue  # of a part of a picture nobody can say whether it is one
        try:
            places = written_tokens(t, tokens.content).position_NA
        except (ConfigError, StreamError):  # such a value is read, and never written
            continue
        want(
            not torch.equal(places, tokens.position_NA),
            f"length={t.length}, but {describe(value)} has {len(tokens)} tokens, and places({len(tokens)}) are theirs; take length "
            "off, or let places refuse them",
        )


@promise(CHECKS)
def picture_tiles(case: TokenizerCase) -> None:
    """The picture of a value, if any, is (Y, X, C) in 0..1, and its tokens but the `learned` ones tile it: by rows and columns, or
    along time."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        try:
            picture_YXC = case.tokenizer.picture(tokens)
        except Exception as error:
            raise ConformanceError(f"picture fails on {describe(value)}: {type(error).__name__}: {error}") from error
        if picture_YXC is None:
            continue
        came = f"the picture of {describe(value)} is {describe(picture_YXC)}"
        fine = isinstance(picture_YXC, Tensor) and picture_YXC.dim() == 3 and picture_YXC.shape[2] in (1, 3, 4)
        want(fine and picture_YXC.numel(), f"{came}, wanted a tensor (Y, X, C) of 1, 3 or 4 channels")
        fine = picture_YXC.is_floating_point() and bool(((picture_YXC >= -1e-4) & (picture_YXC <= 1 + 1e-4)).all())
        want(fine, f"{came}, wanted floats in 0..1")
        row_N = tokens.position_NA[case.tokenizer.learned :, 1]
        rows = len(row_N.unique())
        grid = rows, len(row_N) // rows
        whole = not any(side % n for side, n in zip(picture_YXC.shape, grid, strict=False))
        want(whole, f"{came}, which its tokens, {grid[0]} rows of {grid[1]}, do not tile")
        if (moved := _other_tile(case.tokenizer, tokens, picture_YXC, grid)) is not None:
            want(
                False,
                f"{came}, {grid[0]} rows of {grid[1]} tokens, but its token {moved} is not drawn in tile {moved}, counted row "
                "by row: rows and columns are swapped, or the picture is turned",
            )


def _other_tile(tokenizer: Tokenizer, tokens: Tokens, picture_YXC: Tensor, grid: tuple[int, int]) -> int | None:
    """A token whose content is not drawn in its own tile, found by exchanging the contents of two tokens; None: there is none."""
    first, (rows, columns) = tokenizer.learned, grid
    count = rows * columns
    for i in range(0, count, max(count // 8, 1)):
        j = (i + max(count // 2, 1)) % count
        content = tokens.content.clone()
        content[[first + i, first + j]] = content[[first + j, first + i]]
        other_YXC = tokenizer.picture(Tokens(content, tokens.position_NA))
        if not isinstance(other_YXC, Tensor) or other_YXC.shape != picture_YXC.shape:
            return i
        changed_YX = ((other_YXC - picture_YXC).abs() > 1e-3).any(-1)
        tile_N = changed_YX.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).any(3).any(1).flatten()
        if not set(tile_N.flatten().nonzero().flatten().tolist()) <= {i, j}:
            return i
    return None


@promise(CHECKS)
def decode_takes_anything(case: TokenizerCase) -> None:
    """Decode takes every row of ids (or of features) that a model could write, the empty one too."""
    tokenizer = decoding(case, written=True)
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
        what = f"the ids {row.tolist()}" if vocab is not None else f"features {tuple(row.shape)}"
        try:
            tokens = written_tokens(tokenizer, row)
        except StreamError as error:
            raise ConformanceError(f"{what} have no place, but a model may write them: {error}") from error
        try:
            tokenizer.decode(tokens)
        except Exception as error:
            raise ConformanceError(f"decode fails on {what}: {type(error).__name__}: {error}") from error


@promise(CHECKS)
def places_agree(case: TokenizerCase) -> None:
    """`places(n)` or `next_place`, and `fed_back`, used while writing, give the places and the content that encode gives."""
    tokenizer = decoding(case, written=True)
    tried = [tokens for tokens in case.tokens if tokenizer.length in (None, len(tokens))]
    want(tried, f"no value has the {tokenizer.length} tokens that every written one has; give some that do")
    for tokens in tried:
        if tokenizer.placed_by_content:
            _next_places_agree(tokenizer, tokens)
            continue
        places = tokenizer.places(len(tokens))
        want(
            torch.equal(places, tokens.position_NA),
            f"places({len(tokens)}) are not those of a value of as many tokens; where contents say where a token stands, write "
            "next_place",
        )
        if tokenizer.vocab_size is None:
            for n in {1, len(tokens)}:  # writing feeds back one token at a time
                fed = tokenizer.fed_back(tokens.content[-n:, : tokenizer.written_features], places[-n:])
                want(
                    fed.shape == tokens.content[-n:].shape and torch.allclose(fed, tokens.content[-n:]),
                    f"fed_back gives {describe(fed)} that is not the content of a value with these features and places",
                )


def _next_places_agree(tokenizer: Tokenizer, tokens: Tokens) -> None:
    """Fail unless next_place and fed_back give each token of a value as encode gives it, from those before it."""
    for i in range(len(tokens)):
        before = Tokens(tokens.content[:i], tokens.position_NA[:i])
        content = tokens.content[i : i + 1]
        ids = tokenizer.vocab_size is not None
        try:
            found = with_next(tokenizer, before, content if ids else content[:, : tokenizer.written_features])
        except StreamError as error:
            raise ConformanceError(str(error)) from error
        place_A, wanted_A = found.position_NA[-1], tokens.position_NA[i]
        gap_A = in_steps(place_A - wanted_A, tokenizer.step).abs()
        want(
            bool((gap_A <= 1e-4 + 1e-6 * in_steps(wanted_A, tokenizer.step).abs()).all()),
            f"next_place puts token {i} at {place_A.tolist()}, and encode at {wanted_A.tolist()}",
        )
        got = found.content[-1:]
        want(
            got.shape == content.shape and torch.allclose(got.double(), content.double()),
            f"fed_back gives {describe(got)} that is not the content of token {i} with these features and this place",
        )


def embedded(case: TokenizerCase, module: nn.Module, values: Sequence[Tokens], content: Tensor | None = None) -> Tensor:
    """The rows that the module gives for these values, called as a model calls it; content: instead of theirs."""
    if isinstance(case.tokenizer, Composite):
        return _embedded_parts(case.tokenizer, module, values)
    content = torch.cat([tokens.content for tokens in values]) if content is None else content
    if not getattr(module, "reads_places", False):
        return module(content)
    return module(content, Places.of(values, case.tokenizer.step))


def _embedded_parts(composite: Composite, module: nn.Module, values: Sequence[Tokens]) -> Tensor:
    """The rows of composite values: all runs of a part by one call, then brought into order."""
    runs = [run for tokens in values if isinstance(tokens, Composed) for run in tokens.runs]
    rows: list[Tensor] = [torch.empty(0)] * len(runs)
    for path in dict.fromkeys(path for path, _ in runs):
        which = [i for i, run in enumerate(runs) if run.path == path]
        tokens, part = [runs[i].tokens for i in which], module.get_submodule(path)
        content = torch.cat([x.content for x in tokens])
        reads = getattr(part, "reads_places", False)
        found = part(content, Places.of(tokens, composite.at(path).step)) if reads else part(content)
        for i, x in zip(which, found.split([len(x) for x in tokens]), strict=True):
            rows[i] = x
    return torch.cat(rows)


@promise(CHECKS)
def embed_rows(case: TokenizerCase) -> None:
    """The module that embed makes gives one row of the wanted width for every token."""
    for width in (CORE.width, 2 * CORE.width):
        rows = embedded(case, case.embed(width), case.tokens[:1])
        wanted = (len(case.tokens[0]), width)
        want(
            tuple(rows.shape) == wanted and rows.is_floating_point(),
            f"{rows.dtype} {tuple(rows.shape)}, wanted {wanted}",
        )


@promise(CHECKS)
def embed_any_numbers(case: TokenizerCase) -> None:
    """The module that embed makes takes numbers that encode never gives, such as the half of them: a model writes those too."""
    if case.tokenizer.vocab_size is not None or isinstance(case.tokenizer, Composite):
        return  # of ids there are no others; the parts of a composite are checked by themselves
    embed, content = case.embed().eval(), case.tokens[0].content
    for name, x in (("half of", content * 0.5), ("minus", -content), ("a little above", content + 0.25)):
        try:
            rows = embedded(case, embed, case.tokens[:1], x)
        except Exception as error:
            raise ConformanceError(
                f"embed fails on {name} the content of {describe(case.values[0])} ({type(error).__name__}: {error}); features are "
                "any numbers, as a model writes them: do not look them up in a table"
            ) from error
        want(rows.isfinite().all(), f"embed gives NaN or infinity for {name} the content of {describe(case.values[0])}")


@promise(CHECKS)
def embed_by_token(case: TokenizerCase) -> None:
    """All values embedded by one call give the rows that one call for each gives."""
    embed = case.embed().eval()
    with torch.no_grad():
        alone = [embedded(case, embed, [tokens]) for tokens in case.tokens]
        check_close(embedded(case, embed, case.tokens), torch.cat(alone), "one call and many")


@promise(CHECKS)
def embed_learns(case: TokenizerCase) -> None:
    """A gradient reaches every parameter of the module that embed makes."""
    embed = case.embed()
    rows = embedded(case, embed, case.tokens)
    (rows * torch.randn_like(rows)).sum().backward()
    check_gradients(embed)

"""Checks of what is written: decode, places and names while tokens come one by one, and the answer that measures compare with."""

import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch

from multimodal.check.cases import TokenizerCase
from multimodal.check.information import same_value
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.check.tokenizers import decoding
from multimodal.composite import Composite
from multimodal.data.codecs import values_in
from multimodal.generate.detokenizer import Detokenizer
from multimodal.positions import in_steps
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens, describe

CHECKS: list[Check] = []
MOST_PLACES = 256  # tokens up to which places are compared
FARTHEST = 2**20  # steps; float32 tells sixteenths of a step apart up to here


@promise(CHECKS)
def text_grows(case: TokenizerCase) -> None:
    """Where the kind is text, what is shown token by token while it is written is the text of all tokens."""
    t = decoding(case, written=True).written
    if not t.text:
        return
    for value in case.values:
        tokens = t.encode(value)  # a text that is written has no marks of a template around it
        shown, ids = Detokenizer(t, ()), tokens.content.tolist()
        for i in ids:
            shown.push([i])
        shown.finish()
        wanted = t.decode(tokens)
        want(
            shown.text == wanted,
            f"shown token by token, the text {wanted!r} is {shown.text!r}: decode changes what the tokens before already said; "
            "let it only go on",
        )


@promise(CHECKS)
def places_grow(case: TokenizerCase) -> None:
    """`places(n)` are the first of `places(m)`: a token that is written stays where it is while others follow."""
    t = decoding(case, written=True)
    follows = getattr(type(t), "next_place", None)
    if t.classes or follows is not getattr(Tokenizer, "next_place", None):
        return  # what is written stands where its content says
    count = min(max(map(len, case.tokens)), t.length or MOST_PLACES)
    try:
        places_NA = t.places(count)
        for n in sorted({1, 2, count // 2, count - 1}):
            if 0 < n < count:
                want(
                    torch.equal(t.places(n), places_NA[:n]),
                    f"places({n}) are not the first {n} of places({count}): tokens would move while others are written; let a "
                    "place depend on the number of tokens before it only",
                )
    except ConfigError as error:
        raise ConformanceError(
            f"places refuses less than {count} tokens, which come before the last: {error}"
        ) from error


@promise(CHECKS)
def places_in_reach(case: TokenizerCase) -> None:
    """Places begin near 0 and stay where float32 tells neighbours apart: no dates in seconds, no bytes of a file."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        position_NA = in_steps(tokens.position_NA, case.tokenizer.step)
        farthest = float(position_NA.abs().max())
        want(
            farthest <= FARTHEST,
            f"a token of {describe(value)} stands {farthest:.3g} steps from the start: begin each value at 0, or "
            "declare a larger step",
        )


@promise(CHECKS)
def wanted_as_decoded(case: TokenizerCase) -> None:
    """`wanted`, which measures compare answers with, is what decode makes of the right tokens."""
    t = decoding(case, written=False)
    if type(t).wanted is Tokenizer.wanted:
        return
    for value, tokens in zip(case.values, case.tokens, strict=True):
        asked, got = t.wanted(value), t.decode(tokens)
        want(
            same_value(asked, got, t.classes) is not False,
            f"wanted({describe(value)}) is {describe(asked)}, but a perfect answer decodes to {describe(got)}: nothing would ever "
            "be counted as right",
        )


@promise(CHECKS)
def file_holds_value(case: TokenizerCase) -> None:
    """`write` saves what decode gives as a file at the given path, which reads as the same value, unless the kind is `lossy`."""
    t = decoding(case, written=False)
    read = False
    for tokens in case.tokens:
        with tempfile.TemporaryDirectory() as folder:
            decoded = t.decode(tokens)
            try:
                path = t.write(decoded, Path(folder) / "value")
            except MediaError as error:
                want(not t.writes_files, f"write fails on {describe(decoded)}: {error}")
                raise unittest.SkipTest(str(error)) from None
            fine = isinstance(path, Path) and path.parent == Path(folder) and path.is_file()
            want(
                fine, f"write returns {describe(path)}, wanted the path of the file that it wrote beside the given one"
            )
            want(path.suffix, f"write makes a file called {path.name!r}, whose name has no ending such as .json")
            if t.lossy:
                continue
            found = [again for again in (*values_in(path), str(path)) if _encodes(t, again)]
            read |= bool(found)
            if found and not any(_close(t(again), tokens) for again in found):
                want(False, f"write saves {describe(decoded)} as {path.name}, which reads as {describe(found[0])}")
    if not read and not t.lossy:
        want(
            not t.writes_files,
            "encode reads no file that write makes: take its path, or write .txt, .json, .npy, .png or .wav",
        )
        raise unittest.SkipTest(f"{describe(case.values[0])} is not read from files")


def _encodes(t: Tokenizer, value: Any) -> bool:
    try:
        t(value)
    except ValueError:
        return False
    return True


def _close(a: Tokens, b: Tokens) -> bool:
    """Whether tokens are equal but for the steps in which a file holds numbers: 1/255 of a picture, as a share of the largest."""
    if a.content.shape != b.content.shape or not torch.allclose(a.position_NA, b.position_NA):
        return False
    if not a.content.is_floating_point():
        return torch.equal(a.content, b.content)
    return bool((a.content - b.content).abs().max() <= 0.02 * b.content.abs().max().clamp(min=1))


@promise(CHECKS)
def written_fits(case: TokenizerCase) -> None:
    """`written` is a tokenizer of the same ids or features, which is itself when it is asked again, and decodes them."""
    t = decoding(case, written=False)
    if isinstance(t, Composite):
        raise unittest.SkipTest("it is written as ids of one vocabulary, whose weights are those of the head")
    w = t.written
    want(isinstance(w, Tokenizer), f"written is {describe(w)}, wanted a Tokenizer")
    sizes = [(x.vocab_size, x.feature_size) for x in (t, w)]
    want(
        sizes[0] == sizes[1],
        f"written has (vocab_size, feature_size) {sizes[1]}, and this kind {sizes[0]}: they share weights",
    )
    want(w.written == w, "the written of written is yet another tokenizer")
    want(w.decodes, "written has no decode, so that what is written cannot be read")


@promise(CHECKS)
def names_for_tokens(case: TokenizerCase) -> None:
    """`token_names` gives one text for each token of a value."""
    for value, tokens in zip(case.values, case.tokens, strict=True):
        names = case.tokenizer.token_names(tokens)
        came = f"token_names of {describe(value)} gives {describe(names)}"
        want(isinstance(names, (list, tuple)), f"{came}, wanted a list")
        want(len(names) == len(tokens), f"{came}: {len(names)} names for {len(tokens)} tokens")
        want(all(isinstance(name, str) for name in names), f"{came}: every name is a text")

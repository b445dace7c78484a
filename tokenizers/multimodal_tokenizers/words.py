"""Words, a token each, for tags: what a word is made of counts, so that words never seen have a meaning too."""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens, at_times, describe


@dataclass(frozen=True)
class Words(Tokenizer):
    """A list of words, or a text that is split at white space; each word is one token, which `EachRow(of=..)` answers.

    There is no vocabulary. A word is the sum of itself and of its pieces of `shortest` to `longest` characters, with marks at both
    ends, after fastText (Bojanowski et al. 2017); each adds 1 or -1 at one of the features, by a hash (Weinberger et al. 2009), the
    pieces less the more they are. Words are only read.

    buckets: F, number of features among which words and pieces are shared out.
    shortest, longest: lengths of the pieces, in characters with the marks.
    causal: whether a token attends only to tokens before it.

    Examples:
        >>> words = Words(buckets=512)
        >>> one, other, third = words(["unseen", "unseeing", "words"]).content
        >>> bool(one @ other > one @ third)
        True
    """

    buckets: int = 4096
    shortest: int = 2
    longest: int = 5
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("buckets", "shortest", "longest"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"Words: {name}={getattr(self, name)!r} must be a whole number of at least 1")
        if self.longest < self.shortest:
            raise ConfigError(f"Words: longest={self.longest} must be at least shortest={self.shortest}")

    @property
    def feature_size(self) -> int:
        return self.buckets

    def encode(self, value: Any) -> Tokens:
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, (list, tuple)):
            raise MediaError(f"Words.encode: wanted a list of words, or a text, not {describe(value)}")
        if len(words) > self.max_tokens:  # before they take memory
            raise MediaError(
                f"Words.encode: {len(words)} words, more than max_tokens={self.max_tokens}; give fewer, a sentence say"
            )
        content_NF = np.zeros((len(words), self.buckets), dtype=np.float32)
        for i, word in enumerate(words):
            if not isinstance(word, str) or not word:
                raise MediaError(f"Words.encode: word {i} is {describe(word)}, wanted a text that is not empty")
            place, share = _pieces(word, self.buckets, self.shortest, self.longest)
            content_NF[i, place] = share
        return Tokens(torch.from_numpy(content_NF), at_times(torch.arange(len(words))))

    def token_names(self, tokens: Tokens) -> list[str]:
        return [f"word {time:g}" for time in tokens.position_NA[:, 0].tolist()]

    def embed(self, width: int) -> nn.Module:
        linear = nn.Linear(self.buckets, width)
        nn.init.normal_(linear.weight, std=0.02)  # as a table of ids has it, since few features are not 0
        return linear

    def examples(self) -> list[Any]:
        """Values for the conformance checks."""
        texts = (
            "the cat sat",
            "a Bird on 2 wires",
            "birds , many !",
            "Zwölf Boxkämpfer jagen Viktor quer über den Deich",
        )
        return [text.split() for text in texts]


@lru_cache(maxsize=2**16)
def _pieces(word: str, buckets: int, shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """The features of a word that are not 0, and what they are: the word itself counts as much as all its pieces."""
    marked = f"\x02{word}\x03"
    pieces = [
        marked[i : i + n] for n in range(shortest, min(longest, len(marked)) + 1) for i in range(len(marked) - n + 1)
    ]
    found: dict[int, float] = {}
    for piece, weight in ((f"\x01{word}", 1.0), *((piece, len(pieces) ** -0.5) for piece in pieces)):
        # Python's own hash differs from process to process; a lone surrogate has bytes too
        number = zlib.crc32(piece.encode("utf-8", "surrogatepass"))
        place = number % buckets
        found[place] = found.get(place, 0.0) + (weight if number >> 31 else -weight)
    return np.fromiter(found.keys(), np.int64), np.fromiter(found.values(), np.float32)

"""Words, one token each, embedded by hashed character n-grams, so that unseen words have embeddings too."""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from multimodal.shapes import ConfigError, MediaError, check_whole
from multimodal.tokenizer import Tokenizer, Tokens, at_times, describe


@dataclass(frozen=True)
class Words(Tokenizer):
    """A list of words, or a text that is split at white space; each word is one token, so that `EachRow(of=..)` can tag it.

    There is no vocabulary. A word is a sum over itself and its character n-grams, with marks at both ends (fastText, Bojanowski et
    al. 2017). A hash gives each of them a feature and a sign (Weinberger et al. 2009); the word itself counts 1, and each of its
    k n-grams 1 / sqrt(k). Words can be read but not written.

    buckets: F, number of features.
    shortest: the least number of characters of an n-gram, marks included.
    longest: the largest one.
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
        check_whole("Words", least=1, buckets=self.buckets, shortest=self.shortest, longest=self.longest)
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
            feature, share = _hashed(word, self.buckets, self.shortest, self.longest)
            content_NF[i, feature] = share
        return Tokens(torch.from_numpy(content_NF), at_times(torch.arange(len(words))))

    def token_names(self, tokens: Tokens) -> list[str]:
        return [f"word {time:g}" for time in tokens.position_NA[:, 0].tolist()]

    def embed(self, width: int) -> nn.Module:
        linear = nn.Linear(self.buckets, width)
        nn.init.normal_(linear.weight, std=0.02)  # as an embedding table has it, since most features are 0
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
def _hashed(word: str, buckets: int, shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the features of a word that are not 0, and these features."""
    marked = f"\x02{word}\x03"
    most = min(longest, len(marked))
    grams = [marked[i : i + n] for n in range(shortest, most + 1) for i in range(len(marked) - n + 1)]
    found: dict[int, float] = {}
    for gram, weight in ((f"\x01{word}", 1.0), *((gram, len(grams) ** -0.5) for gram in grams)):
        # Python's own hash differs from process to process; a lone surrogate has bytes too
        number = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
        feature = number % buckets
        found[feature] = found.get(feature, 0.0) + (weight if number >> 31 else -weight)
    return np.fromiter(found.keys(), np.int64), np.fromiter(found.values(), np.float32)

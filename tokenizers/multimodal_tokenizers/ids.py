"""Lists of ids as values, for a model whose texts another program tokenizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal_tokenizers.text import Table


@dataclass(frozen=True)
class Ids(Tokenizer):
    """A list of ids; `decode` returns it.

    vocab_size: V, number of ids.
    causal: whether a token that is read attends only to earlier ones.
    scale: factor of the embedded vectors, which is not in the table of weights.

    Examples:
        >>> Ids(100)([7, 0, 99]).content.tolist()
        [7, 0, 99]
    """

    vocab_size: int
    causal: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if type(self.vocab_size) is not int or self.vocab_size < 1:
            raise ConfigError(f"Ids: vocab_size={self.vocab_size!r} must be a whole number of at least 1")

    def encode(self, value: Any) -> Tokens:
        ids = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)) or any(type(i) is not int for i in ids):
            raise MediaError(f"Ids.encode: wanted a list of whole numbers, not {describe(value)}")
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise MediaError(f"Ids.encode: {wrong[0]} is not among the ids 0 to {self.vocab_size - 1}")
        return Tokens(torch.tensor(list(ids), dtype=torch.long), self.places(len(ids)))

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()

    def embed(self, width: int) -> nn.Module:
        return Table(self.vocab_size, width, self.scale)

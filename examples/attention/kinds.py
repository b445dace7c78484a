"""Kinds of data of the examples in this folder."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.tokenizer import Tokenizer, Tokens, at_times

SIDE = 28  # pixels of a drawing


@dataclass(frozen=True)
class Numbers(Tokenizer):
    """Whole numbers below `size`, a token each, read in order."""

    size: int
    causal = True

    @property
    def vocab_size(self) -> int:
        return self.size

    def encode(self, value: np.ndarray) -> Tokens:
        return Tokens(torch.from_numpy(np.asarray(value, np.int64)), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> np.ndarray:
        return tokens.content.numpy()


@dataclass(frozen=True)
class Bits(Tokenizer):
    """Rows of `width` bits, a token each, read in order."""

    width: int
    causal = True

    @property
    def feature_size(self) -> int:
        return self.width

    def encode(self, value: np.ndarray) -> Tokens:
        return Tokens(torch.from_numpy(np.asarray(value, np.float32)), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> np.ndarray:
        return tokens.content.numpy().astype(int)


@dataclass(frozen=True)
class Episode(Tokenizer):
    """Drawings in order, each a token with its label, or with the mark of a question."""

    ways: int
    causal = True

    @property
    def feature_size(self) -> int:
        return SIDE**2 + self.ways + 1

    def encode(self, value: tuple[np.ndarray, np.ndarray]) -> Tokens:
        images, labels = value
        marks = np.eye(self.ways + 1)[[*labels, *[self.ways] * (len(images) - len(labels))]]
        content = np.concatenate([images.reshape(len(images), -1), marks], 1).astype(np.float32)
        return Tokens(torch.from_numpy(content), at_times(torch.arange(len(content))))

    def embed(self, width: int) -> nn.Module:
        return Drawings(width, self.ways)


class Drawings(nn.Module):
    """Four convolutions of stride 2 for what is drawn, with batch norm as in the paper; the label stands beside what they find."""

    def __init__(self, width: int, ways: int) -> None:
        super().__init__()
        self.marks = ways + 1
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.seen = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(256, found := width - self.marks), nn.BatchNorm1d(found)
        )

    def forward(self, content_NF: Tensor) -> Tensor:
        image, mark = content_NF.split([SIDE**2, self.marks], 1)
        return torch.cat([self.seen(image.view(-1, 1, SIDE, SIDE)), 2 * mark], 1)

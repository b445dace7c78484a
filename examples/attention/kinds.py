"""Kinds of data of the examples in this folder."""

from dataclasses import dataclass

import numpy as np
import torch
from sets import WORDS
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


@dataclass(frozen=True)
class Cells(Tokenizer):
    """Pictures (N, 14, 14) in 0..1, one token each, through a small convolutional net; an empty one marks the end, for the stop."""

    feature_size = 14 * 14

    def encode(self, value: np.ndarray) -> Tokens:
        cells = nn.functional.pad(torch.from_numpy(value).flatten(1), (0, 0, 0, 1))
        return Tokens(cells, at_times(torch.arange(len(cells)) * 1.0))

    def embed(self, width: int) -> nn.Module:
        convs = (nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        return nn.Sequential(nn.Unflatten(1, (1, 14, 14)), *convs, nn.Flatten(), nn.Linear(32 * 4 * 4, width))


@dataclass(frozen=True)
class Caption(Tokenizer):
    """Words of the captions."""

    causal: bool = True
    vocab_size = len(WORDS)

    def encode(self, value: str) -> Tokens:
        ids = [WORDS.index(word) for word in value.split()]
        return Tokens(torch.tensor(ids), self.places(len(ids)))

    def decode(self, tokens: Tokens) -> str:
        return " ".join(WORDS[i] for i in tokens.content.tolist())


@dataclass(frozen=True)
class Canvas(Tokenizer):
    """A canvas as 36 annotation vectors, 6 x 6 squares of 8 pixels that a convolutional net sees together; or as their mean."""

    mean: bool = False

    @property
    def feature_size(self) -> int:
        return 64 * 36 if self.mean else 64

    def encode(self, value: np.ndarray) -> Tokens:
        squares = torch.from_numpy(value).unflatten(0, (6, 8)).unflatten(2, (6, 8)).transpose(1, 2)
        tokens = squares.reshape(-1, self.feature_size)
        return Tokens(tokens, torch.zeros(len(tokens), 3))

    def embed(self, width: int) -> nn.Module:
        return Annotations(width, self.mean)


class Annotations(nn.Module):
    """Squares of whole canvases -> annotation vectors; the net also sees how far down and right each pixel lies."""

    where: Tensor

    def __init__(self, width: int, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.convs = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 5, 2, 2), nn.ReLU(), nn.Conv2d(64, width, 1)),
        )
        side = torch.linspace(-1, 1, 48)
        self.register_buffer("where", torch.stack(torch.meshgrid(side, side, indexing="ij")), persistent=False)

    def forward(self, content: Tensor) -> Tensor:
        canvas = content.view(-1, 6, 6, 8, 8).transpose(2, 3).reshape(-1, 1, 48, 48)
        seen = self.convs(torch.cat([canvas, self.where.expand(len(canvas), -1, -1, -1)], 1)).flatten(2)
        return seen.mean(2) if self.mean else seen.transpose(1, 2).flatten(0, 1)

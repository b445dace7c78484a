"""Comparison of encoders of pictures with those of transformers and timm."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from multimodal.pretrained import Pretrained
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import ClassTokens, ImagePatches
from tests.pretrained.compared import states_or_logits

LABELS = {str(i): f"class {i}" for i in range(5)}


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Pictures (3, rows, columns) in 0..1."""
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=draw) for size in sizes]


def normalised(picture_CYX: Tensor) -> Tensor:
    """What both models read: a batch of one."""
    return (picture_CYX[None] - 0.5) / 0.5


def tokens(loaded: Pretrained, picture_CYX: Tensor) -> Tokens:
    """Its tokens at its own size."""
    tokenizer = loaded.tokenizers["image"]
    assert isinstance(tokenizer, ClassTokens)
    assert isinstance(tokenizer.of, ImagePatches)
    return replace(tokenizer, of=replace(tokenizer.of, fit=None, mean=0.5, std=0.5))(picture_CYX)


def ours(loaded: Pretrained, values: list[Tensor]) -> list[Tensor]:
    """The logits of a classifier, or the states, of all pictures in one pack."""
    return states_or_logits(loaded, "image", [tokens(loaded, x) for x in values])


def vectors(loaded: Pretrained, values: list[Tensor]) -> Tensor:
    """The unit vectors of an encoder without a head."""
    return loaded.model().vectors("image <-> other:image", [{"image": tokens(loaded, x)} for x in values])

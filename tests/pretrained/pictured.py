"""Comparison of encoders of pictures with those of transformers and timm."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from multimodal.pretrained import Pretrained
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import ClassTokens, ImagePatches
from tests.pretrained.compared import TOLERANCE, largest, states_by_sample

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


def task_of(loaded: Pretrained) -> str:
    return loaded.tasks[0].pattern


def samples(loaded: Pretrained, values: list[Tensor], answers: bool = False) -> list[dict[str, Any]]:
    other = {"other": None} if "<->" in task_of(loaded) else {}
    return [{"image": tokens(loaded, x), **other, **({"label": 0} if answers else {})} for x in values]


def states(loaded: Pretrained, values: list[Tensor]) -> list[Tensor]:
    """The states of all pictures in one pack."""
    return states_by_sample(loaded.model(), task_of(loaded), samples(loaded, values))


def logits(loaded: Pretrained, values: list[Tensor]) -> list[Tensor]:
    model = loaded.model()
    with torch.inference_mode():
        stream = model.pack("image -> label", samples(loaded, values), answers=False)
        found = model.logits(stream)["image -> label"]
    numbers = stream.readings["image -> label"].samples
    by_number = dict(zip(numbers, found, strict=True))
    return [by_number[i] for i in range(len(values))]


def vectors(loaded: Pretrained, values: list[Tensor]) -> Tensor:
    """The unit vectors of an encoder without a head."""
    return loaded.model().vectors(task_of(loaded), samples(loaded, values), side="left")


def check_packed_and_alone(
    loaded: Pretrained,
    values: list[Tensor],
    ours: Callable[[Pretrained, list[Tensor]], list[Tensor]],
    theirs: list[Tensor],
) -> float:
    """Ours are theirs, all pictures in one pack and each alone; the largest difference."""
    worst = [largest(ours(loaded, values), theirs)]
    worst += [largest(ours(loaded, [x]), [wanted]) for x, wanted in zip(values, theirs, strict=True)]
    assert max(worst) < TOLERANCE, worst
    return max(worst)

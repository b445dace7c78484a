"""Weights of theirs as weights of ours, and back: every tensor exactly once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multimodal.pretrained.family import Blueprint, Pair, matching
from multimodal.pretrained.source import Source
from multimodal.shapes import CheckpointError
from multimodal.texts import shortened


def converted(
    source: Source, blueprint: Blueprint, shapes: Mapping[str, torch.Size], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(our weights by name, the tensors of theirs that this model has no use for and why).

    shapes: by name, those of our weights. dtype: their precision; None: as they are stored.

    Raises:
        CheckpointError: a tensor that is missing, or that nothing asks for, or that has another shape.
    """
    read: set[str] = set()
    ours: dict[str, Tensor] = {}
    for pair in blueprint.pairs:
        if pair.ours in ours:
            raise AssertionError(f"{pair.ours} is made twice")
        if missing := [name for name in pair.theirs if name not in source.tensors]:
            raise CheckpointError(
                f"{source.name}: there is no tensor {missing[0]!r}; it has {shortened(', '.join(sorted(source.tensors)), 300)}"
            )
        if twice := read.intersection(pair.theirs):
            raise AssertionError(f"{twice} are read twice")
        read.update(pair.theirs)
        given = [source.tensors[name] for name in pair.theirs]
        try:
            made = pair.join(*given)
        except RuntimeError:
            made = None
        if made is None or made.shape != shapes[pair.ours]:
            found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(pair.theirs, given, strict=True))
            raise CheckpointError(
                f"{source.name}: {found}: by the configuration they should make a tensor of {tuple(shapes[pair.ours])}"
            )
        ours[pair.ours] = (made if dtype is None else made.to(dtype)).contiguous()
    for copy, original in blueprint.copies.items():
        if copy in source.tensors:
            read.add(copy)
            if not torch.equal(source.tensors[copy], source.tensors[original]):
                raise CheckpointError(
                    f"{source.name}: {copy} should equal {original}, to which it is tied, and does not"
                )
    unused: dict[str, str] = {}
    for name in source.tensors:
        if name in read or matching(blueprint.derived, name):
            continue
        pattern = matching(list(blueprint.unused), name)
        if pattern is None:
            raise CheckpointError(
                f"{source.name}: nothing uses the tensor {name!r}, so ours would compute something else; it is refused"
            )
        unused[name] = blueprint.unused[pattern]
    return ours, unused


def given_back(pairs: Sequence[Pair], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by name, from our weights."""
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        theirs |= zip(pair.theirs, pair.split(weights[pair.ours]), strict=True)
    return theirs

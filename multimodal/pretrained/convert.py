"""Converts their tensors to our weights, and back; every tensor is used exactly once."""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from multimodal.pretrained.family import Blueprint, Pair, matching
from multimodal.pretrained.source import CONFIG, Source
from multimodal.shapes import CheckpointError
from multimodal.texts import shortened

STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Precisions that can be read: floating-point numbers, not codes that need a scale."""


def our_weights(
    source: Source, blueprint: Blueprint, shapes: Mapping[str, torch.Size], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (our weights by name, {name: reason} of the tensors that this model does not need).

    shapes: of our weights, by name. dtype: the precision of our weights; None: as in the file.

    Raises:
        CheckpointError: a tensor is missing, unknown, quantized, of another shape, or a copy that differs from its original.
    """
    read: set[str] = set()
    ours: dict[str, Tensor] = {}
    uses = Counter((name, pair.part) for pair in blueprint.pairs for name in pair.theirs)
    assert set(uses.values()) <= {1}, f"{uses.most_common(1)[0][0]} is used twice"
    for pair in blueprint.pairs:
        if missing := [name for name in pair.theirs if name not in source.tensors]:
            wanted = [name for other in blueprint.pairs for name in other.theirs]
            raise CheckpointError(
                f"{source.name}: there is no tensor {missing[0]!r}{_layers(missing[0], wanted, source.tensors)}; it has "
                f"{shortened(', '.join(sorted(source.tensors)), 300)}"
            )
        read.update(pair.theirs)
        given = [source.tensors[name] for name in pair.theirs]
        for name, x in zip(pair.theirs, given, strict=True):
            if x.dtype not in STORED:
                raise CheckpointError(
                    f"{source.name}: {name} is stored as {x.dtype}, not as floating-point numbers of 16, 32 or 64 bits; take the "
                    "model before it was quantized"
                )
        try:
            made = pair.join(*given)
        except RuntimeError:
            made = None
        if made is None or made.shape != shapes[pair.ours]:
            found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(pair.theirs, given, strict=True))
            raise CheckpointError(
                f"{source.name}: {found}: the configuration needs a tensor of shape {tuple(shapes[pair.ours])} here"
            )
        ours[pair.ours] = (made if dtype is None else made.to(dtype)).contiguous()
    for copy, original in blueprint.copies.items():
        if copy in source.tensors:
            read.add(copy)
            if not torch.equal(source.tensors[copy], source.tensors[original]):
                raise CheckpointError(
                    f"{source.name}: {copy} differs from {original}, although the configuration ties them"
                )
    unused: dict[str, str] = {}
    for name in source.tensors:
        if name in read or matching([*blueprint.derived, *blueprint.spare], name):
            continue
        pattern = matching(list(blueprint.unused), name)
        if pattern is None:
            wanted = [other for pair in blueprint.pairs for other in pair.theirs]
            raise CheckpointError(
                f"{source.name}: nothing uses the tensor {name!r}, so our model would compute something else"
                f"{_layers(name, wanted, source.tensors)}"
            )
        unused[name] = blueprint.unused[pattern]
    return ours, unused


def _layers(name: str, wanted: Iterable[str], there: Iterable[str]) -> str:
    """How many layers the configuration asks for and how many the file has, if they differ where this tensor is; else ''."""
    for number in re.finditer(r"(?<![^.])\d+(?=\.)", name):
        before = name[: number.start()]
        layer = re.compile(rf"{re.escape(before)}(\d+)\.")
        asked, given = ({int(m[1]) for other in names if (m := layer.match(other))} for names in (wanted, there))
        # numbers with gaps are those of other modules in a row
        if asked and given and asked != given and all(own == set(range(len(own))) for own in (asked, given)):
            layers = "layer" if len(asked) == 1 else "layers"
            return f"; {CONFIG} asks for {len(asked)} {layers} in {before.rstrip('.')}, the weights have {len(given)}"
    return ""


def packed_spare(source: Source, blueprint: Blueprint) -> str | None:
    """The tensors of `Blueprint.spare`, as safetensors in base64; None: there are none."""
    found = {name: source.tensors[name].clone() for name in source.tensors if matching(blueprint.spare, name)}
    return base64.b64encode(save(found)).decode("ascii") if found else None


def unpacked_spare(packed: str | None) -> dict[str, Tensor]:
    """The inverse of `packed_spare`.

    Raises:
        CheckpointError: the data are damaged.
    """
    try:
        return load(base64.b64decode(packed)) if packed else {}
    except (ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the origin's spare tensors cannot be read: {shortened(error, 200)}") from None


def their_tensors(pairs: Sequence[Pair], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by name, from our weights."""
    theirs: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for pair in pairs:
        found = dict(zip(pair.theirs, pair.split(weights[pair.ours]), strict=True))
        if pair.part is None:
            theirs |= found
            continue
        for name, part in found.items():
            number, count = pair.part
            parts.setdefault(name, {})[number] = part
            if len(parts[name]) == count:
                theirs[name] = torch.cat([parts[name][i] for i in range(count)])
    return theirs

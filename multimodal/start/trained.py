"""The quick path from trained weights of others: an encoder that stays as it is, whose vectors a small core reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal.pretrained import pretrained
from multimodal.shapes import ConfigError
from multimodal.tower import Pooled, Tower

WEIGHTS = {"image": "facebook/dinov2-small", "text": "sentence-transformers/all-MiniLM-L6-v2"}
"""By kind, an encoder that often helps, for messages."""


@dataclass(frozen=True)
class Trained:
    """An encoder of others as the tokenizer of a kind.

    kind: the kind of the data that it reads.
    tower: the encoder; the mean of its states is one token.
    code: the Python expression that makes it.
    """

    kind: str
    tower: Tower
    code: str


def trained(source: str, fields: Mapping[str, Mapping[str, Any]], train: Any) -> Trained:
    """The encoder of a pretrained model for the fields that are read.

    fields: what was seen of each. train: the training samples.

    Raises:
        ConfigError: the fields are of several kinds, or of one that the model does not read. CheckpointError: no such model.
    """
    kinds = {seen["kind"] for seen in fields.values()}
    if len(kinds) > 1:
        raise ConfigError(
            f"--start {source} reads one kind, and the data have {', '.join(sorted(kinds))}; --read chooses the columns, or write "
            "a program (docs/pretrained.md)"
        )
    (kind,) = kinds
    found = pretrained(source)
    if kind not in found.tokenizers:
        raise ConfigError(
            f"--start {source} reads {', '.join(sorted(found.tokenizers))}, and the data are of the kind {kind!r}; give weights "
            f"for that kind{f', such as {WEIGHTS[kind]}' if kind in WEIGHTS else ''}, or leave --start out"
        )
    most = getattr(found.core, "learned_times", None) if kind == "text" else None
    if most is None:
        cells = (train[i][name] for i in range(len(train)) for name in fields)
        value = next(cell for cell in cells if cell is not None)
        most = max(1, len(found.tokenizers[kind](value)))
    tower = Tower.of(found, Pooled(most), kind=kind)
    return Trained(kind, tower, f"mm.Tower.of(mm.pretrained({source!r}), mm.tower.Pooled({most}), kind={kind!r})")

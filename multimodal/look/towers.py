"""A tower of a model as a model of its own, for the X-ray and the other tools."""

from typing import Any, cast

from multimodal.heads import Contrast
from multimodal.heads.pool import Mean
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.task import Task
from multimodal.tower import Dropped, Pooled, Tower


def inside(model: Model, kind: str) -> Model:
    """The tokenizer and core of a kind's tower as a model of this kind; it shares the weights.

    A tower computes each value as if it were alone, so this model computes the same. Its task is the pair "image <-> other:image",
    whose vector is pooled from the inner tokens that the connector uses.

    Raises:
        ConfigError: the kind is none of the model's, or no tower.

    Examples:
        >>> eye = mm.Tower(ImagePatches(patch=4, channels=1), mm.Core.tiny())
        >>> seeing = mm.Model({"image": eye, "label": Labels(("a", "b"))}, mm.Core.tiny(), ["image -> label"])
        >>> ray = xray(inside(seeing, "image"), "image <-> other:image", {"image": square})
    """
    towers = {name: t for name, t in model.packer.tokenizers.items() if isinstance(t, Tower)}
    if kind not in towers:
        there = f"the towers are {', '.join(towers)}" if towers else "this model has no tower"
        raise ConfigError(f"inside: {kind!r} is no tower; {there}")
    tower, embed, pool = towers[kind], cast(Any, model.embeds[kind]), Mean()
    part, connector = embed.frozen_part, tower.connector
    if isinstance(connector, Dropped):
        pool = Mean(skip=connector.count)
    elif isinstance(connector, Pooled):
        pool = connector.pool
    head = Contrast(pool.width(tower.core.width), pool=pool, maps=())
    task = Task(f"{kind} <-> other:{kind}", head)
    found = Model({kind: tower.tokenizer}, tower.core, [task])
    found.embeds[kind], found.core = part.embed, part.core
    found.readout(task.pattern).pool = part.pool
    return found.to(model.device)

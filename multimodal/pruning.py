"""Learned components that nothing uses are taken out of a trained model: what `PersistentMemory` holds and usage says is empty."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multimodal.attention import MixingWeights, Trace
from multimodal.core import Core
from multimodal.declare import override
from multimodal.layers import PersistentMemory
from multimodal.layers.attend import _Persistent
from multimodal.masks import Prior, Sum
from multimodal.model import Model
from multimodal.shapes import ConfigError


def usage(model: Model, data: Mapping[str, Sequence[Any]]) -> list[Tensor]:
    """N_k of each memory layer: how many tokens of these samples, by task, each component answers for, on average of the heads."""
    counts: list[Tensor] = []
    with model.resting():
        for task, samples in data.items():
            for sample in samples:
                trace = Trace()
                model(model.pack(task, [sample], answers=False), trace=trace)
                seen = [
                    s.log_joint_BHTM.softmax(-1).mean(1).sum((0, 1)) for s in trace.seen if s.name.endswith("memory")
                ]
                counts = [a + b for a, b in zip(counts, seen, strict=True)] if counts else seen
    if not counts:
        raise ConfigError("usage: this model has no PersistentMemory, or there are no samples")
    return counts


def pruned(model: Model, data: Mapping[str, Sequence[Any]], *, below: float = 1.0) -> Model:
    """A model without the components that answer for fewer than `below` tokens of these samples; every other weight is the same.

    The layers of one declaration stay equally large: each keeps its most used ones, as many as the fullest of them needs.

    Raises:
        ConfigError: a core that is not a single `Core` with a `PersistentMemory`.
    """
    core = model.core.core
    if not isinstance(core, Core):
        raise ConfigError(f"pruned: the core is {type(core).__name__}; only a single Core can be pruned")
    counts = usage(model, data)
    places = [i for i, layer in enumerate(core.block) if isinstance(layer, PersistentMemory)]
    sizes = {}
    for n, place in enumerate(places):  # the trace goes block after block
        sizes[place] = max(1, *(int((N_k >= below).sum()) for N_k in counts[n :: len(places)]))
    block = tuple(
        dataclasses.replace(layer, slots=sizes[i], prior=_resized(layer.prior, sizes[i]))
        if isinstance(layer, PersistentMemory)
        else layer
        for i, layer in enumerate(core.block)
    )
    smaller = Model(
        model.packer.tokenizers, override(core, block=block), list(model.tasks.values()), seed=model.seed
    ).to(model.device)
    state = model.state_dict()
    bodies = [
        (name, body, body.key_MGK.shape[0]) for name, body in smaller.named_modules() if isinstance(body, _Persistent)
    ]
    for (name, _, size), N_k in zip(bodies, counts, strict=True):
        keep = torch.argsort(N_k, descending=True)[:size].sort().values
        for key, value in state.items():
            if key in (f"{name}.key_MGK", f"{name}.value_MGK"):
                state[key] = value[keep]
            elif (
                key.startswith(f"{name}.mechanism.prior_weights.")
                and key.endswith(".table")
                and value.shape[1] == len(N_k)
            ):
                state[key] = value[:, keep]
    smaller.load_state_dict(state)
    return smaller.train(model.training)


def _resized(prior: Prior | None, size: int) -> Prior | None:
    if isinstance(prior, MixingWeights):
        return MixingWeights(size)
    if isinstance(prior, Sum):
        left, right = _resized(prior.left, size), _resized(prior.right, size)
        assert left is not None
        assert right is not None
        return Sum(left, right)
    return prior

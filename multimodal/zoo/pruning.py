"""Removes learned components that no token uses from the `PersistentMemory` layers of a trained model."""

import dataclasses
from collections.abc import Mapping

import torch

from multimodal.attention import MixingWeights, Score
from multimodal.core import Core
from multimodal.declare import override
from multimodal.layers import PersistentMemory
from multimodal.layers.attend import _Persistent
from multimodal.look import Usage
from multimodal.masks import Prior, Sum
from multimodal.model import Model
from multimodal.shapes import ConfigError


def pruned(model: Model, used: Mapping[str, Usage], *, below: float = 1.0) -> Model:
    """The model without the components that fewer than `below` tokens use; every other weight is the same.

    used: the result of `multimodal.look.usage`. Layers of one declaration stay equally large: each retains its most used
    components, and the layer that needs most of them gives the number.

    Raises:
        ConfigError: a core that is not a single `Core`, or counts of another model.
    """
    core = model.core.core
    if not isinstance(core, Core):
        raise ConfigError(f"pruned: the core is {type(core).__name__}; only a single Core can be pruned")
    if isinstance(core.block[0], tuple):
        raise ConfigError("pruned: the blocks of this core differ by depth; only a core of equal blocks can be pruned")
    counts = [layer.usage_HM.mean(0) for layer in used.values()]
    places = [i for i, layer in enumerate(core.block) if isinstance(layer, PersistentMemory)]
    if len(counts) != len(places) * core.depth or not counts:
        raise ConfigError(
            f"pruned: this model has {len(places) * core.depth} memories, and there are counts of {len(counts)}; give what "
            "multimodal.look.usage says of this model"
        )
    for place in places:
        layer = core.block[place]
        assert isinstance(layer, PersistentMemory)
        numbered = [p for p in (layer.prior.parts() if layer.prior else ()) if not isinstance(p, MixingWeights)]
        if numbered or type(layer.score or core.score).keys is not Score.keys:
            raise ConfigError(
                f"pruned: {layer} looks at its components by their number, and pruning would number them anew; only components "
                "without a prior, or with MixingWeights, can be taken out"
            )
        if any(len(N_k) != layer.slots for N_k in counts[places.index(place) :: len(places)]):
            raise ConfigError(
                "pruned: the counts are of memories of another size; give what multimodal.look.usage says of this model"
            )
    # one declaration builds a memory in every block, so all of these have one size
    sizes = {}
    for n, place in enumerate(places):  # block after block
        sizes[place] = max(1, *(int((N_k >= below).sum()) for N_k in counts[n :: len(places)]))
    block = tuple(
        dataclasses.replace(layer, slots=sizes[i], prior=_resized(layer.prior, sizes[i]))
        if isinstance(layer, PersistentMemory)
        else layer
        for i, layer in enumerate(core.block)
    )
    smaller = Model(
        model.packer.tokenizers, override(core, block=block), list(model.tasks.values()), seed=model.seed
    ).to(model.device, model.dtype)
    state = model.state_dict()
    bodies = [(name, body) for name, body in model.named_modules() if isinstance(body, _Persistent)]
    for (name, body), N_k, layer in zip(bodies, counts, [block[i] for i in places] * core.depth, strict=True):
        assert isinstance(layer, PersistentMemory)
        index_N = torch.argsort(N_k, descending=True)[: layer.slots].sort().values
        for key in (f"{name}.key_MGK", f"{name}.value_MGK"):
            state[key] = state[key][index_N]
        for n, prior in enumerate(body.mechanism.priors):
            if isinstance(prior, MixingWeights):
                key = f"{name}.mechanism.prior_weights.{n}.table"
                state[key] = state[key][:, index_N]
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

"""Parameters of a model by part, and the FLOPs of one token: both exact."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.composite import Composite
from multimodal.core import Transformer
from multimodal.count.streams import StreamStats
from multimodal.layers import Sublayer
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Places, Tokenizer

SAMPLE_TOKENS = 64  # tokens with which an embedding is counted


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of the matrix products of one token of the stream; a multiplication and an addition are two.

    forward: of a forward pass, by part ("core", "embeddings", "heads").
    training: of a training step, forward and backward.
    again: what activation checkpointing adds. It computes the blocks once more, except the last product of each, whose result
        nothing needs.
    """

    forward: Mapping[str, float]
    training: float
    again: float


def parameters(model: Model) -> dict[str, int]:
    """Number of parameters by part, exact."""
    return {
        part: sum(p.numel() for p in module.parameters())
        for part, module in (("embeddings", model.embeds), ("core", model.core), ("heads", model.readouts))
    }


def transformer(model: Model) -> Transformer:
    """The model's core.

    Raises:
        ConfigError: an EncoderDecoder, which the plan does not know.
    """
    if not isinstance(model.core, Transformer):
        raise ConfigError("plan: an EncoderDecoder is not modelled; plan a Core of as many parameters instead")
    return model.core


def token_flops(model: Model, stats: StreamStats) -> Flops:
    """FLOPs of a token. Core: `Core.flops`, with the number of tokens that the mask lets a token see; backward twice that."""
    core = transformer(model).core
    # layers behind the last mixing one are computed for the rows that heads read only
    last = sum(p.numel() for layer in rowwise_layers(model) for p in layer.parameters() if p.dim() >= 2)
    forward = {"core": core.flops(1, stats.context) - 2.0 * last * (1 - stats.wanted), "embeddings": 0.0, "heads": 0.0}
    # a product counts twice in the backward pass: the gradients of its input and of its weights
    training = 3 * forward["core"]
    for kind, share in stats.kinds.items():
        if not kind.startswith("head:"):
            # content from the data needs no gradient, which the count on the module itself shows
            cost = embed_cost(model.packer.kinds[kind].tokenizer, core.width, False)
            forward["embeddings"] += share * cost.forward
            training += share * cost.training
    for key, rows in stats.rows.items():
        matrices = [p for name, p in model.readouts[key].named_parameters() if p.dim() >= 2 and name != "query"]
        forward["heads"] += 2.0 * rows * sum(p.numel() for p in matrices)
    training += 3 * forward["heads"]
    ends = [[m for m in block.modules() if isinstance(m, nn.Linear)][-1:] for block in transformer(model).blocks]
    spared = sum(2.0 * linear.weight.numel() for end in ends for linear in end)
    return Flops(forward=forward, training=training, again=forward["core"] - spared)


def rowwise_layers(model: Model) -> list[Sublayer]:
    """Layers behind the last one that mixes tokens: of them only the rows that heads read are computed (`StreamStats.wanted`)."""
    block: Any = transformer(model).blocks[-1]
    return list(block.layers)[block.last_mixing + 1 :]


@dataclass(frozen=True, kw_only=True)
class EmbedCost:
    """What embedding one token of a kind costs.

    forward: FLOPs of the forward pass.
    training: FLOPs with the backward pass.
    saved: bytes saved for the backward pass, the content itself not counted.
    known: False where the module cannot be run without data, so that `forward` and `training` follow from its matrices.
    """

    forward: float
    training: float
    saved: float
    known: bool = True


def embed_cost(tokenizer: Tokenizer, width: int, half: bool) -> EmbedCost:
    """The cost of embedding, counted on device "meta", so for any size. half: under autocast to bfloat16."""
    from torch.utils.flop_counter import FlopCounterMode

    if isinstance(tokenizer, Composite):  # its marks, which are looked up; each part is a kind of its own
        return EmbedCost(forward=0.0, training=0.0, saved=0.0)
    with torch.device("meta"):
        module = tokenizer.embed(width)
        features = tokenizer.feature_size
        ids = tokenizer.vocab_size is not None
        content = torch.zeros(SAMPLE_TOKENS, dtype=torch.long) if ids else torch.zeros(SAMPLE_TOKENS, features or 1)
    try:
        with FlopCounterMode(display=False) as counter, saved_bytes([*module.parameters(), content]) as saved:
            if getattr(module, "reads_places", False):
                # one value along time
                axes, count = len(tokenizer.axes), SAMPLE_TOKENS
                position_NA = torch.zeros(count, axes, device="meta")
                out = module(content, Places(position_NA, (count,), ((count, *[1] * (axes - 1)),)))
            else:
                out = module(content)
            forward = counter.get_total_flops() / SAMPLE_TOKENS
            out.sum().backward()
        training = counter.get_total_flops() / SAMPLE_TOKENS
        # under autocast the content is copied to bfloat16, and what was counted in float32 is half as large
        cast = 2.0 * (features or 0) if half else 0.0
        return EmbedCost(
            forward=forward, training=training, saved=saved() / SAMPLE_TOKENS * (0.5 if half else 1.0) + cast
        )
    except (RuntimeError, NotImplementedError):  # a module that looks at its content cannot run on device "meta"
        weights = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
        return EmbedCost(forward=2.0 * weights, training=6.0 * weights, saved=0.0, known=False)


@contextmanager
def saved_bytes(without: list[Tensor]) -> Iterator[Any]:
    """A function that returns the bytes that autograd has saved for the backward pass; each storage once, `without` not at all."""
    known = {t.untyped_storage()._cdata for t in without}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            # the tensor stays alive, so that no other storage gets its address
            found[storage._cdata] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(size for size, _ in found.values())

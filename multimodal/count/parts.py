"""A model's parts: parameters counted exactly, products of a token counted as FLOPs, and what a layer keeps for its gradient."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.attention import Layout, Span, plan_attention
from multimodal.core import Core, Transformer
from multimodal.count.streams import StreamFacts
from multimodal.layers import Add, Context, Layer, SelfAttention, Sublayer
from multimodal.layers.mlp import _MLP
from multimodal.masks import MaskInfo
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer

TRIED = 64  # tokens with which an embedding is counted
MOST_TRIED = 20_000_000  # parameters of a layer that is run to see what it keeps


@contextmanager
def outlined() -> Iterator[None]:
    """Every Model that is made inside has no memory for its weights, however large: enough to plan it, not to run it."""
    make = Model.__init__

    def without_memory(self: Model, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            make(self, *args, **kwargs)
        self.state_dict = lambda *_, **__: {}  # type: ignore[method-assign] # no weights that could be saved or compared

    Model.__init__ = without_memory  # a recipe file makes its model itself, so there is no argument to say it with
    try:
        yield
    finally:
        Model.__init__ = make


def parameters(model: Model) -> dict[str, int]:
    """Exact number by part."""
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


@dataclass(frozen=True, kw_only=True)
class EmbedCost:
    """What embedding one token of a kind costs: FLOPs forward and with the gradient, and bytes kept beside the content itself."""

    forward: float
    training: float
    kept: float
    known: bool = True


def embed_cost(tokenizer: Tokenizer, width: int, half: bool) -> EmbedCost:
    """Counted on an embedding without memory (device "meta"), so of any size."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = tokenizer.embed(width)
        features = tokenizer.feature_size
        content = torch.zeros(TRIED, dtype=torch.long) if tokenizer.vocab_size else torch.zeros(TRIED, features or 1)
    try:
        with FlopCounterMode(display=False) as counter, kept_bytes([*module.parameters(), content]) as kept:
            out = module(content)
            forward = counter.get_total_flops()
            out.sum().backward()
        forward, training = forward / TRIED, counter.get_total_flops() / TRIED
        cast = 2.0 * (features or 0) if half else 0.0  # of the content; what was counted is half as large too
        return EmbedCost(forward=forward, training=training, kept=kept() / TRIED * (0.5 if half else 1.0) + cast)
    except (RuntimeError, NotImplementedError):  # what looks at its content cannot be run without any
        weights = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
        return EmbedCost(forward=2.0 * weights, training=6.0 * weights, kept=0.0, known=False)


@contextmanager
def kept_bytes(without: list[Tensor]) -> Iterator[Any]:
    """A function that says how many bytes autograd keeps for the gradient, each piece of memory once, `without` not at all."""
    known = {t.untyped_storage()._cdata for t in without}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes(), t  # held, so that no other piece can get its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(size for size, _ in found.values())


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one token of the stream: a forward pass by part, and a training step of it (forward and backward)."""

    forward: Mapping[str, float]
    training: float
    again: float  # more, where blocks are computed again: all but each block's last product, whose result nothing needs


def token_flops(model: Model, facts: StreamFacts) -> Flops:
    """Matrix products only. Core: `Core.flops`, with the number of tokens that the mask lets a token see; backward twice that.

    A product counts twice in the backward pass, for its input and its weights; what is embedded from the data needs no gradient
    of its input, which the count on the module itself shows.
    """
    core = transformer(model).core
    lone = sum(p.numel() for layer in lone_layers(model) for p in layer.parameters() if p.dim() >= 2)
    forward = {"core": core.flops(1, facts.context) - 2.0 * lone * (1 - facts.wanted), "embeddings": 0.0, "heads": 0.0}
    training = 3 * forward["core"]
    for kind, share in facts.kinds.items():
        if not kind.startswith("head:"):
            cost = embed_cost(model.packer.tokenizers[kind], core.width, False)
            forward["embeddings"] += share * cost.forward
            training += share * cost.training
    for key, rows in facts.rows.items():
        forward["heads"] += 2.0 * rows * readout_weights(model, key)
    training += 3 * forward["heads"]
    last = [[m for m in block.modules() if isinstance(m, nn.Linear)][-1:] for block in transformer(model).blocks]
    spared = sum(2.0 * linear.weight.numel() for found in last for linear in found)
    return Flops(forward=forward, training=training, again=forward["core"] - spared)


def readout_weights(model: Model, key: str) -> int:
    """Numbers in the matrices of a head's learnable half that its rows are multiplied by."""
    return sum(p.numel() for name, p in model.readouts[key].named_parameters() if p.dim() >= 2 and name != "query")


def classes(model: Model, key: str) -> int:
    """V, the width of a head's logits."""
    linear = getattr(model.readouts[key], "linear", None)
    return linear.out_features if isinstance(linear, nn.Linear) else 0  # heads that point or pair have no classes


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one token that one layer keeps for its gradient, by part, and what its backward pass needs besides at its worst."""

    parts: Mapping[str, float]
    working: float = 0.0
    known: bool = True

    def of(self, share: float) -> "Kept":
        """Where the layer is computed for that share of the tokens."""
        parts = {name: share * size for name, size in self.parts.items()}
        return Kept(parts=parts, working=share * self.working, known=self.known)


def lone_layers(model: Model) -> list[Sublayer]:
    """Layers behind the last one that mixes tokens: of them only the rows that heads read are computed (`StreamFacts.wanted`)."""
    if not isinstance(model.core, Transformer):
        return []
    last: Any = model.core.blocks[-1]
    return list(last.layers)[last.mixing + 1 :]


def layer_kept(sublayer: Sublayer, core: Core, facts: StreamFacts, *, half: bool, cuda: bool) -> Kept:
    """What a layer with its norm and merge keeps. Closed form for attention with a bare mechanism and for the MLP, else measured.

    Of all rows: where few are read (`StreamFacts.wanted`) the last attention keeps less on CPUs.

    Element sizes e: 4, or 2 under autocast; the residual stream, norms and their inputs stay float32.
        norm       input 4 D, its 1 / rms 4; output e D (which the projection reads)
        attention  qkv e (H + 2G) K, normed and turned q and k e (H + G) K, result e H K, log-sum-exp 4 H, 1 / rms of q and k
                   4 (H + G); the result once more (e H K) where runs of other shapes are joined, or cast (autocast);
                   autocast: q and k in float32 before their norm 4 (H + G) K; CUDA's kernel, called twice for a prefix-LM: result
                   and log-sum-exp of both calls
        MLP        gate and up e 2M, silu e M, product e M
    """
    width = sublayer.norm.weight.shape[0]
    bare = isinstance(sublayer.layer.merge, Add) and sublayer.width == width
    dropped = (1.0 if cuda else 4.0) * width if sublayer.dropout else 0.0  # a mask; on CPUs it is of the stream's type
    size = 2.0 if half else 4.0
    norms = {"norms": 4.0 * width + 4.0 + dropped, "projections": size * width}
    body: Any = sublayer.body
    if bare and isinstance(body, _MLP):
        hidden = body.down.in_features
        # at worst the gradient of the product and both its factors are there, and of what was kept only the product is gone
        return Kept(parts={**norms, "MLP": size * 4 * hidden}, working=size * 2 * hidden + (4.0 + size) * width)
    if bare and type(sublayer.layer) is SelfAttention and body.attention.mechanism.bare:
        a = body.attention
        q, k, v = a.heads * a.key_width, a.kv_heads * a.key_width, a.kv_heads * a.value_width
        out, normed = a.heads * a.value_width, core.qk_norm
        turned = a.turned and any(core.rotary_split)
        kept = size * (q + k) if normed or turned else 0.0
        read = size * out + 4.0 * a.heads
        if cuda and half and 0 < facts.free < 1:  # two calls of the kernel, over all rows each
            read *= 2
        qkv = size * (q + k + v)
        joined = size * out if half or facts.runs else 0.0
        floats = 4.0 * (q + k) if half and normed else 0.0
        masks = size * facts.mixed if not (cuda and half) else 0.0
        norms["norms"] += (4.0 * (a.heads + a.kv_heads) if normed else 0.0) + floats
        norms["projections"] += qkv + joined
        return Kept(
            parts={**norms, "attention": kept + read + masks}, working=size * (2 * out + q + k + v) + 4.0 * width
        )
    if sum(p.numel() for p in sublayer.parameters()) > MOST_TRIED:
        return Kept(parts={"norms": 4.0 * width}, known=False)
    fixed, slope = _measured(sublayer.layer, core, width, half)
    return Kept(parts={"other layers": fixed + slope * facts.length}, working=fixed + slope * facts.length)


@lru_cache(64)
def _measured(layer: Layer, core: Core, width: int, half: bool) -> tuple[float, float]:
    """(a, b): a layer keeps a + b n bytes a token in samples of n tokens, seen on two samples each of 16 and of 32 tokens."""
    with torch.random.fork_rng(devices=[]):
        sublayer = Sublayer(layer, core, width, 0.0, 0.0).train()
    found = []
    for length in (16, 32):
        spans = (Span(0, length), Span(0, length))
        order = torch.arange(length).repeat(2)
        sample = torch.arange(2).repeat_interleave(length)
        places = MaskInfo(sample, order, torch.zeros_like(order), torch.zeros_like(order))
        layout = Layout(spans, places)
        position_TA = torch.zeros(2 * length, 3)
        context = Context(layout, plan_attention(core.mask, layout, bare=False), core.outline().rotations(position_TA))
        stream_TD = torch.randn(2 * length, width, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), kept_bytes(list(sublayer.parameters())) as kept:
            sublayer(stream_TD, context)
            found.append(kept() / (2 * length))
    slope = max(0.0, (found[1] - found[0]) / 16)
    return max(found[0] - 16 * slope, 0.0), slope

"""Memory of one process while it trains, by part, at the moments of a step when most of it is taken; the largest is what must fit.

Always there: weights 4 bytes a parameter, the optimiser's state (AdamW: two moments, 8; Muon: 4 for the core's matrices), averaged
weights 4. Under "fsdp" each process holds its share of these and of the gradients (of these all, with several micro-batches: they
are exchanged behind the last one), and whole what lies outside the blocks and a few blocks with the buffers they are sent in.
Under "ddp" the gradients lie once more in the buckets they are sent in. Gradients (4 bytes) come one block after the other, last
block first, while what the block saved is freed; they are all there from the start where there are several micro-batches or
processes. Under autocast every matrix has a copy in bfloat16 to the end of the forward pass, and to its gradient without activation
checkpointing; "fsdp" does not share these out. Tensor parallel divides the matrices of the core, with what they save; context
parallel the tokens of its blocks, and each process has the embedded tokens and the last states whole.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from multimodal.attention import Layout, Span, plan_layers
from multimodal.core import Core
from multimodal.count.flops import embed_cost, parameters, rowwise_layers, saved_bytes, transformer
from multimodal.count.streams import StreamStats
from multimodal.generate.step import is_default
from multimodal.layers import Attention, Context, Layer, SelfAttention, Sublayer
from multimodal.layers.mlp import _MLP, _UngatedMLP
from multimodal.masks import MaskInfo
from multimodal.model import Model
from multimodal.norm import RMSNorm

FLOAT = 4  # bytes
GATHERED_BLOCKS = 3  # FSDP2: the weights of this block, of the next one, and the buffer they are fetched in
# FSDP2: a block's gradients, the zeros that `fit` gives all parameters, and the buffer that is sent
GRADIENT_BLOCKS = 3
MOST_RUN = 20_000_000  # parameters; a larger layer is not run to see what it saves


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does in a step, and how.

    tokens: tokens of a micro-batch.
    micro_batches: number of micro-batches in a step.
    processes: number of processes that train together.
    parallel: "ddp" or "fsdp", as in the recipe.
    half: whether it computes under autocast to bfloat16.
    cuda: whether it runs on a GPU.
    checkpointing: whether blocks save only their input and are computed again in the backward pass.
    optimizer: "adamw" or "muon", as in the recipe.
    averaged: whether averaged weights (EMA) are held as well.
    tensor, context: numbers of processes that divide the core, and a stream, as in the recipe.
    """

    tokens: float
    micro_batches: int = 1
    processes: int = 1
    parallel: str = "ddp"
    half: bool = False
    cuda: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"
    averaged: bool = False
    tensor: int = 1
    context: int = 1

    @property
    def shards(self) -> int:
        """Number of processes among which weights, state and gradients are sharded."""
        return self.processes // self.tensor if self.parallel == "fsdp" else 1


@dataclass(frozen=True)
class MemoryUse:
    """What one process needs at the moment of a step when it needs most.

    moment: that moment, such as "start of the backward pass".
    parts: bytes at that moment, by part.
    moments: bytes of all parts together, by moment.
    unknown: parts of the model that are not in it, which make it a lower bound.
    """

    moment: str
    parts: Mapping[str, float]
    moments: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def rank_memory(model: Model, stats: StreamStats, work: Work) -> MemoryUse:
    """The most memory that one process takes while it trains."""
    worst, at, sums = {}, "", {}
    step = _Step(model, stats, work)
    for moment, parts in step.moments():
        sums[moment] = max(sums.get(moment, 0.0), sum(parts.values()))
        if sum(parts.values()) > sum(worst.values()):
            worst, at = parts, moment
    return MemoryUse(at, {name: size for name, size in worst.items() if size}, sums, tuple(sorted(step.unknown)))


class _Step:
    """Sizes of everything in a training step, put together moment by moment."""

    def __init__(self, model: Model, stats: StreamStats, work: Work) -> None:
        core = transformer(model)
        self.stats, self.work, self.core = stats, work, core.core
        self.unknown: set[str] = set()
        self.counts = parameters(model)
        self.given = sum(self.counts.values())
        # of what tensor parallel divides, this process has a share
        spared = [_divided(block) * (1 - 1 / work.tensor) for block in core.blocks]
        each = [sum(p.numel() for p in block.parameters()) for block in core.blocks]
        self.block_weights = [size - less for size, less in zip(each, spared, strict=True)]
        self.total = self.given - sum(spared)
        self.outside = self.given - sum(each)
        self.matrices = sum(p.numel() for p in core.parameters() if p.dim() == 2) - sum(spared)
        self.half_weights = [0.0] * len(core.blocks)
        if work.half:
            self.half_weights = [_linear(block) - less for block, less in zip(core.blocks, spared, strict=True)]
        self.half_heads = _linear(model.readouts) if work.half else 0
        self.half_embeds = _linear(model.embeds) if work.half else 0  # no gradient goes to what is embedded
        self.largest = max(p.numel() for p in model.parameters())
        rowwise = rowwise_layers(model)
        self.blocks = [self._block(list(block.layers), rowwise) for block in core.blocks]  # type: ignore[arg-type]
        self.widths = {m.key_width for m in core.modules() if isinstance(m, Attention)}
        self._heads(model)
        self.embedded = 0.0
        for kind, share in stats.kinds.items():
            if not kind.startswith("head:"):
                cost = embed_cost(model.packer.kinds[kind].tokenizer, self.core.width, work.half)
                self.embedded += share * cost.saved
                if not cost.known:
                    self.unknown.add(f"what embedding {kind!r} saves")

    def _block(self, layers: list[Sublayer], rowwise: list[Sublayer]) -> "list[Activations]":
        found = []
        for layer in layers:
            work = self.work
            saved = layer_activations(layer, self.core, self.stats, half=work.half, cuda=work.cuda, tensor=work.tensor)
            # with context parallel all rows pass all layers
            share = self.stats.wanted if layer in rowwise and work.context == 1 else 1 / work.context
            found.append(saved.of(share))
            if not saved.known:
                self.unknown.add(f"what {type(layer.layer).__name__} saves")
        return found

    def _heads(self, model: Model) -> None:
        """Bytes a token: rows and log-probabilities, and what else is there when a forward pass ends and a backward pass starts."""
        size = 2.0 if self.work.half else 4.0
        self.logits = self.forward_more = self.backward_more = self.rows = 0.0
        for key, rows in self.stats.rows.items():
            linear = getattr(model.readouts[key], "linear", None)
            # V, the width of the head's logits; heads that point or pair have no classes
            one = rows * (linear.out_features if isinstance(linear, nn.Linear) else 0)
            self.rows += rows * self.core.width * size
            self.logits += FLOAT * one
            # logits, and in float32 where they were not; then the gradients of the log-probabilities and of the logits
            self.forward_more = max(self.forward_more, one * (6.0 if self.work.half else 4.0))
            self.backward_more = max(self.backward_more, 2 * FLOAT * one)

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        """(moment, bytes by part)."""
        work, tokens, depth = self.work, self.work.tokens, len(self.blocks)
        block_input = {"block inputs": float(FLOAT * self.core.width) / work.context}
        # gradients exist from the start where they are added up, or where other processes wait for them
        whole = work.micro_batches > 1 or work.processes > 1
        fsdp = work.parallel == "fsdp" and work.processes > 1
        always = self._always()
        saved = [_sum(*(layer.parts for layer in block)) for block in self.blocks]
        stays = [block_input if work.checkpointing else parts for parts in saved]
        head = {
            "logits": self.logits + self.rows,
            "norms": FLOAT * (self.core.width + 1.0),
            "embeddings": self.embedded,
        }
        if work.context > 1:  # the embedded tokens and the last states
            head["whole stream"] = 2.0 * FLOAT * self.core.width
        sharded_late = fsdp and work.micro_batches > 1
        gradients = float(FLOAT * self.total) if sharded_late else FLOAT * self.total / work.shards
        first = {"gradients": gradients if whole else 0.0}
        if fsdp:
            first |= self._gathered(depth - 1, gradient_blocks=0)
        elif work.processes > 1:
            first["buckets of gradients"] = FLOAT * float(self.total)
        activations = _times(_sum(*stays, head), tokens)
        yield (
            "end of the forward pass",
            _sum(always, first, activations, {"working": tokens * self.forward_more}, self._casts(depth, ended=False)),
        )
        yield (
            "start of the backward pass",
            _sum(always, first, activations, {"working": tokens * self.backward_more}, self._casts(depth)),
        )
        for index in range(depth - 1, -1, -1):
            done = sum(self.block_weights[index + 1 :]) + self.counts["heads"]
            now = dict(first) if whole else {"gradients": FLOAT * done / work.shards}
            if fsdp:
                now |= self._gathered(index, GRADIENT_BLOCKS)
            # a checkpointed block has been computed again: it has all that it saves, in place of its input
            again = {**saved[index], "block inputs": -block_input["block inputs"]} if work.checkpointing else {}
            held = _times(_sum(*stays[: index + 1], again, {"embeddings": self.embedded}), tokens)
            # the last layer of a block is the first one whose gradient is computed
            working = tokens * max(self.blocks[index][-1].working, FLOAT * 2.0 * self.core.width)
            if work.micro_batches > 1:
                working += FLOAT * self.largest  # a weight's new gradient, before it is added
            yield (
                f"backward pass of block {index + 1}",
                _sum(always, now, held, {"working": working}, self._casts(index + 1)),
            )
        step = {name: first[name] for name in ("buckets of gradients",) if name in first}
        yield "optimiser", _sum(always, {"gradients": gradients}, step)

    def _always(self) -> dict[str, float]:
        work = self.work
        share = FLOAT * self.total / work.shards
        optimizer = 2 * share if work.optimizer == "adamw" else 2 * share - FLOAT * self.matrices / work.shards
        stream = self.stats.content * work.micro_batches + sum(FLOAT * key_width for key_width in self.widths)
        return {
            "weights": share,
            "optimiser state": optimizer,
            "averaged weights": share if work.averaged else 0.0,
            "the model given to fit": 0.0 if work.shards == 1 or work.cuda else FLOAT * float(self.given),
            "stream and places": work.tokens * stream,
        }

    def _gathered(self, index: int, gradient_blocks: int) -> dict[str, float]:
        """What is whole under "fsdp" while block `index` is computed: everything outside the blocks, and some blocks."""
        block = self.block_weights[index]
        return {
            "gathered weights": float(FLOAT * (self.outside + GATHERED_BLOCKS * block)),
            "whole gradients of what is gathered": float(FLOAT * (self.outside + gradient_blocks * block)),
        }

    def _casts(self, blocks: int, ended: bool = True) -> dict[str, float]:
        """bfloat16 copies of matrices: autocast holds them to the end of the forward pass, and autograd for the backward pass."""
        if not self.work.half:
            return {}
        held = 1 if self.work.checkpointing and ended else blocks
        elsewhere = self.half_heads + (0 if ended else self.half_embeds)
        return {"weights in bfloat16": 2.0 * (sum(self.half_weights[:held]) + elsewhere)}


def _linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _sum(*parts: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for some in parts:
        for name, size in some.items():
            total[name] += size
    return dict(total)


def _times(parts: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: size * factor for name, size in parts.items()}


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What one layer saves for its backward pass.

    parts: bytes of one token, by part.
    working: bytes of one token that the backward pass needs besides, at its worst.
    known: False where the layer is too large to be run, so that its own share is missing.
    """

    parts: Mapping[str, float]
    working: float = 0.0
    known: bool = True

    def of(self, share: float) -> "Activations":
        """The same where the layer is computed for that share of the tokens."""
        return Activations(parts=_times(self.parts, share), working=share * self.working, known=self.known)


def _divided(block: nn.Module) -> int:
    """The numbers in the matrices that tensor parallel divides."""
    bodies = [m for m in block.modules() if isinstance(m, (Attention, _MLP, _UngatedMLP))]
    return sum(p.numel() for body in bodies for p in body.parameters() if p.dim() == 2)


def layer_activations(
    sublayer: Sublayer, core: Core, stats: StreamStats, *, half: bool, cuda: bool, tensor: int = 1
) -> Activations:
    """What a layer with its norm and merge saves. Closed form for attention with a bare mechanism and for the MLP, else measured.

    Of all rows: where few are read (`StreamStats.wanted`) the last attention saves less on CPUs. tensor: the number of processes
    that divide heads and hidden units.

    Element sizes e: 4, or 2 under autocast; the residual stream, norms and their inputs stay float32.
        norm       input 4 D, its 1 / rms 4; output e D (which the projection reads)
        attention  qkv e (H + 2G) K, normed and rotated q and k e (H + G) K, result e H K, log-sum-exp 4 H, 1 / rms of q and k
                   4 (H + G); the result once more (e H K) where runs of other shapes are joined, or cast (autocast);
                   autocast: q and k in float32 before their norm 4 (H + G) K; CUDA's kernel, called twice for a prefix-LM: result
                   and log-sum-exp of both calls
        MLP        gate and up e 2M, silu e M, product e M
    """
    width = sublayer.in_width
    # the formulas are of the default layers; any other is run to see what it saves
    bare = is_default(sublayer.layer) and sublayer.width == width and type(sublayer.norm) is RMSNorm
    dropped = (1.0 if cuda else 4.0) * width if sublayer.dropout else 0.0  # a mask; on CPUs it is of the stream's type
    size = 2.0 if half else 4.0
    norms = {"norms": 4.0 * width + 4.0 + dropped, "projections": size * width}
    body: Any = sublayer.body
    if bare and isinstance(body, _MLP):
        hidden = body.down.in_features / tensor
        # at worst the gradient of the product and both its factors are there, and of what was saved only the product is freed
        return Activations(parts={**norms, "MLP": size * 4 * hidden}, working=size * 2 * hidden + (4.0 + size) * width)
    if bare and type(sublayer.layer) is SelfAttention and body.attention.mechanism.bare:
        a = body.attention
        heads, groups = a.heads / tensor, a.kv_heads / tensor
        q, k, v = heads * a.key_width, groups * a.key_width, groups * a.value_width
        out, normed = heads * a.value_width, core.qk_norm
        rotated = a.turned and any(core.rotary_split)
        new_qk = size * (q + k) if normed or rotated else 0.0
        result = size * out + 4.0 * heads
        if cuda and half and 0 < stats.bidirectional < 1:  # two calls of the kernel, over all rows each
            result *= 2
        qkv = size * (q + k + v)
        joined = size * out if half or stats.runs else 0.0
        floats = 4.0 * (q + k) if half and normed else 0.0
        masks = size * stats.mixed if not (cuda and half) else 0.0
        norms["norms"] += (4.0 * (heads + groups) if normed else 0.0) + floats
        norms["projections"] += qkv + joined
        return Activations(
            parts={**norms, "attention": new_qk + result + masks},
            working=size * (2 * out + q + k + v) + 4.0 * width,
        )
    if sum(p.numel() for p in sublayer.parameters()) > MOST_RUN:
        return Activations(parts={"norms": 4.0 * width}, known=False)
    fixed, slope = _measured(sublayer.layer, core, width, half)
    return Activations(parts={"other layers": fixed + slope * stats.length}, working=fixed + slope * stats.length)


@lru_cache(64)
def _measured(layer: Layer, core: Core, width: int, half: bool) -> tuple[float, float]:
    """(a, b): a layer saves a + b n bytes a token in samples of n tokens, seen on two samples each of 16 and of 32 tokens."""
    with torch.random.fork_rng(devices=[]):
        sublayer = Sublayer(layer, core, width, 0.0, 0.0).train()
    found = []
    for length in (16, 32):
        spans = (Span(0, length), Span(0, length))
        order = torch.arange(length).repeat(2)
        sample = torch.arange(2).repeat_interleave(length)
        places = MaskInfo(sample, order, torch.zeros_like(order), torch.zeros_like(order))
        layout = Layout(spans, places)
        position_TA = torch.zeros(2 * length, len(core.axes))
        own = [layer.mask] if isinstance(layer, SelfAttention) and layer.mask is not None else []
        plan, plans = plan_layers(core.mask, own, layout, bare=False)
        context = Context(layout, plan, core.outline().rotations(position_TA), plans=plans)
        stream_TD = torch.randn(2 * length, width, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_bytes(list(sublayer.parameters())) as saved:
            sublayer(stream_TD, context)
            found.append(saved() / (2 * length))
    slope = max(0.0, (found[1] - found[0]) / 16)
    return max(found[0] - 16 * slope, 0.0), slope

"""Memory of one process while it trains, by part, at the moments of a step when most of it is taken; the worst is what must fit.

Always there: weights 4 bytes a parameter, the optimiser's state (AdamW: two moments, 8; Muon: 4 for the core's matrices), averaged
weights 4. Under "fsdp" each process holds its share of these and of the gradients (of these all, with several micro-batches: they
are exchanged behind the last one), and whole what lies outside the blocks and a few blocks with the buffers they are sent in.
Under "ddp" the gradients lie once more in the buckets they are sent in. Gradients (4 bytes) come one block after the other, last
block first, while what the block kept is freed; they are all there from the start where there are several micro-batches or
processes. Under autocast every matrix has a copy in bfloat16 to the end of the forward pass, and to its gradient without activation
checkpointing; "fsdp" does not share these out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from multimodal.attention import Attention
from multimodal.count.parts import Kept, classes, embed_cost, layer_kept, lone_layers, parameters, transformer
from multimodal.count.streams import StreamFacts
from multimodal.model import Model

FLOAT = 4  # bytes
GATHERED_BLOCKS = 3  # FSDP2: the weights of this block, of the next one, and the buffer they are fetched in
GRADIENT_BLOCKS = (
    3  # FSDP2: a block's gradients, the zeros that `fit` gives all parameters, and the buffer that is sent
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does in a step, and how."""

    tokens: float  # of a micro-batch
    micro_batches: int = 1
    processes: int = 1
    parallel: str = "ddp"
    half: bool = False  # autocast to bfloat16
    cuda: bool = False
    checkpointing: bool = False  # blocks keep only what comes in, and are computed again
    optimizer: str = "adamw"
    averaged: bool = False
    cast_by_fsdp: bool = (
        False  # weights are gathered in bfloat16, and not kept so for the gradient: not what `fit` does
    )

    @property
    def shards(self) -> int:
        return self.processes if self.parallel == "fsdp" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the worst moment of a step, and the other moments' sums."""

    moment: str
    parts: Mapping[str, float]
    moments: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()  # parts of the model that are not in it

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def rank_memory(model: Model, facts: StreamFacts, work: Work) -> Memory:
    """The most that one process holds while it trains."""
    worst, at, moments = {}, "", {}
    book = _Book(model, facts, work)
    for moment, parts in book.moments():
        moments[moment] = max(moments.get(moment, 0.0), sum(parts.values()))
        if sum(parts.values()) > sum(worst.values()):
            worst, at = parts, moment
    kept = {name: size for name, size in worst.items() if size}
    return Memory(at, kept, moments, tuple(sorted(book.unknown)))


class _Book:
    """Sizes of everything, put together moment by moment."""

    def __init__(self, model: Model, facts: StreamFacts, work: Work) -> None:
        core = transformer(model)
        self.facts, self.work, self.core = facts, work, core.core
        self.unknown: set[str] = set()
        self.counts = parameters(model)
        self.total = sum(self.counts.values())
        self.block_weights = [sum(p.numel() for p in block.parameters()) for block in core.blocks]
        self.outside = self.total - sum(self.block_weights)
        self.matrices = sum(p.numel() for p in core.parameters() if p.dim() == 2)
        self.half_weights = [_linear(block) for block in core.blocks] if work.half else [0] * len(core.blocks)
        self.half_heads = _linear(model.readouts) if work.half else 0
        self.half_embeds = _linear(model.embeds) if work.half else 0  # no gradient goes to what is embedded
        self.largest = max(p.numel() for p in model.parameters())
        lone = lone_layers(model)
        self.blocks = [self._block(list(block.layers), lone) for block in core.blocks]  # type: ignore[arg-type]
        self.widths = {m.key_width for m in core.modules() if isinstance(m, Attention)}
        self._heads(model)
        self.embedded = 0.0
        for kind, share in facts.kinds.items():
            if not kind.startswith("head:"):
                cost = embed_cost(model.packer.tokenizers[kind], self.core.width, work.half)
                self.embedded += share * cost.kept
                if not cost.known:
                    self.unknown.add(f"what embedding {kind!r} keeps")

    def _block(self, layers: list, lone: list) -> list[Kept]:
        found = []
        for layer in layers:
            kept = layer_kept(layer, self.core, self.facts, half=self.work.half, cuda=self.work.cuda)
            found.append(kept.of(self.facts.wanted) if layer in lone else kept)
            if not found[-1].known:
                self.unknown.add(f"what {type(layer.layer).__name__} keeps")
        return found

    def _heads(self, model: Model) -> None:
        """Bytes a token: rows and log-probabilities, and what is there besides as a forward pass ends and a backward one starts."""
        size = 2.0 if self.work.half else 4.0
        self.logits = self.forward_more = self.backward_more = self.rows = 0.0
        for key, rows in self.facts.rows.items():
            one = rows * classes(model, key)
            self.rows += rows * self.core.width * size
            self.logits += FLOAT * one
            # logits, and in float32 where they were not; then the gradients of the log-probabilities and of the logits
            self.forward_more = max(self.forward_more, one * (6.0 if self.work.half else 4.0))
            self.backward_more = max(self.backward_more, 2 * FLOAT * one)

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        """(moment, bytes by part)."""
        work, tokens, deep = self.work, self.work.tokens, len(self.blocks)
        width = self.core.width
        whole = work.micro_batches > 1 or work.processes > 1
        fsdp = work.shards > 1
        always = self._always()
        kept = [_sum(block) for block in self.blocks]
        entering = {"block inputs": float(FLOAT * width)}
        stays = [entering if work.checkpointing else parts for parts in kept]
        head = {"logits": self.logits + self.rows, "norms": FLOAT * (width + 1.0), "embeddings": self.embedded}
        grads = FLOAT * self.total / work.shards if not (fsdp and work.micro_batches > 1) else FLOAT * float(self.total)
        first = {"gradients": grads if whole else 0.0}
        if fsdp:
            first["gathered weights"] = self._gathered(deep - 1)
            first["whole gradients of what is gathered"] = float(FLOAT * self.outside)
        elif work.processes > 1:
            first["buckets of gradients"] = FLOAT * float(self.total)
        acts = _times(_merge(*stays, head), tokens)
        yield (
            "end of the forward pass",
            _merge(always, first, acts, {"working": tokens * self.forward_more}, self._casts(deep, ended=False)),
        )
        casts = self._casts(deep, ended=True)
        yield "start of the backward pass", _merge(always, first, acts, {"working": tokens * self.backward_more}, casts)
        tail = {"embeddings": self.embedded}
        for index in range(deep - 1, -1, -1):
            done = sum(self.block_weights[index + 1 :]) + self.counts["heads"]
            now = dict(first) if whole else {"gradients": FLOAT * done / work.shards}
            if fsdp:
                now["gathered weights"] = self._gathered(index)
                now["whole gradients of what is gathered"] = FLOAT * (
                    self.outside + GRADIENT_BLOCKS * self.block_weights[index]
                )
            open_block = {}
            if work.checkpointing:
                open_block = {**kept[index], "block inputs": -float(FLOAT * width)}
            held = _times(_merge(*stays[: index + 1], open_block, tail), tokens)
            # the last layer of a block is the first one whose gradient is computed
            working = tokens * max(self.blocks[index][-1].working, FLOAT * 2.0 * width)
            if work.micro_batches > 1:
                working += FLOAT * self.largest  # a weight's new gradient, before it is added
            yield (
                f"backward pass of block {index + 1}",
                _merge(always, now, held, {"working": working}, self._casts(index + 1)),
            )
        step = {"gradients": grads}
        if work.processes > 1 and not fsdp:
            step["buckets of gradients"] = FLOAT * float(self.total)
        yield "optimiser", _merge(always, step)

    def _always(self) -> dict[str, float]:
        work = self.work
        share = FLOAT * self.total / work.shards
        moments = 2 * share if work.optimizer == "adamw" else 2 * share - FLOAT * self.matrices / work.shards
        stream = self.facts.content * work.micro_batches + sum(FLOAT * key_width for key_width in self.widths)
        return {
            "weights": share,
            "optimiser state": moments,
            "averaged weights": share if work.averaged else 0.0,
            "the model given to fit": 0.0 if work.shards == 1 or work.cuda else FLOAT * float(self.total),
            "stream and places": work.tokens * stream,
        }

    def _gathered(self, index: int) -> float:
        """Whole weights under "fsdp": everything outside the blocks, and some blocks."""
        size = 2 if self.work.half and self.work.cast_by_fsdp else FLOAT
        return float(size * (self.outside + GATHERED_BLOCKS * self.block_weights[index]))

    def _casts(self, blocks: int, ended: bool = True) -> dict[str, float]:
        """bfloat16 copies of matrices: autocast keeps them to the end of the forward pass, and autograd for the backward one."""
        if not self.work.half or self.work.cast_by_fsdp:
            return {}
        held = 1 if self.work.checkpointing and ended else blocks
        elsewhere = self.half_heads + (0 if ended else self.half_embeds)
        return {"weights in bfloat16": 2.0 * (sum(self.half_weights[:held]) + elsewhere)}


def _linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _sum(block: list[Kept]) -> dict[str, float]:
    return _merge(*(layer.parts for layer in block))


def _merge(*parts: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for some in parts:
        for name, size in some.items():
            total[name] = total.get(name, 0.0) + size
    return total


def _times(parts: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: size * factor for name, size in parts.items()}

"""The one transformer: a declaration (`Core`) with presets, and the module it makes (`Transformer`)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal.attention import (
    Backend,
    Cache,
    Layout,
    Mechanism,
    Read,
    ScaledDotProduct,
    Score,
    Soft,
    Trace,
    plan_attention,
)
from multimodal.declare import Declared, check_part, override
from multimodal.layers import MLP, Attention, Context, CrossAttention, Crossing, Keys, Layer, SelfAttention, Sublayer
from multimodal.layers.attend import check_parts
from multimodal.masks import PREFIX_LM, Prior, Rule
from multimodal.norm import RMSNorm
from multimodal.positions import rotary_frequencies, rotations
from multimodal.shapes import ConfigError, check_shapes


@dataclass(frozen=True, kw_only=True)
class Core(Declared):
    """A pre-norm transformer with grouped-query heads, RMSNorm, a gated MLP and rotary places, unless `block` says otherwise.

    mask, score, prior and read are those of every attention layer that declares none of its own; the mask holds for all.

    width: D, numbers of each token's state.
    depth: L, how many blocks follow each other.
    heads: H, query heads of each attention layer; width is a multiple of it.
    kv_heads: G, key-value heads, which groups of query heads share; None: as many as heads.
    mlp_width: hidden width of the gated MLP; None: 8/3 of width, rounded up to a multiple of 16.
    qk_norm: RMSNorm on queries and keys, which keeps attention logits bounded (Dehghani et al. 2023).
    dropout: the share of each block's output that is dropped in training, from 0 to below 1.
    drop_path: the share of samples whose block is skipped in training, rising linearly to this at the last block.
    rotary_split: the ratio in which a head's pairs are turned by time, row and column; all 0: no turning.
    rotary_base: the slowest turn of time, row and column, in steps a radian.
    mask: the rule that says which token may look at which.
    score: how likely a query finds a key, for layers that declare no score.
    prior: what a query expects of a key before it compares them; None: all places alike.
    read: what becomes of the posterior; Soft() averages the values.
    block: the layers of one block, which is repeated `depth` times.

    Examples:
        >>> core = mm.Core(width=64, depth=2, heads=4)
        >>> deeper = core.replace(depth=8, mask=mm.masks.SameSample() & mm.masks.Causal())
        >>> deeper.parameters > 3 * core.parameters
        True
    """

    width: int  # D
    depth: int
    heads: int
    kv_heads: int | None = None
    mlp_width: int | None = None
    qk_norm: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    rotary_split: tuple[int, ...] = (2, 1, 1)
    rotary_base: tuple[float, ...] = (10000.0, 100.0, 100.0)
    mask: Rule = PREFIX_LM
    score: Score = field(default_factory=ScaledDotProduct)
    prior: Prior | None = None
    read: Read = field(default_factory=Soft)
    block: tuple[Layer, ...] = (SelfAttention(), MLP())

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Core: {name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            step = 2 * self.heads
            raise ConfigError(
                f"Core: width={self.width} does not give heads={self.heads} an even width each; "
                f"try width={-(-self.width // step) * step}"
            )
        if self.groups < 1 or self.heads % self.groups:
            raise ConfigError(f"Core: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; try kv_heads=1")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Core: {name}={getattr(self, name)} is not in 0 to 1")
        if len(self.rotary_split) != 3 or len(self.rotary_base) != 3 or min(self.rotary_split) < 0:
            raise ConfigError("Core: rotary_split and rotary_base give one number each for time, row and column")
        if not isinstance(self.block, tuple) or not self.block:
            raise ConfigError(
                f"Core: block={self.block!r} must be a tuple of layers, such as (SelfAttention(), MLP()), one at least"
            )
        for layer in self.block:
            check_part("Core: block", layer, Layer, "SelfAttention()")
        check_part("Core: mask", self.mask, Rule, "Window(64)")
        check_part("Core: score", self.score, Score, "Cosine()")
        check_part("Core: read", self.read, Read, "Soft()")
        check_parts("Core", None, self.prior, None)

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """G, key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the gated MLP: 8/3 D gives it the parameters of a plain 4 D one (Shazeer 2020)."""
        return -(-8 * self.width // 3 // 16) * 16 if self.mlp_width is None else self.mlp_width

    @property
    def parameters(self) -> int:
        """Exact number of parameters of the core, without tokenizers and heads."""
        return sum(p.numel() for p in self.outline().parameters())

    def flops(self, tokens: int, context: float) -> float:
        """Multiply-adds counted as 2, of one forward pass over `tokens` that see `context` tokens each on average.

        Matrix products only, as in Kaplan et al. 2020 (2 a weight and token) plus 2 T M a layer of attention for each number of its
        keys and values (Chowdhery et al. 2022, appendix B). A training step costs three times this.
        """
        outline = self.outline()
        weights = sum(p.numel() for p in outline.parameters() if p.dim() >= 2)
        read = sum(m.heads * (m.key_width + m.value_width) for m in outline.modules() if isinstance(m, Attention))
        return 2.0 * tokens * weights + 2.0 * tokens * context * read

    def layers(self, *, crosses: bool = False) -> tuple[Layer, ...]:
        """One block's layers; in a core that writes with a cross-attention after each attention, unless it declares its own.

        Raises:
            ConfigError: a cross-attention in a core that has nothing to look at, or no place for one.
        """
        own = any(layer.crosses for layer in self.block)
        if own and not crosses:
            raise ConfigError(
                "Core: CrossAttention needs another core to look at; it belongs in the writer of an EncoderDecoder"
            )
        if own or not crosses:
            return self.block
        out: list[Layer] = []
        for layer in self.block:
            out += [layer, CrossAttention()] if isinstance(layer, SelfAttention) else [layer]
        if len(out) == len(self.block):
            raise ConfigError(
                "EncoderDecoder: the writer's block has no attention; put a CrossAttention() where it is to look"
            )
        return tuple(out)

    def outline(self, crosses: bool = False) -> "Transformer":
        """The module without memory for its weights: to count and to measure."""
        return _outline(self, crosses)

    def build(self) -> "Transformer":
        """Make the module, with fresh weights."""
        return Transformer(self)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32, crossed: int | None = None) -> Cache:
        """Room for decoding `rows` samples of up to `capacity` tokens; if the core crosses, with a memory of `crossed` tokens."""
        outline = self.outline(crossed is not None)
        return outline.cache(rows=rows, capacity=capacity, device=device, dtype=dtype, crossed=crossed)

    def replace(self, **changes) -> Self:
        """A copy with some settings changed."""
        return override(self, **changes)

    @classmethod
    def tiny(cls) -> Self:
        """0.2 M parameters: tests, toys."""
        return cls(width=64, depth=4, heads=4)

    @classmethod
    def small(cls) -> Self:
        """1.2 M parameters: small pictures, spoken words; minutes on a CPU."""
        return cls(width=128, depth=6, heads=4)

    @classmethod
    def medium(cls) -> Self:
        """10.6 M parameters: CIFAR-sized work on one GPU."""
        return cls(width=384, depth=6, heads=6)

    @classmethod
    def base(cls) -> Self:
        """85 M parameters: the shape of ViT-B and GPT-2 small."""
        return cls(width=768, depth=12, heads=12)

    @classmethod
    def large(cls) -> Self:
        """0.3 B parameters: the shape of ViT-L and GPT-2 medium."""
        return cls(width=1024, depth=24, heads=16)

    @classmethod
    def xl_1b(cls) -> Self:
        """1.2 B parameters, 16 query heads on 8 key-value heads."""
        return cls(width=2048, depth=26, heads=16, kv_heads=8)

    @classmethod
    def xxl_7b(cls) -> Self:
        """7 B parameters: the shape of Mistral 7B (Jiang et al. 2023, table 1)."""
        return cls(width=4096, depth=32, heads=32, kv_heads=8, mlp_width=14336)


class Block(nn.Module):
    """The layers of one block, one after the other.

    recompute: in training only what comes in is stored, and the rest is computed again for the gradient (Chen et al. 2016);
    changes memory, not results, so no declaration has it.
    """

    recompute: bool = False

    def __init__(self, core: Core, layers: tuple[Layer, ...], width: int, drop_path: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in layers:
            sublayer = Sublayer(layer, core, width, core.dropout, drop_path)
            self.layers.append(sublayer)
            width = sublayer.width
        self.width = width
        self.mixing = max((i for i, layer in enumerate(layers) if type(layer) is not MLP), default=0)

    def forward(self, stream_TD: Tensor, context: Context, wanted_N: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i != self.mixing or wanted_N is None:
                stream_TD = layer(stream_TD, context)
            else:  # from here on no token looks at another
                stream_TD, context = layer(stream_TD, context, wanted_N), context.at(wanted_N)
        return stream_TD


@contextmanager
def _not_traced(trace: Trace | None) -> Iterator[None]:
    """What layers compute again for the gradient, a trace has already."""
    count = len(trace.seen) if trace else 0
    try:
        yield
    finally:
        if trace:
            del trace.seen[count:]


def recompute(model: nn.Module, on: bool = True) -> None:
    """Activation checkpointing of every block of a model, in place: see `Block`."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = on


def compile_blocks(model: nn.Module) -> None:
    """Compile what every token does by itself (MLPs, queries, keys and values), in place.

    Parameters keep their names, and one graph serves packs of any layout. Not whole blocks: how a pack is attended goes by its
    lists of spans, so that each new layout would be compiled again.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile needs.
    """
    with warnings.catch_warnings():
        # importing torch's compiler raises warnings about torch itself
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise ConfigError(
                f"compile: torch.compile needs a C++ compiler; install g++, or do not compile ({error})"
            ) from error
        for module in model.modules():
            if isinstance(module, Attention):
                module.compiled = True
            if isinstance(module, Sublayer) and type(module.layer) is MLP:
                # with its norm and its sum, unless something is dropped: the compiler would draw other numbers
                (module.body if module.dropout or module.drop_path else module).compile(dynamic=True)


class Transformer(nn.Module):
    """The core's weights: reads a stream (T, D) and gives its states (T, D)."""

    def __init__(self, core: Core, *, crosses: bool = False) -> None:
        super().__init__()
        self.core = core
        self.blocks = nn.ModuleList()
        width, layers = core.width, core.layers(crosses=crosses)
        for depth in range(core.depth):
            block = Block(core, layers, width, core.drop_path * depth / max(core.depth - 1, 1))
            self.blocks.append(block)
            width = block.width
        self.narrow = nn.Linear(width, core.width, bias=False) if width != core.width else None
        self.norm = RMSNorm(core.width)
        self._number_layers()
        if not self.norm.weight.is_meta:  # a model on the meta device needs no weights
            for sublayer in self.sublayers():
                sublayer.body.init_weights(core.depth)
        self._frequencies: dict[int, tuple[Tensor, Tensor]] = {}  # by width of a head
        if any(core.rotary_split):
            widths = {m.key_width for m in self.modules() if isinstance(m, Attention) and m.turned}
            with torch.device("cpu"):  # also of a model that is made on the meta device
                self._frequencies = {
                    w: rotary_frequencies(w, core.rotary_split, core.rotary_base) for w in sorted(widths)
                }

    def sublayers(self) -> Iterator[Sublayer]:
        """All layers, in order."""
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in block.layers:
                assert isinstance(layer, Sublayer)
                yield layer

    def _number_layers(self) -> None:
        """Number the layers that cache something, note how much, and name the mechanisms for the trace."""
        # of each such layer: key-value heads and their widths, of the stream or of what another core has read; size of a state
        self.key_sizes: list[Keys] = []
        self.memory_sizes: list[Keys] = []
        self.state_sizes: list[int] = []
        width = self.core.width
        for depth, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            for sublayer in block.layers:
                assert isinstance(sublayer, Sublayer)
                layer = sublayer.layer
                for module in sublayer.body.modules():
                    if isinstance(module, Mechanism):
                        module.name = f"block {depth} {module.name}"
                keys, state = layer.keys(self.core), layer.state(self.core, width)
                if keys is not None:
                    sizes = self.memory_sizes if layer.crosses else self.key_sizes
                    sublayer.body.index = len(sizes)
                    sizes.append(keys)
                if state is not None:
                    sublayer.body.index = len(self.state_sizes)
                    self.state_sizes.append(state)
                width = sublayer.width
        # what looks elsewhere than at its own stream does not go through the stream's plan
        self.bare = all(m.bare for m in self.modules() if isinstance(m, Mechanism) and m.name.endswith(" self"))

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32, crossed: int | None = None) -> Cache:
        """An empty cache for `rows` samples of up to `capacity` tokens, and of `crossed` tokens that another core has read."""
        where: dict[str, Any] = {"batch": rows, "device": device, "dtype": dtype}
        memory = None if crossed is None else Cache(keys=self.memory_sizes, capacity=crossed, **where)
        return Cache(keys=self.key_sizes, capacity=capacity, states=self.state_sizes, memory=memory, **where)

    def forward(
        self,
        stream_TD: Tensor,
        position_TA: Tensor,
        layout: Layout,
        *,
        cache: Cache | None = None,
        backend: Backend = "auto",
        crossing: Crossing | None = None,
        trace: Trace | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """States (T, D) of a packed stream; places (T, 3) in steps. A trace collects what every attention layer does.

        wanted_N: the rows whose states (N, D) are given instead, in this order; what follows the last layer that mixes tokens is
        computed for them alone, which spares a picture that is classified almost the whole last MLP.

        Raises:
            ShapeError: stream, places and layout disagree.
        """
        sample_T = layout.info.sample
        check_shapes(
            "Core", {"D": self.core.width, "A": 3}, stream_TD=stream_TD, position_TA=position_TA, sample_T=sample_T
        )
        dtype = (
            torch.get_autocast_dtype(stream_TD.device.type)
            if torch.is_autocast_enabled(stream_TD.device.type)
            else stream_TD.dtype
        )
        fresh = cache is None or not any(cache.length[row] for row in cache.rows[: len(layout.spans)])
        plan = plan_attention(
            self.core.mask, layout, backend=backend, dtype=dtype, cache=cache, bare=self.bare, trace=trace
        )
        context = Context(layout, plan, self.rotations(position_TA), cache, trace, crossing, fresh)
        for block in self.blocks:
            rows_N = wanted_N if block is self.blocks[-1] else None
            assert isinstance(block, Block)
            if block.recompute and self.training and torch.is_grad_enabled() and cache is None:
                contexts = lambda: (nullcontext(), _not_traced(trace))  # noqa: E731  of the forward pass, and of its repetition
                stream_TD = checkpoint(block, stream_TD, context, rows_N, use_reentrant=False, context_fn=contexts)
            else:
                stream_TD = block(stream_TD, context, rows_N)
        return self.norm(stream_TD if self.narrow is None else self.narrow(stream_TD))

    def rotations(self, position_TA: Tensor) -> dict[int, Tensor]:
        """By width of a head, how far each of its pairs is rotated at these positions; none where nothing is rotated."""
        device = position_TA.device
        for width, pair in self._frequencies.items():
            if pair[0].device != device:
                self._frequencies[width] = pair[0].to(device), pair[1].to(device)
        return {width: rotations(position_TA, *pair) for width, pair in self._frequencies.items()}


@lru_cache(64)
def _outline(core: Core, crosses: bool) -> "Transformer":
    with torch.device("meta"):
        return Transformer(core, crosses=crosses)

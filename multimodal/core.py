"""The transformer: a declaration with presets (`Core`) and the module that it builds (`Transformer`)."""

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
    plan_layers,
)
from multimodal.attention.exchange import StreamShare
from multimodal.attention.mechanism import share_priors
from multimodal.declare import Declared, check_part, override
from multimodal.layers import MLP, Attention, Context, CrossAttention, Crossing, Keys, Layer, SelfAttention, Sublayer
from multimodal.layers.attend import check_parts
from multimodal.masks import PREFIX_LM, Prior, Rule
from multimodal.norm import Norm
from multimodal.positions import Rotary, check_axes, check_rotary, rotations
from multimodal.shapes import AXES, ConfigError, StreamError, check_shapes


@dataclass(frozen=True, kw_only=True)
class Core(Declared):
    """A pre-norm transformer with grouped-query attention, RMSNorm, a gated MLP and rotary positions, unless declared otherwise.

    The mask holds for every self-attention layer; score, prior and read are defaults for layers that declare none of their own.

    width: D, size of each token's state.
    depth: L, number of blocks; with 0 the states are the embedded tokens, of a `Tower` for instance.
    heads: H, number of query heads of each attention layer; width is a multiple of it.
    kv_heads: G, number of key-value heads, each shared by H / G query heads; None: H.
    mlp_width: hidden width of the gated MLP; None: 8/3 of width, rounded up to a multiple of 16.
    norm: the norm before each layer and after the last block.
    first_norm: whether the embedded tokens are normed before the first block.
    last_norm: whether the states are normed after the last block.
    qk_norm: the norm on queries and keys too, which bounds the attention logits (Dehghani et al. 2023).
    dropout: probability that an element of a layer's update is dropped in training, from 0 to below 1.
    drop_path: probability that a layer is skipped for a sample in training; it rises linearly from 0 to this at the last block.
    axes: names of the position axes that it knows: time, row, column, and behind them those that kinds declare, such as "voice".
    rotary_split: the ratio in which the axes share the rotary pairs of a head; all 0: no rotary positions. Of fewer numbers than
        axes the further ones are 1.
    rotary_base: for each axis, about the largest number of steps per radian of a rotary pair; of fewer numbers the further are 100.
    learned_times: number of learned vectors, one for each time in steps, that are added to the embedded tokens; None: none.
    learned_fields: number of learned vectors, one for each field of a sample (the last one for all further fields); None: none.
    mask: the rule that says which token may attend to which.
    score: the log-likelihood of a query under a key, such as the scaled dot product.
    prior: the log-probability of each key before contents are compared, such as ALiBi; None: uniform.
    read: how values are read from the posterior over keys; Soft() averages them.
    block: the layers of one block, which is repeated `depth` times; or several such blocks, which take turns.

    Examples:
        >>> core = mm.Core(width=64, depth=2, heads=4)
        >>> deeper = core.replace(depth=8, mask=mm.masks.SameSample() & mm.masks.Causal())
        >>> deeper.parameters > 3 * core.parameters
        True
    """

    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    mlp_width: int | None = None
    norm: Norm = field(default_factory=Norm)
    first_norm: bool = False
    last_norm: bool = True
    qk_norm: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    axes: tuple[str, ...] = AXES
    rotary_split: tuple[int, ...] = (2, 1, 1)
    rotary_base: tuple[float, ...] = (10000.0, 100.0, 100.0)
    learned_times: int | None = None
    learned_fields: int | None = None
    mask: Rule = PREFIX_LM
    score: Score = field(default_factory=ScaledDotProduct)
    prior: Prior | None = None
    read: Read = field(default_factory=Soft)
    block: tuple[Layer, ...] | tuple[tuple[Layer, ...], ...] = (SelfAttention(), MLP())

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("depth", 0), ("heads", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"Core: {name}={getattr(self, name)} must be at least {least}")
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
        self._check_axes()
        for name in ("learned_times", "learned_fields"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"Core: {name}={getattr(self, name)} must be at least 1, or None")
        several = isinstance(self.block, tuple) and any(isinstance(part, tuple) for part in self.block)
        blocks: tuple = self.block if several else (self.block,)
        for block in blocks:
            if not isinstance(block, tuple) or not block:
                raise ConfigError(
                    f"Core: block={self.block!r} must be a tuple of layers, such as (SelfAttention(), MLP()), one at least, or "
                    "a tuple of such tuples"
                )
            for layer in block:
                check_part("Core: block", layer, Layer, "SelfAttention()")
        if self.depth and len(blocks) > self.depth:
            raise ConfigError(f"Core: block has {len(blocks)} blocks, more than depth={self.depth}")
        check_part("Core: norm", self.norm, Norm, "Norm(eps=1e-5)")
        check_part("Core: mask", self.mask, Rule, "Window(64)")
        check_part("Core: score", self.score, Score, "Cosine()")
        check_part("Core: read", self.read, Read, "Soft()")
        check_parts("Core", None, self.prior, None)
        for layer in (layer for block in blocks for layer in block):
            rotary = getattr(layer, "rotary", None)
            if isinstance(rotary, Rotary) and len(rotary.split) > len(self.axes):
                raise ConfigError(
                    f"Core: {type(layer).__name__} has {rotary} for {len(rotary.split)} axes, but the core's axes are "
                    f"{', '.join(self.axes)}; give the core more axes, or the layer fewer numbers"
                )

    def _check_axes(self) -> None:
        """Check the axes and their rotary shares and bases, and add those of further axes."""
        check_axes("Core: axes", self.axes)
        # without rotary positions further axes have none either
        for name, value in (("rotary_split", int(any(self.rotary_split))), ("rotary_base", 100.0)):
            given, further = getattr(self, name), len(self.axes) - len(getattr(self, name))
            if len(given) >= len(AXES) and further > 0:
                object.__setattr__(self, name, (*given, *(value,) * further))
        check_rotary("Core: rotary_split and rotary_base", self.rotary_split, self.rotary_base)
        if len(self.rotary_split) > len(self.axes):
            raise ConfigError(
                f"Core: rotary_split and rotary_base give {len(self.rotary_split)} numbers, one for each axis, but the axes are "
                f"{', '.join(self.axes)}"
            )

    @property
    def head_width(self) -> int:
        """K, width of one head."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """G, number of key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the gated MLP; with 8/3 D it has as many parameters as a plain MLP of 4 D (Shazeer 2020)."""
        return -(-8 * self.width // 3 // 16) * 16 if self.mlp_width is None else self.mlp_width

    @property
    def rotary(self) -> Rotary:
        """The rotary positions of layers that have none of their own."""
        return Rotary(split=self.rotary_split, base=self.rotary_base)

    @property
    def blocks(self) -> tuple[tuple[Layer, ...], ...]:
        """The layers of each of the `depth` blocks."""
        several: Any = self.block if isinstance(self.block[0], tuple) else (self.block,)
        return tuple(several[depth % len(several)] for depth in range(self.depth))

    @property
    def parameters(self) -> int:
        """Exact number of parameters of the core; those of tokenizers and heads are not counted."""
        return sum(p.numel() for p in self.outline().parameters())

    def flops(self, tokens: int, context: float) -> float:
        """FLOPs (2 per multiply-add) of one forward pass over `tokens` tokens, which attend to `context` tokens each on average.

        Only matrix products are counted: 2 per weight and token (Kaplan et al. 2020), and in each attention layer 2 per token,
        context token and element of keys and values (Chowdhery et al. 2022, appendix B). A training step costs three times this.
        """
        outline = self.outline()
        weights = sum(p.numel() for p in outline.parameters() if p.dim() >= 2)
        attended = sum(m.heads * (m.key_width + m.value_width) for m in outline.modules() if isinstance(m, Attention))
        return 2.0 * tokens * weights + 2.0 * tokens * context * attended

    def layers(self, *, crosses: bool = False) -> tuple[tuple[Layer, ...], ...]:
        """The layers of each block; with `crosses` a CrossAttention follows each SelfAttention, unless a block declares its own.

        Raises:
            ConfigError: a block has a CrossAttention but the core has no other to attend to, or no block has a place for one.
        """
        own = any(layer.crosses for block in self.blocks for layer in block)
        if own and not crosses:
            raise ConfigError(
                "Core: CrossAttention needs another core to attend to; it belongs in the writer of an EncoderDecoder"
            )
        if own or not crosses:
            return self.blocks
        if not any(isinstance(layer, SelfAttention) for block in self.blocks for layer in block):
            raise ConfigError(
                "EncoderDecoder: the writer's block has no attention; put a CrossAttention() where it is to attend"
            )
        return tuple(
            tuple(
                one
                for layer in block
                for one in ((layer, CrossAttention()) if isinstance(layer, SelfAttention) else (layer,))
            )
            for block in self.blocks
        )

    def outline(self, crosses: bool = False) -> "Transformer":
        """The module on the meta device, where weights take no memory: for counts and sizes."""
        return _outline(self, crosses)

    def build(self) -> "Transformer":
        """The module, with newly initialised weights."""
        return Transformer(self)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32, crossed: int | None = None) -> Cache:
        """An empty KV cache for `rows` samples of up to `capacity` tokens; see `Transformer.cache`."""
        outline = self.outline(crossed is not None)
        return outline.cache(rows=rows, capacity=capacity, device=device, dtype=dtype, crossed=crossed)

    def replace(self, **changes) -> Self:
        """A copy with some settings changed."""
        return override(self, **changes)

    @classmethod
    def tiny(cls) -> Self:
        """0.2 M parameters: for tests and toy problems."""
        return cls(width=64, depth=4, heads=4)

    @classmethod
    def small(cls) -> Self:
        """1.2 M parameters: for small images and spoken words; trains in minutes on a CPU."""
        return cls(width=128, depth=6, heads=4)

    @classmethod
    def medium(cls) -> Self:
        """10.6 M parameters: for CIFAR on one GPU."""
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
        """1.2 B parameters, with 16 query heads on 8 key-value heads."""
        return cls(width=2048, depth=26, heads=16, kv_heads=8)

    @classmethod
    def xxl_7b(cls) -> Self:
        """7 B parameters: the shape of Mistral 7B (Jiang et al. 2023, table 1)."""
        return cls(width=4096, depth=32, heads=32, kv_heads=8, mlp_width=14336)


class Block(nn.Module):
    """The layers of one block, one after the other, each a `Sublayer` of layers/base.py: norm, body, merge.

    recompute: activation checkpointing: in training only the block's input is stored, and the rest is computed again in the
    backward pass (Chen et al. 2016). It changes memory and not results, so no declaration has it.
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
        # index of the last layer in which a token depends on others; MLPs after it can run on wanted rows alone
        self.last_mixing = max((i for i, layer in enumerate(layers) if type(layer) is not MLP), default=0)

    def forward(
        self, stream_TD: Tensor, context: Context, wanted_N: Tensor | None = None, checkpointed: bool = False
    ) -> Tensor:
        recompute = self.recompute and self.training and torch.is_grad_enabled() and context.cache is None
        if recompute and not checkpointed:
            # the function and not the module, whose hooks have run already
            return checkpoint(  # type: ignore[return-value]
                Block.forward,
                self,
                stream_TD,
                context,
                wanted_N,
                True,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _not_traced(context.trace)),
            )
        for i, layer in enumerate(self.layers):
            if i != self.last_mixing or wanted_N is None:
                stream_TD = layer(stream_TD, context)
            else:  # the layers after this one run on the wanted rows alone
                stream_TD, context = layer(stream_TD, context, wanted_N), context.at(wanted_N)
        return stream_TD


@contextmanager
def _not_traced(trace: Trace | None) -> Iterator[None]:
    """Within this context a trace records nothing: layers that run again for the backward pass are in it already."""
    count = len(trace.seen) if trace else 0
    try:
        yield
    finally:
        if trace:
            del trace.seen[count:]


def recompute(model: nn.Module, on: bool = True) -> None:
    """Switch activation checkpointing of every block of a model, in place; see `Block`."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = on


def compile_blocks(model: nn.Module) -> None:
    """Compile, in place, what is computed for each token alone: MLPs and the projections of queries, keys and values.

    The names of parameters stay, and one graph serves packs of any layout. Whole blocks are not compiled: attention depends on
    the spans of a pack, which are Python lists, so that each new layout would be compiled again.

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
                # norm and merge are compiled too, unless there is dropout: the compiler would draw other random numbers
                (module.body if module.dropout or module.drop_path else module).compile(dynamic=True)


class Transformer(nn.Module):
    """The module of a `Core`: from embedded tokens (T, D) of a stream to its states (T, D).

    share: the processes that share each stream in training (context parallel): every one gets all embedded tokens and returns all
        states, and computes the blocks for its rows. None: this process computes all rows.
    """

    share: StreamShare | None = None

    def __init__(self, core: Core, *, crosses: bool = False) -> None:
        super().__init__()
        self.core = core
        self.blocks = nn.ModuleList()
        width = core.width
        for depth, layers in enumerate(core.layers(crosses=crosses)):
            block = Block(core, layers, width, core.drop_path * depth / max(core.depth - 1, 1))
            self.blocks.append(block)
            width = block.width
        share_priors(m for m in self.blocks.modules() if isinstance(m, Mechanism))
        self.narrow = nn.Linear(width, core.width, bias=False) if width != core.width else None
        self.norm = core.norm.build(core.width) if core.last_norm else nn.Identity()
        self.times = nn.Embedding(core.learned_times, core.width) if core.learned_times else None
        self.fields = nn.Embedding(core.learned_fields, core.width) if core.learned_fields else None
        self.first_norm = core.norm.build(core.width) if core.first_norm else nn.Identity()
        self._number_layers()
        # initialising is slow, and on the meta device without effect
        if not any(p.is_meta for p in self.parameters()):
            for sublayer in self.sublayers():
                sublayer.body.init_weights(core.depth)
            for table in (self.times, self.fields):
                if table is not None:
                    nn.init.normal_(table.weight, std=0.02)
        # the rules of layers that have their own, each once
        own_rules = (s.layer.mask for s in self.sublayers() if isinstance(s.layer, SelfAttention))
        self.masks = tuple(dict.fromkeys(rule for rule in own_rules if rule is not None))
        # by width of a head, and by (width, rotary positions of a layer); layers may have heads of other widths
        self._frequencies: dict[int | tuple[int, Rotary], tuple[Tensor, Tensor]] = {}
        with torch.device("cpu"):  # real numbers, even if the model is being built on the meta device
            for sublayer in self.sublayers():
                for m in sublayer.body.modules():
                    own = sublayer.layer.rotary if isinstance(sublayer.layer, SelfAttention) else None
                    if isinstance(m, Attention) and m.turned and any((own or core.rotary).split):
                        key = m.key_width if own is None else (m.key_width, own)
                        self._frequencies[key] = (own or core.rotary).frequencies(m.key_width)

    @property
    def reach(self) -> int | None:
        """The largest distance, in tokens, at which a token of the stream attends to another; None: no bound is known."""
        found: list[int | None] = [0]
        for sublayer in self.sublayers():
            layer = sublayer.layer
            if isinstance(layer, SelfAttention):
                found.append((self.core.mask if layer.mask is None else self.core.mask & layer.mask).reach)
            elif layer.keys(self.core) is not None and not layer.crosses:
                return None  # a layer of somebody's own, whose keys may be read in any way
        known = [reach for reach in found if reach is not None]
        return max(known) if len(known) == len(found) else None

    def sublayers(self) -> Iterator[Sublayer]:
        """The layers of all blocks, in order."""
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in block.layers:
                assert isinstance(layer, Sublayer)
                yield layer

    def _number_layers(self) -> None:
        """Give each layer that caches something its index in the cache, collect the sizes, and name the mechanisms for traces."""
        # by layer: sizes of keys and values of the stream, of those of the other core's states, and of a recurrent state
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
        # only self-attention runs by the stream's plan, which has to know whether a kernel without priors suffices
        self.bare = all(m.bare for m in self.modules() if isinstance(m, Mechanism) and m.name.endswith(" self"))

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32, crossed: int | None = None) -> Cache:
        """An empty KV cache for `rows` samples of up to `capacity` tokens.

        crossed: the capacity, in tokens, of the cross-attention cache; None: this core has no cross-attention.
        """
        where: dict[str, Any] = {"batch": rows, "device": device, "dtype": dtype, "axes": len(self.core.axes)}
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
        """The states (T, D) of a packed stream.

        Args:
            stream_TD: embedded tokens.
            position_TA: their positions (T, A) in steps, on the axes of the core.
            layout: which rows belong to which sample.
            cache: filled by a prompt, extended by later tokens; None: nothing is cached.
            backend: the attention backend, see `plan_attention`.
            crossing: the states of another core, for cross-attention.
            trace: collects a record of every attention layer.
            wanted_N: rows of the stream; if given, only their states (N, D) are returned, in this order. Layers after the last one
                that mixes tokens then run on these rows alone, which saves an image classifier most of its last MLP.

        Raises:
            ShapeError: stream, positions and layout disagree.
        """
        sample_T = layout.info.sample
        sizes = {"D": self.core.width, "A": len(self.core.axes)}
        check_shapes("Core", sizes, stream_TD=stream_TD, position_TA=position_TA, sample_T=sample_T)
        dtype = (
            torch.get_autocast_dtype(stream_TD.device.type)
            if torch.is_autocast_enabled(stream_TD.device.type)
            else stream_TD.dtype
        )
        fresh = cache is None or not any(cache.length[row] for row in cache.rows[: len(layout.spans)])
        options = {"backend": backend, "dtype": dtype, "cache": cache, "bare": self.bare, "trace": trace}
        plan, plans = plan_layers(self.core.mask, self.masks, layout, **options)
        share, all_wanted_N, total = self.share, wanted_N, stream_TD.shape[0]  # len() would make exports constant
        if share is not None:
            rows = share.rows(total)
            stream_TD, position_TA = stream_TD[rows], position_TA[rows]
            layout, wanted_N = Layout(layout.spans, layout.info[rows]), None
            plan, plans = share.plan(plan, total), {rule: share.plan(one, total) for rule, one in plans.items()}
        context = Context(layout, plan, self.rotations(position_TA), cache, trace, crossing, fresh, plans)
        stream_TD = self.first_norm(self._with_tables(stream_TD, position_TA, layout))
        if wanted_N is not None and not len(self.blocks):
            stream_TD = stream_TD[wanted_N]
        for i, block in enumerate(self.blocks, 1):
            stream_TD = block(stream_TD, context, wanted_N if i == len(self.blocks) else None)
        state_TD = self.norm(stream_TD if self.narrow is None else self.narrow(stream_TD))
        if share is None:
            return state_TD
        state_TD = share.join(state_TD, total)
        return state_TD if all_wanted_N is None else state_TD[all_wanted_N]

    def _with_tables(self, stream_TD: Tensor, position_TA: Tensor, layout: Layout) -> Tensor:
        """The embedded tokens plus the learned vectors of their times and fields, if the core has such."""
        if self.times is not None:
            time_T, count = position_TA[:, 0].round().long(), self.times.num_embeddings
            if not torch.compiler.is_exporting():  # whose program knows no values; its table refuses such a time
                # on a GPU the host would have to wait for the times, so there the lengths are compared
                most = max(span.total for span in layout.spans) if time_T.is_cuda else int(time_T.max()) + 1
                if most > count:
                    raise StreamError(
                        f"Core: a sample has {most} tokens, more than learned_times={count}; shorten it, because positions that "
                        "were never trained mean nothing"
                    )
            stream_TD = stream_TD + self.times(time_T).to(stream_TD.dtype)
        if self.fields is not None:
            field_T = layout.info.segment.long().clamp(max=self.fields.num_embeddings - 1)
            stream_TD = stream_TD + self.fields(field_T).to(stream_TD.dtype)
        return stream_TD

    def rotations(self, position_TA: Tensor) -> "StreamRotations":
        """By width of a head, the rotation of each of its pairs at these positions; None without rotary positions."""
        device = position_TA.device
        for key, pair in self._frequencies.items():
            if pair[0].device != device:  # no buffers, because .to(bfloat16) would round them
                self._frequencies[key] = pair[0].to(device), pair[1].to(device)
        known = {key: rotations(position_TA, *pair) for key, pair in self._frequencies.items()}
        found = StreamRotations(self.core, position_TA)
        found.update(known)
        return found


@dataclass(eq=False, repr=False)
class StreamRotations(dict[int | tuple[int, Rotary], Tensor | None]):
    """The `Rotations` of the core's own attention layers, and any others when they are asked for."""

    core: Core
    position_TA: Tensor

    def __missing__(self, key: int | tuple[int, Rotary]) -> Tensor | None:
        width, rotary = (key, self.core.rotary) if isinstance(key, int) else key
        found = None
        if any(rotary.split):
            pair = (x.to(self.position_TA.device) for x in rotary.frequencies(width))
            found = rotations(self.position_TA, *pair)
        self[key] = found
        return found


@lru_cache(64)
def _outline(core: Core, crosses: bool) -> "Transformer":
    with torch.device("meta"):
        return Transformer(core, crosses=crosses)

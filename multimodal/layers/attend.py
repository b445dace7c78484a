"""Attention layers: over the stream itself, over the states of another core, and over learned keys and values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.attention import Mechanism, Read, Score
from multimodal.attention.exchange import local
from multimodal.declare import check_part
from multimodal.layers.base import Add, Body, Context, CoreSettings, Keys, Layer, Merge, check_sizes, init_in, init_out
from multimodal.masks import Pairs, Prior, Rule, all_pairs
from multimodal.norm import Norm, divided, is_untouched
from multimodal.positions import Rotary, rotate
from multimodal.shapes import ConfigError


def check_parts(where: str, score: Score | None, prior: Prior | None, read: Read | None) -> None:
    """Raise a ConfigError unless each is a declaration of its kind, or None."""
    if score is not None:
        check_part(f"{where}: score", score, Score, "Cosine()")
    if prior is not None:
        check_part(f"{where}: prior", prior, Prior, "ALiBi()")
    if read is not None:
        check_part(f"{where}: read", read, Read, "Soft()")


QKV = ("query", "key", "value")


class Attention(nn.Module):
    """The projections and the mechanism of grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023 for the groups).

    `forward` makes queries, keys and values, and `out` maps what was read back to the stream. The body of a layer calls the plan of
    the stream between them.

    width: width of the stream.
    heads, kv_heads: number of query heads, and of key-value heads.
    key_width, value_width: width of the keys and of the values of one head; None: width / heads, and that of the keys.
    norm: the norm of queries and keys; None: they are not normed.
    bias: which projections have a bias, of "query", "key", "value" and "out".
    out: width of the output; None: that of the stream.
    turned: whether queries and keys get rotary positions.
    compiled: whether the projections run compiled in training; the plan cannot, as it depends on the lists of its spans.
    """

    compiled: bool = False

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        mechanism: Mechanism,
        norm: Norm | None,
        *,
        bias: tuple[str, ...] = (),
        key_width: int | None = None,
        value_width: int | None = None,
        out: int | None = None,
        turned: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.turned = heads, kv_heads, turned
        self.key_width = key_width or width // heads
        self.value_width = value_width or self.key_width
        self.mechanism = mechanism
        self.rows = [heads * self.key_width, kv_heads * self.key_width, kv_heads * self.value_width]
        self.qkv = nn.Linear(width, sum(self.rows), bias=False)
        self.out = nn.Linear(heads * self.value_width, width if out is None else out, bias="out" in bias)
        # not a bias of `qkv`, because some models have one on queries and values only
        self.biases = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(n)) for name, n in zip(QKV, self.rows, strict=True) if name in bias}
        )
        self.norm_q = nn.Identity() if norm is None else norm.build(self.key_width)
        self.norm_k = nn.Identity() if norm is None else norm.build(self.key_width)

    def fused(self) -> dict[str, list[int]]:
        """For Muon, the numbers of rows of the matrices that `qkv` consists of: queries, keys and values."""
        return {"qkv.weight": self.rows}

    def init_weights(self, depth: int) -> None:
        """Initialise the projections, for a core of `depth` blocks."""
        init_in(self.qkv)
        init_out(self.out, depth)

    def forward(
        self, stream_TD: Tensor, rotation: Tensor | None, memory: tuple[Tensor, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, K), keys and values (M, G, K).

        stream_TD: the tokens of the queries. rotation: their rotary rotations; None: none.
        memory: other tokens (M, D) and their rotations for keys and values; None: those of the stream.
        """
        if not (self.compiled and self.training):
            return self.project(stream_TD, rotation, memory)
        if memory is not None:
            memory = (memory[0], _real(memory[1]))
        return _compiled()(self, stream_TD, _real(rotation), memory)

    def project(
        self, stream_TD: Tensor, rotation: Tensor | None, memory: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` without the compiler."""
        if memory is None:
            q, k, v = self.qkv(stream_TD).split(self.rows, -1)
            k_rotation = rotation
        else:  # queries and keys come of different tokens, so the joint projection is divided
            both = [self.rows[0], self.rows[1] + self.rows[2]]
            if (parts := divided(self.qkv, both)) is not None:
                q, kv = parts[0](stream_TD), parts[1](memory[0])
            else:  # an adapter or hooks: the module itself has to be called
                q, kv = self.qkv(stream_TD).split(both, -1)[0], self.qkv(memory[0]).split(both, -1)[1]
            k, v = kv.split(self.rows[1:], -1)
            k_rotation = memory[1]
        if self.biases:
            # of a bias that is divided among processes, this one has the numbers of its heads
            q, k, v = (
                x if name not in self.biases else x + local(self.biases[name])
                for name, x in zip(QKV, (q, k, v), strict=True)
            )
        # shape[0] and not len(), which would make a number of the program of torch.export
        q_THK, k_TGK = (x.view(x.shape[0], n, self.key_width) for x, n in ((q, self.heads), (k, self.kv_heads)))
        v_TGK = v.view(v.shape[0], self.kv_heads, self.value_width)
        q_THK, k_TGK = self.norm_q(q_THK), self.norm_k(k_TGK)
        if self.turned and rotation is not None and k_rotation is not None:
            q_THK, k_TGK = rotate(q_THK, rotation), rotate(k_TGK, k_rotation)
        return q_THK.to(v_TGK.dtype), k_TGK.to(v_TGK.dtype), v_TGK  # norms and rotations return float32


def _real(rotation: Tensor | None) -> Tensor | None:
    """The rotation as real numbers (T, 1, K/2, 2), because the compiler has no code for complex ones."""
    return None if rotation is None else torch.view_as_real(rotation)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(Attention.project, dynamic=True)


@dataclass(frozen=True, kw_only=True)
class _Attend(Layer):
    """The fields that attention layers share.

    score: the log-likelihood of a query under a key.
    prior: the log-probability of each key before contents are compared.
    read: how values are read from the posterior over keys.
    heads: number of query heads.
    kv_heads: number of key-value heads, each shared by a group of query heads.
    key_width, value_width: width of one key and of one value of a head.
    bias: which projections have a bias, of "query", "key", "value" and "out".
    out: width of the update; None: that of the stream.
    merge: how the update joins the stream.
    """

    score: Score | None = None
    prior: Prior | None = None
    read: Read | None = None
    heads: int | None = None
    kv_heads: int | None = None
    key_width: int | None = None
    value_width: int | None = None
    bias: tuple[str, ...] = ()
    out: int | None = None
    merge: Merge = field(default_factory=Add)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Append the description of the shared fields to the docstring of every subclass."""
        super().__init_subclass__(**kwargs)
        shared = (_Attend.__doc__ or "").partition("\n\n")[2]
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n    A field that is None has the core's value.\n\n{shared}"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_parts(name, self.score, self.prior, self.read)
        check_part(f"{name}: merge", self.merge, Merge, "Add()")
        check_sizes(self, "heads", "kv_heads", "key_width", "value_width", "out")
        for part in self.bias:
            if part not in (*QKV, "out"):
                raise ConfigError(f"{name}: bias={self.bias!r} names {part!r}; there are query, key, value and out")

    def keys(self, core: CoreSettings) -> Keys | None:
        heads = self._groups(core)
        key = self.key_width or core.head_width
        return Keys(heads, key, self.value_width or key)

    def _groups(self, core: CoreSettings) -> int:
        heads = self.heads or core.heads
        groups = self.kv_heads or (core.groups if self.heads is None else heads)
        if heads % groups:
            raise ConfigError(f"{type(self).__name__}: heads={heads} is not a multiple of kv_heads={groups}")
        return groups

    def _attention(
        self, core: CoreSettings, width: int, *, prior: Prior | None, name: str, rotary: Rotary | None = None
    ) -> Attention:
        keys = self.keys(core)
        assert keys is not None
        heads = self.heads or core.heads
        score, read = self.score or core.score, self.read or core.read
        turned = score.turned and any(core.rotary_split if rotary is None else rotary.split)
        if keys.key_width % 2 and turned:
            raise ConfigError(
                f"{type(self).__name__}: key_width={keys.key_width} is odd, but rotary positions rotate pairs of numbers; "
                f"try key_width={keys.key_width + 1}, or a core with rotary_split=(0, 0, 0)"
            )
        return Attention(
            width,
            heads,
            keys.heads,
            Mechanism(score, prior, read, heads, keys.key_width, name=name),
            core.norm if core.qk_norm else None,
            bias=self.bias,
            key_width=keys.key_width,
            value_width=keys.value_width,
            out=self.out or width,
            turned=score.turned,
        )


@dataclass(frozen=True, kw_only=True)
class SelfAttention(_Attend):
    """Every token attends to the tokens of its sample that the core's mask allows.

    rotary: the rotary positions of this layer.
    mask: a rule of this layer, such as Window(512), beside that of the core: both must allow.
    """

    rotary: Rotary | None = None
    mask: Rule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary is not None:
            check_part("SelfAttention: rotary", self.rotary, Rotary, "Rotary(base=(1e6, 100.0, 100.0))")
        if self.mask is not None:
            check_part("SelfAttention: mask", self.mask, Rule, "Window(64)")

    def build(self, core: CoreSettings, width: int) -> Body:
        prior = self.prior if self.prior is not None else core.prior
        attention = self._attention(core, width, prior=prior, name="self", rotary=self.rotary)
        return _Self(attention, self.out or width, self.rotary, self.mask)


class _AttentionBody(Body):
    def __init__(self, attention: Attention, out: int) -> None:
        super().__init__(out)
        self.attention = attention

    def init_weights(self, depth: int) -> None:
        self.attention.init_weights(depth)


class _Self(_AttentionBody):
    narrows = True

    def __init__(self, attention: Attention, out: int, rotary: Rotary | None, mask: Rule | None) -> None:
        super().__init__(attention, out)
        self.rotary, self.mask = rotary, mask

    def forward(self, stream_TD: Tensor, context: Context, wanted_N: Tensor | None = None) -> Tensor:
        attention, memory = self.attention, None
        plan = context.plan if self.mask is None else context.plans[self.mask]
        width = attention.key_width
        rotation = (
            context.rotations[width if self.rotary is None else (width, self.rotary)] if attention.turned else None
        )
        narrow = None
        # queries of the wanted rows alone, if these are few. Not of a read that samples, whose random numbers would change, and
        # not of a projection with hooks or of another class, which has to be called
        few = wanted_N is not None and 4 * len(wanted_N) <= len(stream_TD)
        if few and wanted_N is not None and attention.mechanism.fused and is_untouched(attention.qkv):
            narrow = plan.narrowed(wanted_N)
        if narrow is not None and wanted_N is not None:
            plan, memory = narrow, (stream_TD, rotation)
            stream_TD = stream_TD[wanted_N]
            rotation = None if rotation is None else rotation[wanted_N]
        q_THK, k_MGK, v_MGK = attention(stream_TD, rotation, memory)
        # the plan cuts the stream into samples and calls the mechanism for each run of equal ones: attention/plan.py
        read_THK = plan.attend(q_THK, k_MGK, v_MGK, attention.mechanism, self.index)
        update_TD = attention.out(read_THK.flatten(1).to(stream_TD.dtype))
        return update_TD if wanted_N is None or narrow is not None else update_TD[wanted_N]


@dataclass(frozen=True, kw_only=True)
class CrossAttention(_Attend):
    """In the writer of an `EncoderDecoder`, every token attends to the reader's states of its own sample."""

    crosses: ClassVar[bool] = True

    def build(self, core: CoreSettings, width: int) -> Body:
        if width != core.width:
            raise ConfigError(
                f"CrossAttention: the stream is {width} wide here and the reader's states {core.width}; merge by Add"
            )
        return _Cross(self._attention(core, width, prior=self.prior, name="cross"), self.out or width)


class _Cross(_AttentionBody):
    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        crossing, attention = context.crossing, self.attention
        if crossing is None:
            raise ConfigError(
                "CrossAttention: there is no other core to attend to; it belongs in the writer of an EncoderDecoder"
            )
        width = attention.key_width
        memory = (crossing.memory_MD, crossing.rotations[width])  # the reader's states give keys and values
        q_THK, k_MGK, v_MGK = attention(stream_TD, context.rotations[width], memory)
        read_THK = crossing.plan.attend(q_THK, k_MGK, v_MGK, attention.mechanism, self.index)
        return attention.out(read_THK.flatten(1).to(stream_TD.dtype))


@dataclass(frozen=True, kw_only=True)
class PersistentMemory(_Attend):
    """Every token attends to `slots` learned keys and values (Sukhbaatar et al. 2019).

    With prior=MixingWeights(slots) it is a mixture model with learned mixing weights.

    slots: number of learned keys and values.
    """

    slots: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "slots")
        if self.bias:
            raise ConfigError(f"PersistentMemory: bias={self.bias!r}; its keys and values are learned, so it has none")
        for part in (self.score, *(self.prior.parts() if self.prior else ())):
            if part is not None and part.most is not None and part.most < self.slots:
                raise ConfigError(
                    f"PersistentMemory: slots={self.slots}, but {part} is defined for {part.most} only; make them equal"
                )

    def keys(self, core: CoreSettings) -> Keys | None:
        return None

    def build(self, core: CoreSettings, width: int) -> Body:
        return _Persistent(self, core, width)


class _Persistent(Body):
    def __init__(self, layer: PersistentMemory, core: CoreSettings, width: int) -> None:
        super().__init__(layer.out or width)
        self.heads, self.groups = layer.heads or core.heads, layer._groups(core)
        key = layer.key_width or core.head_width
        value = layer.value_width or key
        score, read = layer.score or core.score, layer.read or core.read
        self.mechanism = Mechanism(score, layer.prior, read, self.heads, key, name="memory")
        self.query = nn.Linear(width, self.heads * key, bias=False)
        self.key_MGK = nn.Parameter(torch.randn(layer.slots, self.groups, key))
        self.value_MGK = nn.Parameter(torch.randn(layer.slots, self.groups, value) * key**-0.5)
        self.out = nn.Linear(self.heads * value, self.out_width, bias=False)

    def init_weights(self, depth: int) -> None:
        init_in(self.query)
        init_out(self.out, depth)

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        q_THK = self.query(stream_TD).unflatten(-1, (self.heads, -1))
        k_MGK, v_MGK = (x.to(q_THK.dtype) for x in (self.key_MGK, self.value_MGK))
        # slots belong to no sample, so that all samples of the pack attend to the same ones
        slots = all_pairs(1, len(k_MGK), q_THK.device).k
        pairs = Pairs(context.layout.info[None, :, None], slots)
        read = self.mechanism(q_THK[None], k_MGK[None], v_MGK[None], pairs, context.trace)
        return self.out(read[0].flatten(1))

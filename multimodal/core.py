"""The one transformer: a declaration (`Core`) with presets, and the module it makes (`Transformer`)."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Attention, Backend, Cache, Layout, Plan, ScaledDotProduct, Score, plan_attention
from multimodal.declare import Declared, override
from multimodal.masks import PREFIX_LM, Rule
from multimodal.norm import RMSNorm
from multimodal.positions import rotary_frequencies, rotary_turns
from multimodal.shapes import ConfigError, check_shapes


@dataclass(frozen=True, kw_only=True)
class Core(Declared):
    """A pre-norm transformer with grouped-query heads, RMSNorm, a gated MLP and rotary places."""

    width: int  # D
    depth: int  # L, blocks
    heads: int  # H, query heads
    kv_heads: int | None = None  # G, key-value heads; None: as many as heads
    mlp_width: int | None = None  # hidden width of the gated MLP; None: 8/3 of width, rounded up to a multiple of 16
    qk_norm: bool = True  # RMSNorm on queries and keys: keeps attention logits bounded (Dehghani et al. 2023)
    dropout: float = 0.0  # share of each block's output that is dropped in training
    drop_path: float = (
        0.0  # share of samples whose block is skipped in training, rising linearly to this at the last block
    )
    rotary_split: tuple[int, ...] = (2, 1, 1)  # ratio in which a head's pairs are turned by time, row and column
    rotary_base: tuple[float, ...] = (10000.0, 100.0, 100.0)  # slowest turn of each axis, steps / radian
    mask: Rule = PREFIX_LM
    score: Score = field(default_factory=ScaledDotProduct)

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
        if len(self.rotary_split) != 3 or len(self.rotary_base) != 3 or sum(self.rotary_split) == 0:
            raise ConfigError("Core: rotary_split and rotary_base give one number each for time, row and column")

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
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.groups)
        norms = 2 * self.width + (2 * self.head_width if self.qk_norm else 0)
        return self.depth * (attention + 3 * self.width * self.hidden + norms) + self.width

    def flops(self, tokens: int, context: float) -> float:
        """Multiply-adds counted as 2, of one forward pass over `tokens` that see `context` tokens each on average.

        Matrix products only, as in Kaplan et al. 2020 (2 a weight and token) plus 4 T M D a layer for attention
        (Chowdhery et al. 2022, appendix B). A training step costs three times this.
        """
        weights = self.depth * (
            self.width * self.head_width * (2 * self.heads + 2 * self.groups) + 3 * self.width * self.hidden
        )
        return 2.0 * tokens * weights + 4.0 * tokens * context * self.width * self.depth

    def build(self) -> "Transformer":
        """Make the module, with fresh weights."""
        return Transformer(self)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32) -> Cache:
        """Room for decoding `rows` samples of up to `capacity` tokens."""
        return Cache(
            layers=self.depth,
            batch=rows,
            capacity=capacity,
            kv_heads=self.groups,
            head_width=self.head_width,
            device=device,
            dtype=dtype,
        )

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
    """x + attention(norm(x)), in a core that writes from another's states x + attention(norm(x), states), then x + mlp(norm(x))."""

    def __init__(self, core: Core, drop_path: float, *, crosses: bool = False) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(core.width)
        self.attention = Attention(core.width, core.heads, core.groups, core.score, core.qk_norm)
        if crosses:
            self.norm_cross = RMSNorm(core.width)
            self.cross = Attention(core.width, core.heads, core.groups, core.score, core.qk_norm)
        self.norm_mlp = RMSNorm(core.width)
        self.gate_up = nn.Linear(core.width, 2 * core.hidden, bias=False)
        self.down = nn.Linear(core.hidden, core.width, bias=False)
        self.dropout, self.drop_path = core.dropout, drop_path

    def forward(
        self,
        stream_TD: Tensor,
        turns: Tensor,
        plan: Plan,
        layer: int,
        sample_T: Tensor,
        crossing: "Crossing | None" = None,
    ) -> Tensor:
        stream_TD = stream_TD + self._drop(self.attention(self.norm_attention(stream_TD), turns, plan, layer), sample_T)
        if crossing is not None:
            read_TD = self.cross(self.norm_cross(stream_TD), turns, crossing.plan, layer, crossing.memory)
            stream_TD = stream_TD + self._drop(read_TD, sample_T)
        gate, up = self.gate_up(self.norm_mlp(stream_TD)).chunk(2, dim=-1)
        return stream_TD + self._drop(self.down(F.silu(gate) * up), sample_T)

    def _drop(self, update_TD: Tensor, sample_T: Tensor) -> Tensor:
        if self.training and self.dropout:
            update_TD = F.dropout(update_TD, self.dropout)
        if self.training and self.drop_path:
            keep = (
                torch.rand(int(sample_T[-1]) + 1, 1, device=update_TD.device, dtype=update_TD.dtype) >= self.drop_path
            )
            update_TD = update_TD * (keep / (1 - self.drop_path))[sample_T]
        return update_TD


class Crossing(NamedTuple):
    """What a core that writes looks at: states (M, D) with their turns, and how."""

    memory: tuple[Tensor, Tensor]
    plan: Plan


class Transformer(nn.Module):
    """The core's weights: reads a stream (T, D) and gives its states (T, D)."""

    axis_K: Tensor
    frequency_K: Tensor

    def __init__(self, core: Core, *, crosses: bool = False) -> None:
        super().__init__()
        self.core = core
        self.blocks = nn.ModuleList(
            Block(core, core.drop_path * layer / max(core.depth - 1, 1), crosses=crosses) for layer in range(core.depth)
        )
        self.norm = RMSNorm(core.width)
        axis_K, frequency_K = rotary_frequencies(core.head_width, core.rotary_split, core.rotary_base)
        self.register_buffer("axis_K", axis_K, persistent=False)
        self.register_buffer("frequency_K", frequency_K, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("attention.out.weight", "cross.out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * core.depth) ** 0.5 if last else 0.02)

    def forward(
        self,
        stream_TD: Tensor,
        position_TA: Tensor,
        layout: Layout,
        *,
        cache: Cache | None = None,
        backend: Backend = "auto",
        crossing: Crossing | None = None,
    ) -> Tensor:
        """States (T, D) of a packed stream; places (T, 3) in steps.

        Raises:
            ShapeError: stream, places and layout disagree.
        """
        sample_T = layout.places.sample
        check_shapes(
            "Core", {"D": self.core.width, "A": 3}, stream_TD=stream_TD, position_TA=position_TA, sample_T=sample_T
        )
        dtype = (
            torch.get_autocast_dtype(stream_TD.device.type)
            if torch.is_autocast_enabled(stream_TD.device.type)
            else stream_TD.dtype
        )
        plan = plan_attention(self.core.mask, layout, backend=backend, dtype=dtype, cache=cache)
        turns = self.turns(position_TA)
        for layer, block in enumerate(self.blocks):
            stream_TD = block(stream_TD, turns, plan, layer, sample_T, crossing)
        return self.norm(stream_TD)

    def turns(self, position_TA: Tensor) -> Tensor:
        """How far every pair of a head is turned at these places."""
        return rotary_turns(position_TA, self.axis_K, self.frequency_K)

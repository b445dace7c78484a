"""A head that writes continuous tokens: a small flow samples each from noise, given the core's state; no codebook is needed.

After Li et al. 2024 (arXiv 2406.11838), "Autoregressive Image Generation without Vector Quantization": the core is autoregressive
over tokens, and a small network samples each. Theirs is a diffusion model; this one is flow matching (Lipman et al. 2023, arXiv
2210.02747) along straight lines (Liu et al. 2023, arXiv 2209.03003).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import Head, Prediction, Readout, check_length
from multimodal.positions import sine_cosine
from multimodal.shapes import ConfigError, StreamError, check_shapes
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class FlowMatching(Head):
    """Writes continuous tokens from a learned start to a learned stop, or up to the fixed `length` of their kind.

    The rows of a written segment are [start, x_1 .. x_n]: state i is the condition of x_(i+1), and the last state is to stop.
    Features should have about unit variance, as tokenizers normalise them; `spread` corrects those that do not.
    In evaluation the loss uses the same noise every time, so that losses can be compared.

    width: hidden width of the flow's network.
    depth: number of residual blocks of that network.
    draws: number of (time, noise) pairs for each token in training, which share the core's state.
    steps: number of steps from noise to features, each with two evaluations of the network (Heun's method).
    spread: standard deviation of the written features, by which they are divided.
    """

    width: int = 256
    depth: int = 3
    draws: int = 4
    steps: int = 16
    spread: float = 1.0
    queries: ClassVar[int] = 1
    autoregressive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("width", "depth", "draws", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FlowMatching: {name}={getattr(self, name)} must be at least 1")
        if self.width % 2:
            raise ConfigError(f"FlowMatching: width={self.width} is odd; try width={self.width + 1}")
        if self.spread <= 0:
            raise ConfigError(f"FlowMatching: spread={self.spread} must be more than 0")

    def vocab(self, tokenizer: Tokenizer) -> int:
        """Number of written features, plus one for the stop unless all values have one length."""
        name, features = type(tokenizer).__name__, tokenizer.written_features
        if features is None or tokenizer.vocab_size is not None or tokenizer.classes:
            what = "its values are classes; use Classify" if tokenizer.classes else "it has no features; use NextToken"
            raise ConfigError(f"FlowMatching writes features, which {name} has not: {what}")
        if not tokenizer.decodes:
            raise ConfigError(f"FlowMatching: {name} has no decode, so what is written could not be read")
        try:
            tokenizer.places(1)
        except ConfigError as error:
            raise ConfigError(f"FlowMatching cannot write it: {error}") from error
        return features + (tokenizer.length is None)

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        check_length(self, tokens, tokenizer)
        if not len(tokens):
            raise StreamError(
                "FlowMatching: the answer is empty, but one token at least is written before the stop; leave this sample out"
            )
        return tokens.content[:, : tokenizer.written_features]

    def readout(self, width: int, tokenizer: Tokenizer) -> "FlowReadout":
        features = self.vocab(tokenizer) - (tokenizer.length is None)
        return FlowReadout(self, width, features, stops=tokenizer.length is None)

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """The mean (N, F) of the features that follow each state, and, unless the length is fixed, the logit of the stop.

        Along straight lines the velocity at time 0 is E[x] - noise (Liu et al. 2023, section 2.1), so with zero noise it is the
        mean, without sampling.
        """
        assert isinstance(readout, FlowReadout)
        none_NF = state_ND.new_zeros(len(state_ND), readout.features)
        mean_NF = readout.velocity(none_NF, none_NF[:, :1], readout.linear(state_ND)) * self.spread
        return mean_NF if readout.stop is None else torch.cat([mean_NF, readout.stop(state_ND)], 1)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        raise ConfigError("FlowMatching: it is learned from states, not from logits; use state_loss")

    def state_loss(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        """The squared error of velocities, averaged over features and draws and summed over tokens, plus the stop's, in nats."""
        assert isinstance(readout, FlowReadout)
        ended_N = torch.zeros(len(state_ND), dtype=torch.bool)
        ended_N[torch.tensor(lengths).cumsum(0) - 1] = True
        ended_N = ended_N.to(state_ND.device)
        if len(state_ND) != sum(lengths) or [n - 1 for n in lengths] != list(target_lengths):
            raise StreamError(
                f"FlowMatching: {list(target_lengths)} written tokens were read from {list(lengths)} states; one more is wanted"
            )
        # the point at time t of the line from noise to x has the velocity x - noise
        x_NF = target.float().repeat(self.draws, 1) / self.spread
        time_N, noise_NF = self._times_and_noises(readout, target, target_lengths)
        between_NF = noise_NF + time_N * (x_NF - noise_NF)
        condition_NF = readout.linear(state_ND[~ended_N]).repeat(self.draws, 1)
        velocity_NF = readout.velocity(between_NF, time_N, condition_NF).float()
        total = (velocity_NF - (x_NF - noise_NF)).square().mean(1).sum() / self.draws
        if readout.stop is not None:
            stop_N = readout.stop(state_ND)[:, 0].float()
            total = total + F.binary_cross_entropy_with_logits(stop_N, ended_N.float(), reduction="sum")
        return total

    def _times_and_noises(
        self, readout: nn.Module, target: Tensor, target_lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Random times (N, 1) and noises (N, F), draw after draw; the times of a token are spread evenly over 0..1."""

        def drawn(count: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor]:
            first = torch.rand(1, count, 1, generator=generator, device=device)
            noise = torch.randn(self.draws, count, target.shape[1], generator=generator, device=device)
            return (first + torch.arange(self.draws, device=device)[:, None, None]) / self.draws, noise

        if readout.training:
            time, noise = drawn(len(target), None, target.device)
        else:  # a seed for each sample, so that its loss does not depend on the batch
            parts = [drawn(n, torch.Generator().manual_seed(0), torch.device("cpu")) for n in target_lengths]
            time, noise = (torch.cat(part, 1).to(target.device) for part in zip(*parts, strict=True))
        return time.flatten(0, 1), noise.flatten(0, 1)

    def draw(
        self,
        readout: Readout,
        state_ND: Tensor,
        noise_NF: Tensor,
        *,
        guide_ND: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Features (N, F) sampled for each state, and the logit (N,) of the stop: -infinity if the length is fixed.

        A function of the noise, which `temperature` scales; 0 gives the features that zero noise flows to. guide_ND: the states of
        the same samples without their context; velocities are theirs plus `guidance` times the difference (classifier-free
        guidance, Ho & Salimans 2022, arXiv 2207.12598).
        """
        assert isinstance(readout, FlowReadout)
        check_shapes(
            "FlowMatching.draw", {"F": readout.features}, state_ND=state_ND, noise_NF=noise_NF,
            guide_ND=state_ND if guide_ND is None else guide_ND,
        )  # fmt: skip
        condition, guide = readout.linear(state_ND), None if guide_ND is None else readout.linear(guide_ND)

        def velocity(x_NF: Tensor, time: float) -> Tensor:
            time_N = x_NF.new_full((len(x_NF), 1), time)
            v_NF = readout.velocity(x_NF, time_N, condition).float()
            if guide is None:
                return v_NF
            guide_NF = readout.velocity(x_NF, time_N, guide).float()
            return guide_NF + guidance * (v_NF - guide_NF)

        x_NF, step = noise_NF.float() * temperature, 1 / self.steps
        for i in range(self.steps):  # Heun's method
            first = velocity(x_NF, i * step)
            second = velocity(x_NF + step * first, (i + 1) * step)
            x_NF = x_NF + step * (first + second) / 2
        stop_N = (
            x_NF.new_full((len(x_NF),), -torch.inf) if readout.stop is None else readout.stop(state_ND)[:, 0].float()
        )
        return x_NF * self.spread, stop_N

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("FlowMatching: an answer is written step by step; use Model.generate")


class FlowReadout(Readout):
    """The learned start, the flow's network, and the layer of the stop; `linear` maps a state to the network's condition."""

    def __init__(self, head: FlowMatching, width: int, features: int, *, stops: bool) -> None:
        super().__init__(width, head.width, head.queries)
        self.features = features
        self.enter = nn.Linear(features, head.width)
        self.time = nn.Sequential(nn.Linear(head.width, head.width), nn.SiLU(), nn.Linear(head.width, head.width))
        self.blocks = nn.ModuleList(_Block(head.width) for _ in range(head.depth))
        self.scale_shift = nn.Linear(head.width, 2 * head.width)
        self.leave = nn.Linear(head.width, features)
        self.stop = nn.Linear(width, 1) if stops else None
        for module in (self.scale_shift, self.leave):  # the initial velocity is 0 everywhere
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def last_layers(self) -> list[nn.Module]:
        return []  # `linear` is a part of the network, all of which stays exact

    def velocity(self, x_NF: Tensor, time_N: Tensor, condition_NF: Tensor) -> Tensor:
        """The velocities (N, F) of points x (N, F) at times (N, 1) in 0..1, given conditions (N, width of the network)."""
        x_NF = x_NF.to(self.enter.weight.dtype)
        time_N = time_N.to(torch.promote_types(x_NF.dtype, torch.float32))
        # frequencies from 100 down to 0.1 radians over the whole time
        encoding = sine_cosine(100 * time_N, condition_NF.shape[1], base=1000.0).to(x_NF)
        condition_NF = F.silu(condition_NF + self.time(encoding))
        h = self.enter(x_NF)
        for block in self.blocks:
            h = block(h, condition_NF)
        scale, shift = self.scale_shift(condition_NF).chunk(2, -1)
        return self.leave(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)


class _Block(nn.Module):
    """A residual MLP whose norm and gate depend on the condition; the gate is 0 at first (Peebles & Xie 2023, "adaLN-Zero")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adapt = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, h: Tensor, condition_NF: Tensor) -> Tensor:
        scale, shift, gate = self.adapt(condition_NF).chunk(3, -1)
        return h + gate * self.mlp(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)

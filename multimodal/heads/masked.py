"""A head for self-supervised learning: some tokens of a field that is read are hidden, and it predicts them.

After BERT (Devlin et al. 2019, arXiv 1810.04805) for ids, MAE (He et al. 2022, arXiv 2111.06377) and SimMIM (Xie et al. 2022,
arXiv 2111.09886) for patches, and HuBERT (Hsu et al. 2021, arXiv 2106.07447) for spans of frames, without its clusters.

tokens of the field   t0 t1 t2 t3 t4        t1 and t4 are hidden; training draws others each time
stream                t0 t2 t3 | ? ?        ? is one learned token, at the positions of t1 and t4
head predicts                    t1 t4
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.heads.base import EncodedSample, Head, LaidOut, Prediction, Readout, Segment, tokens_of
from multimodal.pattern import Pattern
from multimodal.positions import in_steps
from multimodal.shapes import ConfigError, StreamError, TaskError
from multimodal.tokenizer import Tokenizer, Tokens

NORMALISE = ("none", "token")


@final
@dataclass(frozen=True)
class Masked(Head):
    """Hides tokens of the written field, which is one of those that are read ("image -> image"), and predicts them.

    Tokens are hidden in blocks, each with probability `share`; at least one block is hidden and one is visible. A block is a span
    of time or a square of patches, `span` steps long; of 1 step it is a single token. If a value is shorter than two blocks, blocks
    are half as long as the value. The field is bidirectional, even if its kind is causal. A pair of related tokens is
    left out if one of them is hidden.

    The loss is the cross-entropy of ids, or the squared error of features. With normalise="token" each hidden token is normalised
    by its own mean and standard deviation first (He et al. 2022, table 1d), so that texture counts and not brightness; that is for
    pixels. For frames of a sound it is wrong: the mean of a frame is its loudness, which separates speech from silence, and the
    noise of silence would become as large as speech. There the tokenizer's normalisation of the whole value suffices ("none").

    share: the probability that a token is hidden, above 0 and below 1.
    span: the side of a block, in steps of the kind's positions.
    normalise: how hidden features are normalised before they are targets: "none", or "token".

    Examples:
        >>> task = mm.Task("image -> image", mm.Masked(share=0.75, normalise="token"))
        >>> model = mm.Model({"image": ImagePatches(patch=4, channels=1)}, mm.Core.tiny(), [task])
        >>> run = mm.fit(model, {"image -> image": samples}, steps=2, batch=4, quiet=True)
    """

    share: float
    span: int = 1
    normalise: Literal["none", "token"] = "none"
    queries: ClassVar[int] = 1
    measures: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"Masked: share={self.share} must be between 0 and 1: some tokens are hidden, some seen")
        if self.span < 1:
            raise ConfigError(f"Masked: span={self.span} hides nothing; use 1 or more")
        if self.normalise not in NORMALISE:
            raise ConfigError(f"Masked: normalise={self.normalise!r} is none of {', '.join(NORMALISE)}")

    def vocab(self, tokenizer: Tokenizer) -> int:
        """Size of the vocabulary, or number of the features that are written."""
        name, size = type(tokenizer).__name__, tokenizer.vocab_size or tokenizer.written_features
        if tokenizer.classes:
            raise ConfigError(
                f"Masked: a value of {name} is a single token, so nothing is visible if it is hidden; use Classify"
            )
        if not size:
            raise ConfigError(f"Masked: {name} declares no vocab_size or feature_size to rebuild")
        if tokenizer.vocab_size is None and self.normalise == "token" and size == 1:
            raise ConfigError(
                f"Masked: normalise='token' leaves nothing of the single feature of {name}; use normalise='none'"
            )
        return size

    def bind(self, pattern: Pattern) -> Pattern:
        pattern = replace(super().bind(pattern), hides=True)
        if (pattern.writes.name, pattern.writes.kind) not in [(field.name, field.kind) for field in pattern.reads]:
            raise TaskError(
                f"task {pattern.text!r} does not read {pattern.writes.name!r}, but {type(self).__name__} writes what is "
                f"hidden of a field that is read, as in '{pattern.writes.kind} -> {pattern.writes.kind}'"
            )
        if any(field.many and field.name == pattern.writes.name for field in pattern.reads):
            raise TaskError(
                f"task {pattern.text!r} reads a list of {pattern.writes.kind!r}, but {type(self).__name__} hides parts of one "
                "value; leave the star out"
            )
        return pattern

    def check_core(self, pattern: str, core: Any) -> None:
        # learned tokens differ by their rotary positions only; an EncoderDecoder has no rotary_split
        if not any(getattr(core, "rotary_split", ())):
            raise ConfigError(
                f"Model: task {pattern!r}: hidden tokens differ by their rotary positions only, in the core that reads the others; "
                "give one Core, whose rotary_split is not all 0"
            )

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """The hidden tokens are removed from their segment; the last segment has the learned token at each of their positions."""
        if sample.begin is not None:
            return super().lay_out(sample)  # raises
        segments, pattern = sample.read(), sample.pattern
        where = f"field {pattern.writes.name!r}"
        whole, step, axes = sample.tokens[pattern.writes.name], sample.tokenizer.step, sample.tokenizer.axes
        if whole is None:
            raise StreamError(f"{where} is None, but it is what {type(self).__name__} hides and rebuilds")
        try:
            hidden_N = self.hidden(whole, step, random=sample.random)
        except StreamError as error:
            raise StreamError(f"{where}: {error}") from None
        names = [field.name for field in pattern.reads]
        at = len(sample.read(pattern.reads[: names.index(pattern.writes.name)]))
        visible = whole.kept(~hidden_N)
        segments[at] = Segment(pattern.writes.kind, visible, step, True, axes=axes)
        read = tokens_of(segments)
        hidden_NA = whole.position_NA[hidden_N]
        query = Tokens(torch.zeros(len(hidden_NA), dtype=torch.long), hidden_NA)
        segments.append(Segment(sample.start.kind, query, step, True, within=at, axes=axes))
        target = None
        if sample.learn:
            target = self.target(Tokens(whole.content[hidden_N], hidden_NA), read, sample.tokenizer)
        return [LaidOut(segments, read, read, read + len(query), target, hidden=(whole, hidden_N))]

    def hidden(self, tokens: Tokens, step: tuple[float, ...], *, random: bool) -> Tensor:
        """Which tokens (N,) of a value are hidden: at least one is, and at least one is not.

        random: draw them from torch's global CPU generator; else they are a function of the value.

        Raises:
            StreamError: the value has one token only.
        """
        count = len(tokens)
        if count < 2:
            raise StreamError(
                "Masked: a value of one token cannot be hidden in part; leave it out, or use finer tokens"
            )
        generator = None
        if not random:  # seeded by the value alone, so that its loss does not depend on the batch
            key = tokens.content.detach().cpu().contiguous().numpy().tobytes()
            generator = torch.Generator().manual_seed(crc32(key))
        block_N = self._blocks(in_steps(tokens.position_NA, step), generator)
        blocks = int(block_N.max()) + 1
        # rounded at random, so its mean is the share
        chosen = int(self.share * blocks + torch.rand(1, generator=generator))
        chosen = min(max(chosen, 1), blocks - 1)
        return torch.randperm(blocks, generator=generator)[block_N] < chosen

    def _blocks(self, position_NA: Tensor, generator: torch.Generator | None) -> Tensor:
        """The number of each token's block (N,), from positions in steps; there are two blocks or more, cut at a random offset."""
        span, step_NA = self.span, position_NA.round()
        if span > 1:
            span = min(span, (int((step_NA.amax(0) - step_NA.amin(0)).max()) + 1) // 2)
        if span < 2:
            return torch.arange(len(step_NA))
        cut_NA = (step_NA + torch.randint(span, (step_NA.shape[1],), generator=generator)) // span
        return torch.unique(cut_NA, dim=0, return_inverse=True)[1]

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        if tokenizer.vocab_size is not None:
            return tokens.content
        features_NF = tokens.content[:, : tokenizer.written_features]
        if self.normalise == "none":
            return features_NF
        mean, spread = _mean_spread(features_NF)
        return (features_NF - mean) / spread

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """The logits of ids, or the features, of the hidden tokens only."""
        return readout.linear(state_ND)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        """For ids the cross-entropy in nats, for features the mean squared error of a token; summed over the hidden tokens."""
        return self.row_losses(logits, target).sum()

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return (logits.float() - target).square().mean(-1)
        return F.cross_entropy(logits.float(), target, reduction="none")

    def answer(
        self,
        logits: Tensor,
        lengths: Sequence[int],
        tokenizer: Tokenizer,
        hidden: Sequence[tuple[Tokens, Tensor]] = (),
    ) -> list[Prediction]:
        """The whole values, with predictions in place of the hidden tokens.

        With normalise="token" predictions get the average mean and standard deviation of the visible tokens. Features have no
        probability, so their confidence is 1.

        hidden: by sample, its tokens and which of them (N,) were hidden.
        """
        if len(hidden) != len(lengths):
            raise ConfigError("Masked: what is rebuilt is shown within its value; use Model.predict")
        answers = []
        for rows, (tokens, hidden_N) in zip(logits.float().cpu().split(list(lengths)), hidden, strict=True):
            content, confidence = tokens.content.clone(), 1.0
            if tokenizer.vocab_size is not None:
                log_p, content[hidden_N] = rows.log_softmax(-1).max(-1)
                confidence = float(log_p.sum().exp())
            else:
                if self.normalise == "token":
                    mean, spread = _mean_spread(content[~hidden_N, : rows.shape[1]])
                    rows = rows * spread.mean() + mean.mean()
                content[hidden_N, : rows.shape[1]] = rows
            whole = Tokens(content, tokens.position_NA)
            answers.append(Prediction(tokenizer.decode(whole), confidence, tokens=whole))
        return answers


def _mean_spread(features_NF: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each token's features, (N, 1) each."""
    variance, mean = torch.var_mean(features_NF, 1, correction=0, keepdim=True)
    return mean, (variance + 1e-6).sqrt()

"""A head that learns without labels: some tokens of a field that is read are hidden, and it says what they were.

After BERT (Devlin et al. 2019, arXiv 1810.04805) for ids, MAE (He et al. 2022, arXiv 2111.06377) and SimMIM (Xie et al. 2022,
arXiv 2111.09886) for patches, and HuBERT (Hsu et al. 2021, arXiv 2106.07447) for spans of frames, without its clusters.

tokens of the field   t0 t1 t2 t3 t4        two of them are hidden, which is drawn anew each time
stream                t0 t2 t3 | ? ?        ? is one learned token, at the places of t1 and t4
head reads                       t1 t4
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
from multimodal.shapes import ConfigError, StreamError, TaskError
from multimodal.tokenizer import Tokenizer, Tokens

NORMALISE = ("none", "token")


@final
@dataclass(frozen=True)
class Masked(Head):
    """Hides tokens of the field that is written, which is one of those read ("image -> image"), and rebuilds them.

    Each token is hidden with probability `share`, in blocks; at least one block is hidden and one is seen. A block is `span` steps
    of the kind's places long: a span of time, a square of patches; of one step it is a single token. Where a value is shorter than
    two blocks, blocks are half as long as it is. The field is read without direction, also where its kind is causal.

    Ids are learned by cross-entropy, features by the squared error. normalise="token" takes off each hidden token's own mean and
    spread first (He et al. 2022, table 1d), so that the pattern counts and not how bright it is; that is for pixels. In the frames
    of a sound a token's own mean is its loudness, which separates speech from silence, and the noise of silence would be made
    as large as speech: there the tokenizer's normalisation, by the whole value, is the right one ("none").

    share: the probability that a token is hidden, above 0 and below 1.
    span: the side of a block, in steps of the kind's places.
    normalise: what is taken off hidden features before they are learned: "none", or "token", each token's own mean and spread.

    Examples:
        >>> task = mm.Task("image -> image", mm.Masked(share=0.75, normalise="token"))
        >>> model = mm.Model({"image": ImagePatches(patch=4, channels=1)}, mm.Core.tiny(), [task])
        >>> run = mm.fit(model, {"image -> image": samples}, steps=2, batch=4, quiet=True)
    """

    share: float
    span: int = 1  # steps
    normalise: Literal["none", "token"] = "none"  # features
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
        """The vocabulary, or the features that are written."""
        name, size = type(tokenizer).__name__, tokenizer.vocab_size or tokenizer.written_features
        if tokenizer.classes:
            raise ConfigError(f"Masked: a value of {name} is classes, one token that nothing is left of; use Classify")
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
        return pattern

    def check_core(self, pattern: str, core: Any) -> None:
        # an EncoderDecoder has no rotary_split of its own
        if not any(getattr(core, "rotary_split", ())):
            raise ConfigError(
                f"Model: task {pattern!r}: hidden tokens know their places by rotary positions in the core that reads the others; "
                "give one Core, whose rotary_split is not all 0"
            )

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """The hidden tokens leave the segment they are in; the learned token stands in their places, as the last segment."""
        if sample.begin is not None:
            return super().lay_out(sample)  # which refuses it
        segments, pattern = sample.read(), sample.pattern
        where = f"field {pattern.writes.name!r}"
        whole, step = sample.tokens[pattern.writes.name], sample.tokenizer.step
        if whole is None:
            raise StreamError(f"{where} is None, but it is what {type(self).__name__} hides and rebuilds")
        try:
            hidden_N = self.hidden(whole, step, random=sample.random)
        except StreamError as error:
            raise StreamError(f"{where}: {error}") from None
        present = [field.name for field in pattern.reads if sample.tokens[field.name] is not None]
        at = present.index(pattern.writes.name)
        visible = Tokens(whole.content[~hidden_N], whole.position_NA[~hidden_N])
        segments[at] = Segment(pattern.writes.kind, visible, step, True)
        read = tokens_of(segments)
        place_NA = whole.position_NA[hidden_N]
        query = Tokens(torch.zeros(len(place_NA), dtype=torch.long), place_NA)
        segments.append(Segment(sample.start.kind, query, step, True, within=at))
        target = None
        if sample.learn:
            target = self.target(Tokens(whole.content[hidden_N], place_NA), read, sample.tokenizer)
        return [LaidOut(segments, read, read, read + len(query), target, hidden=(whole, hidden_N))]

    def hidden(self, tokens: Tokens, step: tuple[float, float, float], *, random: bool) -> Tensor:
        """Which tokens (N,) of a value are hidden; some are and some are not.

        random: drawn anew, from torch's global CPU generator; else the same ones for the same value.

        Raises:
            StreamError: a value of which no part can be hidden.
        """
        count = len(tokens)
        if count < 2:
            raise StreamError(
                "Masked: a value of one token cannot be hidden in part; leave it out, or use finer tokens"
            )
        generator = None
        if not random:  # of the value alone, so that it is hidden alike beside any others
            key = tokens.content.detach().cpu().contiguous().numpy().tobytes()
            generator = torch.Generator().manual_seed(crc32(key))
        block_N = self._blocks(tokens.position_NA / torch.tensor(step), generator)
        blocks = int(block_N.max()) + 1
        chosen = int(self.share * blocks + torch.rand(1, generator=generator))  # on average exactly the share
        chosen = min(max(chosen, 1), blocks - 1)
        return torch.randperm(blocks, generator=generator)[block_N] < chosen

    def _blocks(self, position_NA: Tensor, generator: torch.Generator | None) -> Tensor:
        """Which block each token (N,) is in, by its place in steps; two or more, cut at places that are drawn."""
        span, step_NA = self.span, position_NA.round()
        if span > 1:
            span = min(span, (int((step_NA.amax(0) - step_NA.amin(0)).max()) + 1) // 2)
        if span < 2:
            return torch.arange(len(step_NA))
        cut_NA = (step_NA + torch.randint(span, (3,), generator=generator)) // span
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
        """Of hidden tokens only: logits of ids, or features."""
        return readout.linear(state_ND)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        """Of ids in nats; of features the mean squared error of a token, summed over the hidden tokens."""
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
        """The whole values, with the hidden tokens as they were rebuilt; `hidden` are all tokens, and which of them were (N,).

        Features that were learned up to each token's mean and spread get the average ones of the tokens that are seen. Features
        have no probability: their confidence is 1.
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
    """Each token's own, (N, 1)."""
    variance, mean = torch.var_mean(features_NF, 1, correction=0, keepdim=True)
    return mean, (variance + 1e-6).sqrt()

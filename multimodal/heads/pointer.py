"""A pointer network (Vinyals et al. 2015, arXiv 1506.03134): answers are made of tokens of the context, one after the other.

states of the context ---keys---+
learned stop -------------key---+--> score --> logits of which token comes next, or the stop
state of a written row --query--+
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal.attention import Additive, Score
from multimodal.attention.mechanism import BLOCK
from multimodal.heads.base import EncodedSample, Head, LaidOut, Prediction, Reading, Readout, check_length, tokens_of
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, StreamError, TaskError, check_shapes
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class Memory:
    """The tokens at which a pointer may point, sample after sample.

    state_MD: their states.
    lengths: by sample, the number of these tokens.
    pointed_N: for each written token, its index among the tokens of its sample. The last row of a sample comes after all of them,
        the row before it after all but one, and so on.
    pointed_lengths: by sample, the number of its written tokens.
    """

    state_MD: Tensor
    lengths: tuple[int, ...]
    pointed_N: Tensor
    pointed_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Pointer(Head):
    """Writes tokens of the context, from a learned start to a learned stop: attention whose weights are the answer.

    The written kind is one of those that are read ("points -> hull:points"). The state of each written row is the query; the states
    of the tokens of that kind are the keys, followed by the key of the stop. Logits are (rows, keys + 1), minus infinity beyond the
    keys of a sample. A written token is fed back with the content and the position of the token at which the head pointed.

    score: the log-likelihood of a query under a token's state; the default is equation 3 of the paper.
    repeats: whether it may point at a token twice; if not, such tokens are masked, in training too.
    """

    score: Score = field(default_factory=Additive)
    repeats: bool = False
    queries: ClassVar[int] = 1
    autoregressive: ClassVar[bool] = True

    def vocab(self, tokenizer: Tokenizer) -> int:
        """1, for the stop; the other choices are the tokens of the context, whose number differs by sample."""
        name = type(tokenizer).__name__
        if tokenizer.vocab_size is None and tokenizer.feature_size is None:
            raise ConfigError(f"Pointer: {name} declares neither vocab_size nor feature_size, so it cannot be read")
        if not tokenizer.decodes:
            raise ConfigError(f"Pointer: {name} has no decode, so what is written could not be read")
        return 1

    def bind(self, pattern: Pattern) -> Pattern:
        pattern = super().bind(pattern)
        if pattern.writes.kind not in [field.kind for field in pattern.reads]:
            raise TaskError(
                f"task {pattern.text!r} reads nothing of kind {pattern.writes.kind!r}, but {type(self).__name__} writes "
                f"tokens that were read; read some, as in 'seen:{pattern.writes.kind} -> {pattern.text.split('->')[1].strip()}'"
            )
        return pattern

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        """Like that of other autoregressive heads, but the tokens of the answer have the positions of those they point at."""
        segments = sample.read()
        read = tokens_of(segments)
        segments.append(sample.start)
        candidates, key_N = sample.read_of_kind()
        answer, target, pointed_N = sample.answer() if sample.learn else sample.begin, None, key_N[:0]
        if answer is not None:
            pointed_N = self.pointed(answer, candidates)
            if sample.learn:
                target = self.target(Tokens(pointed_N, answer.position_NA), len(candidates), sample.tokenizer)
            if len(answer):
                segments.append(sample.written(Tokens(answer.content, candidates.position_NA[pointed_N])))
        return [LaidOut(segments, read, read, tokens_of(segments), target, key_N, pointed_N)]

    def pointed(self, tokens: Tokens, read: Tokens) -> Tensor:
        """For each of these tokens, the index (N,) of an equal one among those that were `read`, of the written kind.

        Raises:
            StreamError: a token that was not read, or that occurs more often than it was read.
        """
        same_NM = torch.zeros(len(tokens), 0, dtype=torch.bool)
        if len(read) and len(tokens):
            same_NM = tokens.content[:, None] == read.content[None]
            same_NM = same_NM.all(-1) if same_NM.dim() == 3 else same_NM
        found_N = same_NM.any(1)
        if not found_N.all():
            lost = int(found_N.int().argmin())
            raise StreamError(
                f"Pointer: token {lost} of the answer, {tokens.content[lost].tolist()}, is none of the {len(read)} that "
                "were read; an answer is made of tokens that are read, with exactly their content"
            )
        index_N = same_NM.int().argmax(1) if len(tokens) else torch.zeros(0, dtype=torch.long)
        if self.repeats or len(set(index_N.tolist())) == len(index_N):
            return index_N
        # equal tokens are taken in the order in which they were read
        unused_M = torch.ones(len(read), dtype=torch.bool)
        for i, same_M in enumerate(same_NM):
            left_M = same_M & unused_M
            if not left_M.any():
                raise StreamError(
                    f"Pointer: token {i} of the answer, {tokens.content[i].tolist()}, occurs more often than it was read; "
                    "Pointer(repeats=True) may point at a token again"
                )
            index_N[i] = left_M.int().argmax()
            unused_M[index_N[i]] = False
        return index_N

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        """The indices that `pointed` returned, followed by the stop, whose index is the number of candidates (`rows`)."""
        check_length(self, tokens, tokenizer)
        return F.pad(tokens.content, (0, 1), value=rows)

    def readout(self, width: int, tokenizer: Tokenizer) -> "PointerReadout":
        return PointerReadout(self.score, width, self.queries)

    def logits(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], memory: Memory | None = None
    ) -> Tensor:
        memory = _given(memory)
        logits_NV = state_ND.new_full((len(state_ND), max(memory.lengths, default=0) + 1), -torch.inf)
        logits_NV = logits_NV.to(_full(state_ND.dtype))
        for _, row_BT, logits in self._runs(readout, state_ND, lengths, memory):
            logits_NV[row_BT, : logits.shape[-1]] = logits
        return logits_NV

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits, target, reduction="sum")

    def state_loss(
        self,
        readout: Readout,
        state_ND: Tensor,
        lengths: Sequence[int],
        target: Tensor,
        target_lengths: Sequence[int],
        memory: Memory | None = None,
    ) -> Tensor:
        """The sum over rows of log sum exp(scores) - score of the target; no (rows, most keys) matrix of the batch is made."""
        if list(lengths) != list(target_lengths):
            raise StreamError(
                f"Pointer: {list(target_lengths)} targets for {list(lengths)} written rows; each row needs one"
            )
        total = state_ND.new_zeros((), dtype=_full(state_ND.dtype))
        for _, row_BT, logits in self._runs(readout, state_ND, lengths, _given(memory)):
            of_target = logits.gather(-1, target[row_BT][..., None])[..., 0]
            total = total + (logits.logsumexp(-1) - of_target).sum()
        return total

    def _runs(
        self, readout: Readout, state_ND: Tensor, lengths: Sequence[int], memory: Memory
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """For each group of samples of equal shape: (the samples, their rows (B, T), their logits (B, T, keys + 1))."""
        assert isinstance(readout, PointerReadout)
        check_shapes("Pointer", state_ND=state_ND, state_MD=memory.state_MD)
        sums = sum(lengths), sum(memory.lengths), sum(memory.pointed_lengths)
        came = len(state_ND), len(memory.state_MD), len(memory.pointed_N)
        if sums != came or len({len(lengths), len(memory.lengths), len(memory.pointed_lengths)}) > 1:
            raise StreamError(
                f"Pointer: there are {came} rows, keys and written tokens, but their lengths add up to {sums}"
            )
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for i, shape in enumerate(zip(lengths, memory.lengths, memory.pointed_lengths, strict=True)):
            shapes.setdefault(shape, []).append(i)
        starts = [torch.tensor([0, *x]).cumsum(0) for x in (lengths, memory.lengths, memory.pointed_lengths)]
        for shape, samples in shapes.items():
            row_BT, row_BM, row_BN = (
                (start[samples][:, None] + torch.arange(size)).to(state_ND.device)
                for start, size in zip(starts, shape, strict=True)
            )
            logits = self._scored(readout, state_ND[row_BT], memory.state_MD[row_BM])
            if not self.repeats and shape[2]:
                logits = logits.masked_fill(_pointed_before(memory.pointed_N[row_BN], *logits.shape[1:]), -torch.inf)
            yield samples, row_BT, logits

    def _scored(self, readout: "PointerReadout", state_BTD: Tensor, key_BMD: Tensor) -> Tensor:
        """The scores (B, T, M + 1) of rows with the keys and, last, the stop; many rows go block by block, to bound memory."""
        stop_BMD = readout.stop.to(key_BMD.dtype).expand(len(key_BMD), 1, -1)
        k_BMGK = torch.cat([key_BMD, stop_BMD], 1)[:, :, None]
        order_M = torch.arange(1, k_BMGK.shape[1] + 1, device=key_BMD.device)
        order_M[-1] = 0  # for scores by position the stop has the same one in every sample
        k_BMGK = self.score.keys(k_BMGK, order_M[None])

        def scored(q_BTHK: Tensor) -> Tensor:
            score_BHTM = self.score.log_likelihood(q_BTHK, k_BMGK, readout.weights)
            return score_BHTM[:, 0].to(_full(score_BHTM.dtype))

        q_BTHK = state_BTD[:, :, None]
        block = max(1, BLOCK // k_BMGK.numel())
        if block >= q_BTHK.shape[1]:
            return scored(q_BTHK)
        parts = [checkpoint(scored, q, use_reentrant=False) for q in q_BTHK.split(block, 1)]
        return torch.cat([part for part in parts if isinstance(part, Tensor)], 1)

    def inputs(self, reading: Reading, state_TD: Tensor) -> dict[str, Any]:
        assert reading.key_N is not None
        assert reading.pointed_N is not None
        keys = state_TD[reading.key_N]
        return {"memory": Memory(keys, reading.key_lengths, reading.pointed_N, reading.pointed_lengths)}

    def source(self, sample: EncodedSample) -> Tokens:
        return sample.read_of_kind()[0]

    def choices(self, tokens: Tokens, source: Tokens | None) -> list[int]:
        assert source is not None
        return self.pointed(tokens, source).tolist()

    def next_logits(
        self, readout: Readout, state_ND: Tensor, sources: Sequence[Tensor], chosen: Sequence[Sequence[int]]
    ) -> Tensor:
        pointed_N = torch.tensor([i for ids in chosen for i in ids], dtype=torch.long, device=state_ND.device)
        lengths, pointed_lengths = tuple(map(len, sources)), tuple(map(len, chosen))
        memory = Memory(torch.cat(list(sources)), lengths, pointed_N, pointed_lengths)
        return self.logits(readout, state_ND, [1] * len(state_ND), memory)

    def check_decoding(self, where: str, options: Any, prefix: Any) -> None:
        if options.guidance != 1.0 or prefix is not None:
            what = "a prefix" if prefix is not None else f"guidance={options.guidance}"
            raise ConfigError(
                f"{where}: {type(self).__name__} points at what is read with the answer, so {what} has no meaning there; "
                "give the whole sample, without guidance"
            )
        for part in options.rule.parts():
            if part.spells:
                raise ConfigError(
                    f"{where}: {type(self).__name__} chooses among the tokens that were read by their number, which {part} "
                    "does not know; leave it out"
                )

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        raise ConfigError("Pointer: an answer is written step by step; use Model.generate")


class PointerReadout(Readout):
    """The learned start, the key of the stop, and the parameters of the score, for one head as wide as the core."""

    def __init__(self, score: Score, width: int, queries: int) -> None:
        super().__init__(width, 1, queries)
        del self.linear  # the score replaces it
        self.weights = score.weights(1, width)
        self.stop = nn.Parameter(torch.randn(width))  # of about the norm of a state


def _pointed_before(pointed_BN: Tensor, rows: int, keys: int) -> Tensor:
    """Whether each key was pointed at before each row, (B, rows, keys); the last row comes after all of them."""
    hit = F.one_hot(pointed_BN, keys).cumsum(1) > 0
    none = torch.zeros_like(hit[:, :1])
    return torch.cat([none, hit], 1)[:, -rows:]


def _given(memory: Memory | None) -> Memory:
    if memory is None:
        raise ConfigError(
            "Pointer: it also needs the states of what was read, as memory=Pointer.inputs(reading, states)['memory']"
        )
    return memory


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

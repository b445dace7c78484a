"""What every answer writes next: the logits of many at once, each rule asked once for all who follow it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multimodal.generate.beams import Beams
from multimodal.generate.features import draw_features
from multimodal.generate.request import Answer, Copies
from multimodal.generate.samplers import NEVER, Greedy, Sampler
from multimodal.heads import Head, Memory, Readout
from multimodal.shapes import StreamError
from multimodal.tokenizer import describe


def advance(
    answers: Sequence[Answer], state_ND: Tensor, sizes: Sequence[int], head: Head, readout: Readout
) -> Iterator[tuple[Answer, Copies]]:
    """Choose the next token of each of these answers of one task, from the states of each, so many rows, one after the other.

    Yields each with what its rows of the cache must take over from each other.
    """
    if head.continuous:
        draw_features(answers, dict(zip(answers, state_ND.split(list(sizes)), strict=True)), head, readout)
        yield from ((answer, []) for answer in answers)
        return
    logits = head.logits(readout, state_ND, [1] * len(state_ND), **_memory(answers, sizes, head)).float().cpu()
    alike: dict[Any, list[int]] = {}
    for i, answer in enumerate(answers):
        alike.setdefault((_alike(answer.options.rule), answer.stop), []).append(i)
    if len(alike) == 1 and not any(answer.guided for answer in answers):
        yield from _chosen(answers, sizes, logits[:, : answers[0].stop + 1].log_softmax(-1))
        return
    parts = logits.split(list(sizes))
    for group in alike.values():
        logits = [_guided(answers[i], parts[i]) for i in group]
        yield from _chosen([answers[i] for i in group], list(map(len, logits)), torch.cat(logits).log_softmax(-1))


def _guided(answer: Answer, logits_BV: Tensor) -> Tensor:
    """The answer's own logits; with guidance one row of two."""
    logits_BV = logits_BV[:, : answer.stop + 1]  # a head that points has as many as this answer has read
    if not answer.guided:
        return logits_BV
    read, blank = logits_BV.log_softmax(-1)
    return (blank + answer.options.guidance * (read - blank))[None]


def _chosen(answers: Sequence[Answer], sizes: Sequence[int], log_p_BV: Tensor) -> Iterator[tuple[Answer, Copies]]:
    """`advance` for answers under one rule, which is asked once for all; if it fails, for each alone, as the others go on."""
    wrong = [math.isnan(x) for x in log_p_BV.amax(-1).tolist()]  # NaN is the largest of any row it is in
    if any(wrong):
        for answer, part in _each(answers, sizes, log_p_BV):
            if not part.isnan().any():
                yield from _chosen([answer], [len(part)], part)
                continue
            answer.error = StreamError(
                f"{answer.name} of task {answer.task!r}: the model's logits are not numbers after {answer.count} tokens; look at "
                "its weights, or use a smaller guidance"
            )
            yield answer, []
        return
    rule = answers[0].options.rule
    try:
        chances_BV = _chances(rule, answers, sizes, log_p_BV)
    except Exception as error:  # a stranger's rule may fail in any way
        if len(answers) > 1:
            for answer, part in _each(answers, sizes, log_p_BV):
                yield from _chosen([answer], [len(part)], part)
        else:
            failed = f"the sampler {rule} failed: {type(error).__name__}: {error}"
            answers[0].error = StreamError(f"{answers[0].name} of task {answers[0].task!r}: {failed}")
            yield answers[0], []
        return
    best_B, token_B = chances_BV.max(-1)  # of equals the first
    stuck = [best == NEVER for best in best_B.tolist()]
    if rule.draws and any(answer.beams is None for answer in answers):
        token_B = drawn(answers, sizes, chances_BV)
    tokens, log_p = token_B.tolist(), log_p_BV.gather(1, token_B[:, None])[:, 0].tolist()
    start = 0
    for answer, size in zip(answers, sizes, strict=True):
        rows = slice(start, start + size)
        try:
            # rows without a hypothesis may be anything
            if all(stuck[start + seat] for seat in answer.seats) and not (answer.beams and answer.beams.ended):
                raise StreamError(f"{rule} leaves no candidate after {answer.count} tokens; give it a wider choice")
            copies: Copies = []
            if answer.beams is not None:
                copies = _extend_beams(answer, answer.beams, log_p_BV[rows], chances_BV[rows])
            else:
                answer.take(tokens[start], log_p[start])
            yield answer, copies
        except Exception as error:  # a stranger's decode may fail in any way; the other answers go on
            answer.error = StreamError(f"{answer.name} of task {answer.task!r}: {error}")
            yield answer, []
        start += size


def _each(answers: Sequence[Answer], sizes: Sequence[int], log_p_BV: Tensor) -> Iterator[tuple[Answer, Tensor]]:
    return zip(answers, log_p_BV.split(list(sizes)), strict=True)


def _memory(answers: Sequence[Answer], sizes: Sequence[int], head: Head) -> dict[str, Any]:
    """What a head that points gets beside the states: of each row what it may point at, and what it has pointed at."""
    if not head.points:
        return {}
    rows = [(answer, ids) for answer, size in zip(answers, sizes, strict=True) for ids in answer.so_far(size)]
    pointed = [ids for _, ids in rows]
    state_MD = torch.cat([answer.state_MD for answer, _ in rows])
    pointed_N = torch.tensor([i for ids in pointed for i in ids], dtype=torch.long, device=state_MD.device)
    lengths = tuple(len(answer.state_MD) for answer, _ in rows)
    return {"memory": Memory(state_MD, lengths, pointed_N, tuple(map(len, pointed)))}


def _alike(rule: Sampler) -> Any:
    """What equal rules have in common, so that they are asked once."""
    try:
        hash(rule)
    except TypeError:
        return id(rule)
    return rule


def _chances(rule: Sampler, answers: Sequence[Answer], sizes: Sequence[int], log_p_BV: Tensor) -> Tensor:
    """What the rule makes of the answers' log-probabilities."""
    log_p_BV = _within_length(log_p_BV, answers, sizes)
    if type(rule) is Greedy:
        return log_p_BV  # the largest is taken anyway
    written = [w for answer, size in zip(answers, sizes, strict=True) for w in answer.written(size)]
    chances_BV = rule(log_p_BV.clone(), written)  # it may write into what it is given
    if not isinstance(chances_BV, Tensor) or chances_BV.shape != log_p_BV.shape:
        raise TypeError(f"it gave {describe(chances_BV)}, wanted logits {tuple(log_p_BV.shape)}")
    if chances_BV.isnan().any():
        raise ValueError("it gave NaN")
    return chances_BV


def _within_length(logits_BV: Tensor, answers: Sequence[Answer], sizes: Sequence[int]) -> Tensor:
    """Kinds of a fixed length do not stop before it."""
    if all(answer.tokenizer.length is None for answer in answers):
        return logits_BV
    logits_BV = logits_BV.clone()
    for answer, part in zip(answers, logits_BV.split(list(sizes)), strict=True):
        if answer.tokenizer.length is not None:
            part[:, answer.stop] = NEVER
    return logits_BV


def drawn(answers: Sequence[Answer], sizes: Sequence[int], chances_BV: Tensor) -> Tensor:
    """For each row (B,) a token in proportion to its chances, by the answer's own random numbers, whoever else is in the batch."""
    up_to_BV = chances_BV.double().softmax(-1).cumsum(-1)
    points = [
        torch.rand((), generator=answer.random, dtype=torch.float64).expand(size)
        for answer, size in zip(answers, sizes, strict=True)
    ]
    token_B1 = torch.searchsorted(up_to_BV, torch.cat(points)[:, None] * up_to_BV[:, -1:], right=True)
    return token_B1[:, 0].clamp(max=up_to_BV.shape[1] - 1)


def _extend_beams(answer: Answer, beams: Beams, log_p_BV: Tensor, chances_BV: Tensor) -> Copies:
    """Carry the likeliest beginnings on; a row whose hypothesis dies takes over a living one's from where they part."""
    out_BV = torch.isneginf(chances_BV)
    shift_BV = torch.where(out_BV | torch.isneginf(log_p_BV), torch.nan, chances_BV - log_p_BV)
    # a user's rule may change probabilities without declaring `reweighs`
    if bool((shift_BV - shift_BV.nanmean(1, keepdim=True)).abs().gt(1e-3).any()):
        raise StreamError(
            f"{answer.options.rule} changes chances, but beams rank by the model's own log-probabilities; use a rule that only "
            "rules tokens out, or beams=1"
        )
    log_p_BV = log_p_BV.masked_fill(out_BV, NEVER)
    parents = beams.advance(log_p_BV[answer.seats], answer.stop)
    if beams.done or not parents or len(beams.live[0]) == answer.fixed:
        answer.ended = "stop"
        return []
    held, seats = answer.hypotheses, answer.seats
    taken = {seats[parent] for parent in parents}  # the first child of a hypothesis stays in its row
    spare = [row for row in range(answer.width) if row not in taken]
    placed: list[int] = []
    copies: Copies = []
    for parent in parents:
        row = seats[parent]
        if row in placed:
            source, row = row, spare.pop(0)
            alike = (i for i, (a, b) in enumerate(zip(held[row], held[source], strict=True)) if a != b)
            copies.append((source, row, answer.cached + next(alike, len(held[row]))))
        placed.append(row)
    new = dict(zip(placed, beams.live, strict=True))
    # rows without a hypothesis go on with any token
    answer.hypotheses = [new.get(row, [*held[row], 0]) for row in range(answer.width)]
    answer.seats = placed
    return copies

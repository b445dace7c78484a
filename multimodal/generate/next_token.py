"""The next token of every request: logits of many at once, and one call of a sampler for all requests that have it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.generate.beams import Beams
from multimodal.generate.request import Copies, Request
from multimodal.generate.samplers import NEVER, Greedy, Sampler
from multimodal.heads import Head, Readout
from multimodal.shapes import StreamError
from multimodal.tokenizer import describe


def choose_next(
    requests: Sequence[Request],
    state_ND: Tensor,
    sizes: Sequence[int],
    head: Head,
    readout: Readout,
    logits: Tensor | None = None,
) -> Iterator[tuple[Request, Copies]]:
    """Choose the next token of each of these requests of one task.

    state_ND: their newest states, end to end; sizes: number of rows of each. logits: those of these states, if they are known.
    Yields each request with the copies that its rows of the cache must make of each other (beams).
    """
    if head.draws_features:
        draw_features(requests, dict(zip(requests, state_ND.split(list(sizes)), strict=True)), head, readout)
        yield from ((request, []) for request in requests)
        return
    if logits is None:
        sources, chosen = [], []
        for request, size in zip(requests, sizes, strict=True):
            if request.source is not None:  # a pointer needs to know what it chooses among, and what it has chosen
                sources += [request.source_MD] * size
                chosen += request.ids_by_row(size)
        logits = head.next_logits(readout, state_ND, sources, chosen).float().cpu()
    # requests that choose by equal rules are answered by one call of the rule
    alike: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        alike.setdefault((request.rule_key, request.stop, request.choices), []).append(i)
    if len(alike) == 1 and not any(request.guided for request in requests):
        yield from _chosen(requests, sizes, logits[:, : requests[0].choices].log_softmax(-1))
        return
    parts = logits.split(list(sizes))
    for group in alike.values():
        chosen_from = [_guided(requests[i], parts[i]) for i in group]
        log_p_BV = torch.cat(chosen_from).log_softmax(-1)
        yield from _chosen([requests[i] for i in group], list(map(len, chosen_from)), log_p_BV)


def _guided(request: Request, logits_BV: Tensor) -> Tensor:
    """The answer's own logits; with guidance one row of two."""
    logits_BV = logits_BV[:, : request.choices]  # a head that points has as many as this answer has read
    if not request.guided:
        return logits_BV
    read, blank = logits_BV.log_softmax(-1)
    return (blank + request.options.guidance * (read - blank))[None]


def _chosen(requests: Sequence[Request], sizes: Sequence[int], log_p_BV: Tensor) -> Iterator[tuple[Request, Copies]]:
    """`choose_next` for requests with one sampler, called once for all; if it fails, for each alone, so that the others go on."""
    wrong = [math.isnan(x) for x in log_p_BV.amax(-1).tolist()]  # NaN is the largest of any row it is in
    if any(wrong):
        for request, part in _each(requests, sizes, log_p_BV):
            if not part.isnan().any():
                yield from _chosen([request], [len(part)], part)
                continue
            request.error = StreamError(
                f"{request.name} of task {request.task!r}: the model's logits are not numbers after {request.count} tokens; look "
                "at its weights, or use a smaller guidance"
            )
            yield request, []
        return
    rule = requests[0].rule
    try:
        allowed_BV = _apply_rule(rule, requests, sizes, log_p_BV)
    except Exception as error:  # a user's rule may fail in any way
        if len(requests) > 1:
            for request, part in _each(requests, sizes, log_p_BV):
                yield from _chosen([request], [len(part)], part)
        else:
            failed = f"the sampler {rule} failed: {type(error).__name__}: {error}"
            requests[0].error = StreamError(f"{requests[0].name} of task {requests[0].task!r}: {failed}")
            yield requests[0], []
        return
    best_B, token_B = allowed_BV.max(-1)  # of equals the first
    stuck = [best == NEVER for best in best_B.tolist()]
    if rule.draws and any(request.beams is None for request in requests):
        token_B = draw_tokens(requests, sizes, allowed_BV)
    tokens, log_p = token_B.tolist(), log_p_BV.gather(1, token_B[:, None])[:, 0].tolist()
    start = 0
    for request, size in zip(requests, sizes, strict=True):
        rows = slice(start, start + size)
        try:
            # rows without a hypothesis may be anything
            if all(stuck[start + row] for row in request.live_rows) and not (request.beams and request.beams.ended):
                raise StreamError(f"{rule} leaves no candidate after {request.count} tokens; give it a wider choice")
            copies: Copies = []
            if request.beams is not None:
                copies = _extend_beams(request, request.beams, log_p_BV[rows], allowed_BV[rows])
            else:
                request.take(tokens[start], log_p[start])
            yield request, copies
        except Exception as error:  # a user's decode may fail in any way; the other answers go on
            request.error = StreamError(f"{request.name} of task {request.task!r}: {error}")
            yield request, []
        start += size


def _each(requests: Sequence[Request], sizes: Sequence[int], log_p_BV: Tensor) -> Iterator[tuple[Request, Tensor]]:
    return zip(requests, log_p_BV.split(list(sizes)), strict=True)


def _apply_rule(rule: Sampler, requests: Sequence[Request], sizes: Sequence[int], log_p_BV: Tensor) -> Tensor:
    """What the rule makes of the answers' log-probabilities."""
    if any(request.tokenizer.length is not None for request in requests):
        log_p_BV = log_p_BV.clone()
        for request, part in _each(requests, sizes, log_p_BV):
            if request.tokenizer.length is not None:  # a kind of a fixed length does not stop before it
                part[:, request.stop] = NEVER
    if type(rule) is Greedy:
        return log_p_BV  # the largest is taken anyway
    written = [w for request, size in zip(requests, sizes, strict=True) for w in request.written(size)]
    allowed_BV = rule(log_p_BV.clone(), written)  # it may write into what it is given
    if not isinstance(allowed_BV, Tensor) or allowed_BV.shape != log_p_BV.shape:
        raise TypeError(f"it gave {describe(allowed_BV)}, wanted logits {tuple(log_p_BV.shape)}")
    if allowed_BV.isnan().any():
        raise ValueError("it gave NaN")
    return allowed_BV


def draw_tokens(requests: Sequence[Request], sizes: Sequence[int], allowed_BV: Tensor) -> Tensor:
    """For each row (B,) a token drawn by its probability, from the request's own generator, whatever else is in the batch."""
    up_to_BV = allowed_BV.double().softmax(-1).cumsum(-1)
    points = [
        torch.rand((), generator=request.random, dtype=torch.float64).expand(size)
        for request, size in zip(requests, sizes, strict=True)
    ]
    token_B1 = torch.searchsorted(up_to_BV, torch.cat(points)[:, None] * up_to_BV[:, -1:], right=True)
    return token_B1[:, 0].clamp(max=up_to_BV.shape[1] - 1)


def _extend_beams(request: Request, beams: Beams, log_p_BV: Tensor, allowed_BV: Tensor) -> Copies:
    """Carry the likeliest beginnings on; a row whose hypothesis dies takes over a living one's from where they part."""
    out_BV = torch.isneginf(allowed_BV)
    shift_BV = torch.where(out_BV | torch.isneginf(log_p_BV), torch.nan, allowed_BV - log_p_BV)
    # a user's rule may change probabilities without declaring `reweighs`
    if bool((shift_BV - shift_BV.nanmean(1, keepdim=True)).abs().gt(1e-3).any()):
        raise StreamError(
            f"{request.rule} changes probabilities, but beams rank by the model's own log-probabilities; use a rule that "
            "only rules tokens out, or beams=1"
        )
    log_p_BV = log_p_BV.masked_fill(out_BV, NEVER)
    parents = beams.advance(request.joint(log_p_BV[request.live_rows]), request.stop)
    if beams.done or not parents or len(beams.live[0]) == request.fixed:
        request.ended = "stop"
        return []
    if request.ctc is not None:
        request.ctc.extend(parents, [ids[-1] for ids in beams.live])
    held, live_rows = request.hypotheses, request.live_rows
    taken = {live_rows[parent] for parent in parents}  # the first child of a hypothesis stays in its row
    spare = [row for row in range(request.width) if row not in taken]
    placed: list[int] = []
    copies: Copies = []
    for parent in parents:
        row = live_rows[parent]
        if row in placed:
            source, row = row, spare.pop(0)
            alike = (i for i, (a, b) in enumerate(zip(held[row], held[source], strict=True)) if a != b)
            copies.append((source, row, request.cached + next(alike, len(held[row]))))
        placed.append(row)
    new = dict(zip(placed, beams.live, strict=True))
    # rows without a hypothesis go on with any token
    request.take_hypotheses([new.get(row, [*held[row], 0]) for row in range(request.width)])
    request.live_rows = placed
    return copies


def draw_features(requests: Sequence[Request], states: Mapping[Request, Tensor], head: Head, readout: Readout) -> None:
    """The next token's features of each answer, from its own noise; answers that are drawn alike in one call."""
    alike: dict[tuple[float, float | None], list[Request]] = {}
    for request in requests:
        alike.setdefault((request.options.guidance, request.options.temperature), []).append(request)
    for (guidance, temperature), group in alike.items():
        state_BD = torch.stack([states[request][0] for request in group])
        noise = [torch.randn(1, a.tokenizer.written_features or 0, generator=a.random) for a in group]
        features_BF, stop_B = head.draw(
            readout,
            state_BD,
            torch.cat(noise).to(state_BD.device),
            guide_ND=None if guidance == 1.0 else torch.stack([states[request][1] for request in group]),
            guidance=guidance,
            temperature=1.0 if temperature is None else temperature,
        )
        for request, features_NF, stop in zip(group, features_BF.float().cpu().split(1), stop_B.tolist(), strict=True):
            try:
                _take_features(request, features_NF, stop)
            except Exception as error:  # a user's fed_back may fail in any way; the other answers go on
                request.error = StreamError(f"{request.name} of task {request.task!r}: {error}")


def _take_features(request: Request, features_NF: Tensor, stop: float) -> None:
    """Add what was drawn, unless the answer ends here."""
    if features_NF.isnan().any():
        raise StreamError("the features drawn are not numbers")
    if request.fixed is None and request.count:
        request.log_p += float(F.logsigmoid(torch.tensor(abs(stop))))
        if stop > 0:
            request.ended = "stop"
            return
    if request.count == request.limit:
        request.ended = "max_tokens"
        return
    request.take_features(features_NF)
    if request.count == request.fixed:
        request.ended = "length"

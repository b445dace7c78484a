"""Beam search against trying everything, against a plain search without cache, and step by step on tables made by hand."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

import multimodal as mm
from multimodal.generate.beams import Beams
from multimodal.generate.samplers import Written
from multimodal.heads import Prediction
from multimodal.masks import PREFIX_LM
from multimodal.shapes import StreamError
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import ImagePatches

TASK = "image code -> code"
NEVER = -math.inf


@dataclass(frozen=True)
class Code(mm.Tokenizer):
    """A few symbols, so that every answer can be tried."""

    size: int = 2
    length: int | None = None
    causal: bool = False

    @property
    def vocab_size(self) -> int:
        return self.size

    def encode(self, value: Sequence[int]) -> Tokens:
        return Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()


CORES = {
    "one core": mm.Core(width=16, depth=2, heads=2, kv_heads=1),
    "window": mm.Core(width=16, depth=2, heads=2, mask=PREFIX_LM & mm.masks.Window(3)),
    "two cores": mm.EncoderDecoder(
        reader=mm.Core(width=16, depth=1, heads=2), writer=mm.Core(width=16, depth=2, heads=2, kv_heads=1)
    ),
}


@pytest.fixture
def make(lively) -> Callable[..., mm.Model]:
    def made(size: int = 2, core: str = "one core", length: int | None = None) -> mm.Model:
        tokenizers = {"code": Code(size, length), "image": ImagePatches(patch=4, channels=1)}
        model = lively(mm.Model(tokenizers, CORES[core], [TASK]))
        with torch.no_grad():
            for readout in model.readouts.values():
                readout.linear.weight *= 1.5
        return model

    return made


def picture(seed: int) -> torch.Tensor:
    return torch.rand(4, 4 * (1 + seed % 3), generator=torch.Generator().manual_seed(seed))


SAMPLES = [{"image": picture(i), "code": [i % 2, (i // 2) % 2][: 1 + i % 2]} for i in range(4)]


def tables(model: mm.Model, sample: dict, answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """log p (tokens + 1, V) of each answer's tokens and of the stop, by one uncached dense pass over all of them."""
    stream = model.packer(
        [(TASK, {**sample, "answer": list(a)}) if a else (TASK, sample) for a in answers if a], answers=True
    )
    with torch.no_grad():
        rows = model.logits(stream, backend="dense")[TASK].double().log_softmax(-1)
        empty = model.logits(model.packer([(TASK, sample)], answers=False), backend="dense")[TASK].double()
    by_answer = dict(zip(stream.readings[TASK].samples, rows.split(list(stream.readings[TASK].lengths)), strict=True))
    numbers = itertools.count()
    return [by_answer[next(numbers)] if a else empty.log_softmax(-1) for a in answers]


def log_p_of(model: mm.Model, sample: dict, answer: Sequence[int], stop: bool = True) -> float:
    (table,) = tables(model, sample, [answer]) if answer else tables(model, sample, [answer, [0]])[:1]
    ids = [*answer, *([table.shape[1] - 1] if stop else [])]
    return float(sum(table[i, token] for i, token in enumerate(ids)))


def everything(model: mm.Model, sample: dict, limit: int, penalty: float) -> list[tuple[float, float, list[int]]]:
    """(score, log p, answer) of every answer of up to `limit` tokens, the best first."""
    size = model.packer.tokenizers["code"].vocab_size or 0
    answers = [list(a) for n in range(limit + 1) for a in itertools.product(range(size), repeat=n)]
    found = []
    for answer, table in zip(answers, tables(model, sample, answers), strict=True):
        log_p = float(sum(table[i, token] for i, token in enumerate([*answer, size])))
        found.append((log_p / (len(answer) + 1) ** penalty, log_p, answer))
    return sorted(found, reverse=True)


def listed(prediction: Prediction) -> list[Prediction]:
    return [prediction, *prediction.others]


@pytest.mark.parametrize(("size", "limit"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("core", CORES)
def test_a_beam_that_is_wide_enough_finds_what_trying_everything_finds(make, core, size, limit):
    model = make(size, core)
    best = set()
    for penalty in (0.0, 0.7, 1.0, 2.0):
        expected = everything(model, SAMPLES[1], limit, penalty)
        answer = model.generate(
            TASK, [SAMPLES[1]], beams=len(expected), max_tokens=limit, length_penalty=penalty, batch=1
        )[0]
        found = listed(answer)
        assert [a.value for a in found] == [ids for *_, ids in expected]
        for a, (_, log_p, _) in zip(found, expected, strict=True):
            assert math.log(a.confidence) == pytest.approx(log_p, abs=1e-4)
        best.add(tuple(answer.value))
    assert len({len(ids) for *_, ids in expected}) == limit + 1
    if (core, size) == ("one core", 2):
        assert len(best) > 1  # the penalty matters here


def plain_search(
    model: mm.Model, sample: dict, width: int, limit: int, penalty: float
) -> list[tuple[float, float, list[int]]]:
    """Without cache and without stopping early; the whole pass is made anew for every beginning."""
    stop = model.packer.tokenizers["code"].vocab_size or 0
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended = []
    for _ in range(limit + 1):
        grown = []
        for log_p, ids in live:
            (row, *_) = tables(model, sample, [ids, [0]])
            grown += [(log_p + float(row[len(ids), token]), [*ids, token]) for token in range(stop + 1)]
        grown.sort(key=lambda item: -item[0])
        if len(live[0][1]) == limit:
            grown = [item for item in grown if item[1][-1] == stop]
        ended += [(p / len(ids) ** penalty, p, ids[:-1]) for p, ids in grown[: 2 * width] if ids[-1] == stop]
        live = [item for item in grown[: 2 * width] if item[1][-1] != stop][:width]
        if not live:
            break
    return sorted(ended, reverse=True)[:width]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (3, 0.0), (4, 2.0)])
def test_narrow_beams_are_those_of_a_plain_search(make, core, width, penalty):
    """Rows are taken over from each other all the time here: a cache in disorder would change the scores."""
    model = make(3, core)
    for sample in SAMPLES[:2]:
        expected = plain_search(model, sample, width, 6, penalty)
        found = listed(model.generate(TASK, [sample], beams=width, max_tokens=6, length_penalty=penalty)[0])
        assert [a.value for a in found] == [ids for *_, ids in expected]
        for a, (_, log_p, _) in zip(found, expected, strict=True):
            assert math.log(a.confidence) == pytest.approx(log_p, abs=1e-4)


def test_the_cases_above_take_rows_over_from_each_other(make, monkeypatch):
    from multimodal.attention import Cache

    copies = []
    copy = Cache.copy

    def counted(self, source, target, *, start=0, of=None):
        copies.append((start, self.length[source]))
        return copy(self, source, target, start=start, of=of)

    monkeypatch.setattr(Cache, "copy", counted)
    answer = make(3).generate(TASK, [SAMPLES[0]], beams=4, max_tokens=6, length_penalty=2.0)[0]
    assert len(answer.others) == 3
    later = [(start, length) for start, length in copies if start]
    assert len(later) > 4
    assert any(length - start >= 2 for start, length in later)  # beginnings that parted more than one token ago


@pytest.mark.parametrize("core", CORES)
def test_every_beam_of_a_batch_keeps_to_its_own_sample(make, core):
    model = make(3, core)
    together = model.generate(TASK, SAMPLES, beams=3, max_tokens=5)
    parts = model.generate(TASK, SAMPLES, beams=3, max_tokens=5, batch=4)
    for sample, a, b in zip(SAMPLES, together, parts, strict=True):
        alone = model.generate(TASK, [sample], beams=3, max_tokens=5)[0]
        for x, y, z in zip(listed(a), listed(b), listed(alone), strict=True):
            assert x.value == y.value == z.value
            assert math.log(x.confidence) == pytest.approx(math.log(z.confidence), abs=1e-4)
            assert math.log(x.confidence) == pytest.approx(log_p_of(model, sample, x.value), abs=1e-4)
    assert len({tuple(a.value) for a in together} | {a.confidence for a in together}) > 4  # samples tell apart


def test_others_come_in_order_and_the_penalty_orders_them(make):
    model = make(3)
    for penalty in (0.0, 1.0, 2.0):
        found = listed(model.generate(TASK, [SAMPLES[0]], beams=5, max_tokens=4, length_penalty=penalty)[0])
        scores = [math.log(a.confidence) / (len(a.value) + 1) ** penalty for a in found]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(a.value) for a in found}) == len(found) == 5


def test_answers_that_would_not_stop_are_cut_and_say_so(make):
    model = make(3)
    with torch.no_grad():
        model.readout(TASK).linear.bias[3] = -9.0  # stops only when it must
    answer = model.generate(TASK, [SAMPLES[0]], beams=3, max_tokens=3)[0]
    assert [len(a.value) for a in listed(answer)] == [3, 3, 3]
    assert {a.ended for a in listed(answer)} == {"max_tokens"}
    assert not answer.complete
    never = model.generate(TASK, [SAMPLES[0]], beams=3, max_tokens=3, sampler=mm.generate.AtLeast(9))[0]
    expected = sorted(
        ((log_p_of(model, SAMPLES[0], ids, stop=False), list(ids)) for ids in itertools.product(range(3), repeat=3)),
        reverse=True,
    )
    assert never.value == expected[0][1]  # ended by nothing: ranked by what was written
    assert math.log(never.confidence) == pytest.approx(expected[0][0], abs=1e-4)
    assert {a.ended for a in listed(never)} == {"max_tokens"}


def test_a_kind_of_a_fixed_length_is_searched_without_its_stop(make):
    model = make(2, length=4)
    answer = model.generate(TASK, [SAMPLES[1]], beams=16)[0]
    expected = sorted(
        ((log_p_of(model, SAMPLES[1], ids, stop=False), list(ids)) for ids in itertools.product(range(2), repeat=4)),
        reverse=True,
    )
    assert [a.value for a in listed(answer)] == [ids for _, ids in expected]
    assert {a.ended for a in listed(answer)} == {"length"}
    for a, (log_p, _) in zip(listed(answer), expected, strict=True):
        assert math.log(a.confidence) == pytest.approx(log_p, abs=1e-4)


def test_beams_go_on_from_a_begin(make):
    model = make(3)
    begin = [2, 0]
    answer = model.generate(TASK, [SAMPLES[1]], beams=40, max_tokens=3, begin=begin, length_penalty=0.0)[0]
    found = []
    for n in range(4):
        for ids in itertools.product(range(3), repeat=n):
            (table,) = tables(model, SAMPLES[1], [[*begin, *ids]])
            found.append((float(sum(table[2 + i, token] for i, token in enumerate([*ids, 3]))), [*begin, *ids]))
    found.sort(reverse=True)
    assert [a.value for a in listed(answer)] == [ids for _, ids in found]
    assert math.log(answer.confidence) == pytest.approx(found[0][0], abs=1e-4)


def test_a_dead_end_of_one_beginning_is_not_the_end_of_the_others(make):
    """Under NoRepeat and AtLeast most beginnings run out of tokens; those that do not are still found."""
    model = make(2)
    rule = mm.NoRepeat(2) | mm.generate.AtLeast(4)
    answer = model.generate(TASK, [SAMPLES[0]], beams=16, max_tokens=6, sampler=rule)[0]

    def allowed(ids: Sequence[int]) -> bool:
        pairs = list(itertools.pairwise(ids))
        return len(set(pairs)) == len(pairs) and len(ids) >= 4

    expected = {ids for n in range(7) for ids in itertools.product(range(2), repeat=n) if allowed(ids)}
    assert {tuple(a.value) for a in listed(answer)} == expected
    assert all(a.ended != "max_tokens" for a in listed(answer) if len(a.value) < 6)


@dataclass(frozen=True)
class OneWayIn(mm.generate.Sampler):
    """Begins with 1, after which nothing may follow."""

    def __call__(self, logits_BV: torch.Tensor, written: Sequence[Written]) -> torch.Tensor:
        out_BV = logits_BV.clone()
        for row_V, so_far in zip(out_BV, written, strict=True):
            if not so_far.ids:
                row_V[[0, 2, 3]] = NEVER
            elif so_far.ids[0] == 1:
                row_V[:] = NEVER
        return out_BV


def test_where_no_beginning_can_go_on_the_rule_is_named(make):
    """Rows of beams that have no beginning yet do not count, whatever may follow there."""
    with pytest.raises(StreamError, match=r"sample 0 of task .*OneWayIn\(\) leaves no candidate after 1 tokens"):
        make(3).generate(TASK, [SAMPLES[0]], beams=3, max_tokens=4, sampler=OneWayIn())


def log(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_advance_step_by_step():
    """Two beams over the tokens 0, 1 and the stop 2, worked out by hand."""
    beams = Beams(2, 1.0, 3)
    assert beams.advance(log([0.5, 0.4, 0.1]), 2) == [0, 0]
    assert beams.live == [[0], [1]]
    assert beams.scores == pytest.approx([math.log(0.5), math.log(0.4)])
    assert [(ids, natural) for _, ids, _, natural in beams.ended] == [([], True)]
    assert beams.ended[0][0] == pytest.approx(math.log(0.1))
    assert not beams.done
    # 0.5 * (.1, .2, .7) and 0.4 * (.6, .3, .1): the stop of [0] is best (.35), then [1, 0] .24, [1, 1] .12, [0, 1] .10
    assert beams.advance(log([0.1, 0.2, 0.7], [0.6, 0.3, 0.1]), 2) == [1, 1]
    assert beams.live == [[1, 0], [1, 1]]
    assert [ids for _, ids, *_ in beams.ended] == [[0], []]
    assert beams.ended[0][0] == pytest.approx(math.log(0.35) / 2)
    assert not beams.done  # log .24 / 4 is better than log .1
    # 0.24 * (.5, .4, .1) and 0.12 * (.1, .1, .8)
    assert beams.advance(log([0.5, 0.4, 0.1], [0.1, 0.1, 0.8]), 2) == [0, 0]
    assert beams.live == [[1, 0, 0], [1, 0, 1]]
    assert [ids for _, ids, *_ in beams.ended] == [[0], [1, 1]]
    assert beams.ended[1][0] == pytest.approx(math.log(0.096) / 3)
    # the limit: everything has to stop, whether it likes to (the first) or not (the second)
    assert beams.advance(log([0.2, 0.2, 0.6], [0.5, 0.4, 0.1]), 2) == []
    assert beams.done
    assert [(ids, natural) for ids, _, natural in beams.found()] == [([0], True), ([1, 0, 0], True)]
    assert beams.found()[1][1] == pytest.approx(math.log(0.24 * 0.5 * 0.6))


def test_advance_stops_once_nothing_can_become_better():
    beams = Beams(1, 0.0, 50)
    assert beams.advance(log([0.04, 0.06, 0.9]), 2) == [0]
    assert beams.live == [[1]]
    assert beams.done  # 0.06 is less than 0.9, whatever follows
    longer = Beams(1, 1.0, 50)
    longer.advance(log([0.04, 0.06, 0.9]), 2)
    assert not longer.done  # 50 sure tokens later it would be: log 0.06 / 51 is more than log 0.9


def test_advance_takes_no_token_that_is_ruled_out():
    beams = Beams(3, 1.0, 2)
    assert beams.advance(torch.tensor([[NEVER, -0.1, NEVER]]), 2) == [0]
    assert beams.live == [[1]]
    assert not beams.ended
    assert beams.advance(torch.tensor([[NEVER, NEVER, NEVER]]), 2) == []
    assert beams.found() == [([1], pytest.approx(-0.1), False)]  # never ended


@pytest.mark.parametrize("seed", range(6))
def test_one_beam_without_penalty_is_greedy_but_for_better_answers_that_end_earlier(seed):
    """Its path is the greedy one; where a stop on the way is likelier than the rest of the path, it is taken."""
    generator = torch.Generator().manual_seed(seed)
    steps = [(2 * torch.randn(1, 4, generator=generator)).double().log_softmax(-1) for _ in range(6)]
    greedy, log_p, stops = [], 0.0, []
    for row in steps:  # the path of the likeliest tokens that go on; a stop is seen where it is first or second
        ranked = row[0].argsort(descending=True).tolist()
        if 3 in ranked[:2] or len(greedy) == 5:
            stops.append((log_p + float(row[0, 3]), list(greedy), ranked[0] == 3))
        if len(greedy) < 5:
            token = next(t for t in ranked if t != 3)
            log_p += float(row[0, token])
            greedy.append(token)
    beams = Beams(1, 0.0, 5)
    for row in steps:
        beams.advance(row, 3)
        if beams.done:
            break
    ids, found, _ = beams.found()[0]
    assert (found, ids) == (pytest.approx(max(stops)[0]), max(stops)[1])
    first = next(((p, path) for p, path, likeliest in stops if likeliest), None)
    if first is not None:
        assert found >= first[0] - 1e-12
        if max(stops)[0] == first[0]:
            assert ids == first[1]


def test_one_beam_of_generate_is_greedy(make):
    model = make(3)
    assert [a.value for a in model.generate(TASK, SAMPLES, beams=1, length_penalty=1.0, max_tokens=5)] == [
        a.value for a in model.generate(TASK, SAMPLES, max_tokens=5)
    ]

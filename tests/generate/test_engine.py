"""The engine: whoever else is in the batch, every request gets what it would get alone; the cache gives what a whole pass gives."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.attention import Cache, Cosine, Layout, Span
from multimodal.attention.cached import StepPlan
from multimodal.masks import PREFIX_LM, Chunked, MaskInfo
from multimodal.shapes import ConfigError, StreamError, TaskError
from multimodal.tokenizer import Tokens, at_times
from multimodal_tokenizers import ImagePatches, TextBytes

DIGITS, STORY, MIXED, NOTHING = "digits -> digits", "image story -> story", "story digits -> digits", "-> digits"
STOP = 6


@dataclass(frozen=True)
class Digits(mm.Tokenizer):
    """Numbers from 0 to 5, two steps of time apart."""

    causal: bool = True
    vocab_size = STOP

    def encode(self, value: Sequence[int]) -> Tokens:
        return Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()

    def places(self, count: int) -> Tensor:
        return at_times(torch.arange(count) * 2.0)


CORES = {
    "prefix": mm.Core(width=32, depth=2, heads=4, kv_heads=2),
    "window": mm.Core(width=32, depth=2, heads=2, mask=PREFIX_LM & mm.masks.Window(5)),
    "cosine": mm.Core(width=32, depth=2, heads=4, kv_heads=1, score=Cosine(sharpness=6.0)),
    "two cores": mm.EncoderDecoder(
        reader=mm.Core(width=32, depth=1, heads=4), writer=mm.Core(width=32, depth=2, heads=4, kv_heads=2)
    ),
}
ONE_CORE = ["prefix", "window", "cosine"]


@pytest.fixture
def make(lively) -> Callable[..., mm.Model]:
    def made(core: str = "prefix", **kinds: mm.Tokenizer) -> mm.Model:
        tokenizers = {
            "digits": Digits(),
            "story": TextBytes(causal=True),
            "image": ImagePatches(patch=4, channels=1),
            **kinds,
        }
        return lively(mm.Model(tokenizers, CORES[core], [DIGITS, STORY, MIXED, NOTHING]))

    return made


def picture(seed: int) -> Tensor:
    return torch.rand(4 * (1 + seed % 2), 8, generator=torch.Generator().manual_seed(seed))


def sample(task: str, i: int) -> dict[str, Any]:
    every = {
        "digits": [(i * k) % 6 for k in range(1, 2 + i % 5)],
        "story": "to be or not to be"[i % 4 : 5 + i % 7],
        "image": picture(i),
    }
    return {name: every[name] for name in task.split("->")[0].split()}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"beams": 3},
    {"guidance": 2.5},
    {"sampler": mm.NoRepeat(2) | mm.TopP(0.8), "seed": 4},
    {"beams": 2, "length_penalty": 0.0},
    {"guidance": 1.5, "temperature": 0.7, "seed": 2},
]
REQUESTS = [
    ((DIGITS, STORY, MIXED, NOTHING)[i % 4], i, {"max_tokens": 3 + i % 6, **OPTIONS[i % len(OPTIONS)]})
    for i in range(16)
]
for _task, _, _options in REQUESTS:
    if _task == NOTHING:
        _options.pop("guidance", None)  # which a task that reads nothing refuses


def alone(model: mm.Model, task: str, i: int, options: dict[str, Any]) -> mm.Prediction:
    return model.generate(task, [sample(task, i)], **options)[0]


def same(one: mm.Prediction, other: mm.Prediction) -> None:
    for a, b in zip([one, *one.others], [other, *other.others], strict=True):
        assert (a.value, a.ended) == (b.value, b.ended)
        assert math.log(a.confidence) == pytest.approx(math.log(b.confidence), abs=1e-4)


def finish(engine: mm.Engine, pieces: Sequence[mm.generate.Piece] = ()) -> dict[int, mm.Prediction]:
    found = {}
    for piece in itertools.chain(pieces, engine.run()):
        if piece.error is not None:
            raise piece.error
        if piece.prediction is not None:
            assert piece.ticket not in found
            found[piece.ticket] = piece.prediction
    return found


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("rows", "seed"), [(3, 0), (5, 1), (40, 2)])
def test_requests_that_join_at_any_time_get_what_they_get_alone(make, core, rows, seed):
    """All tasks and options at once, in an order and at times drawn at random, with fewer rows than requests."""
    model = make(core)
    draw = random.Random(seed)
    engine = mm.Engine(model, rows=rows, capacity=64)
    waiting = draw.sample(REQUESTS, len(REQUESTS))
    tickets, pieces, joined_at, steps = {}, [], set(), 0
    while waiting or engine.busy:
        for _ in range(min(len(waiting), draw.choice([0, 0, 1, 2, 5]))):
            task, i, options = waiting.pop()
            tickets[engine.submit(task, sample(task, i), **options)] = (task, i, options)
            joined_at.add(steps)
        pieces += engine.step()
        steps += 1
    found = finish(engine, pieces)
    assert len(found) == len(tickets) == len(REQUESTS)
    assert len(joined_at) > 3
    for ticket, (task, i, options) in tickets.items():
        same(found[ticket], alone(model, task, i, options))


def test_a_row_forgets_what_an_earlier_request_left_in_it(lively):
    """Under a rule that shows everything read freely, wherever it stands, the rest of a long picture must not be seen."""
    core = mm.Core(width=32, depth=2, heads=2, mask=mm.masks.Window(99))
    tokenizers = {"story": TextBytes(causal=True), "image": ImagePatches(patch=4, channels=1)}
    model = lively(mm.Model(tokenizers, core, [STORY]))
    engine = mm.Engine(model, rows=2, capacity=64)
    long = {"image": torch.rand(16, 16), "story": "a"}
    engine.submit(STORY, long, max_tokens=1)
    engine.submit(STORY, long, max_tokens=30, sampler=mm.generate.AtLeast(30))  # moves up, and is still there
    ticket = engine.submit(STORY, {"image": picture(2), "story": "b"}, max_tokens=5)
    expected = model.generate(STORY, image=picture(2), story="b", max_tokens=5)
    same(finish(engine)[ticket], expected)


def test_the_requests_above_contain_what_they_are_meant_to(make):
    model = make()
    found = [alone(model, *request) for request in REQUESTS]
    assert {a.ended for a in found} >= {"stop", "max_tokens"}
    assert len({len(a.tokens) for a in found if a.tokens is not None}) >= 4
    assert {type(a.value) for a in found} == {str, list}
    assert any(a.others for a in found)


def test_the_rows_in_use_are_the_first_ones_and_all_are_free_in_the_end(make):
    engine = mm.Engine(make(), rows=6, capacity=64)
    for task, i, options in REQUESTS:
        engine.submit(task, sample(task, i), **options)
    while engine.busy:
        engine.step()
        used = len(engine._owner)
        assert used <= 6
        assert sorted(row for a in engine._running for row in a.rows) == list(range(used))
        assert all(engine._owner[row] is a for a in engine._running for row in a.rows)
        assert all(engine.cache.length[row] > 0 for row in range(used))
        assert all(engine.cache.length[row] == 0 for row in range(used, 6))
    assert engine._owner == []


def test_a_ticket_can_be_given_back_while_waiting_and_while_writing(make):
    model = make()
    engine = mm.Engine(model, rows=4, capacity=64)
    tickets = {engine.submit(t, sample(t, i), **o): (t, i, o) for t, i, o in REQUESTS[:9]}
    pieces = engine.step() + engine.step()
    running = {a.ticket for a in engine._running}
    waiting = {a.ticket for a in engine._waiting}
    assert len(running) >= 2
    assert len(waiting) >= 2
    dropped = {min(running), min(waiting), max(waiting)}
    assert all(engine.cancel(ticket) for ticket in dropped)
    assert not any(engine.cancel(ticket) for ticket in dropped)
    assert not engine.cancel(99)
    found = finish(engine, pieces)
    assert set(found) == set(tickets) - dropped
    assert not engine.cancel(next(iter(found)))
    for ticket, prediction in found.items():
        same(prediction, alone(model, *tickets[ticket]))


def test_a_request_that_fails_leaves_the_others_as_they_are(make):
    model = make()
    engine = mm.Engine(model, rows=4, capacity=64)
    tickets = {engine.submit(t, sample(t, i), **o): (t, i, o) for t, i, o in REQUESTS[:3]}
    runs_out = engine.submit(
        DIGITS, sample(DIGITS, 1), max_tokens=20, sampler=mm.NoRepeat(1) | mm.generate.AtLeast(20), name="the odd one"
    )
    at_once = engine.submit(STORY, sample(STORY, 1), sampler=mm.generate.OneOf(("yes",)), begin="n", max_tokens=9)
    tickets |= {engine.submit(t, sample(t, i), **o): (t, i, o) for t, i, o in REQUESTS[3:8]}
    pieces = list(engine.run())
    errors = {p.ticket: p.error for p in pieces if p.error is not None}
    assert set(errors) == {runs_out, at_once}
    assert all(isinstance(error, StreamError) for error in errors.values())
    assert "the odd one of task 'digits -> digits'" in str(errors[runs_out])
    assert "after 6 tokens" in str(errors[runs_out])
    assert f"request {at_once} of task" in str(errors[at_once])
    assert "after 0 tokens" in str(errors[at_once])
    found = {p.ticket: p.prediction for p in pieces if p.prediction is not None}
    assert set(found) == set(tickets)
    for ticket, request in tickets.items():
        same(found[ticket], alone(model, *request))


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(make):
    model = make()
    options = {"temperature": 1.5, "max_tokens": 8}
    samples = [sample(DIGITS, 3)] * 6
    answers = model.generate(DIGITS, samples, seed=20, **options)
    assert len({tuple(a.value) for a in answers}) > 3
    for i, answer in enumerate(answers):
        same(answer, model.generate(DIGITS, [samples[0]], seed=20 + i, **options)[0])
    for batch in (1, 2, 5):
        for one, other in zip(answers, model.generate(DIGITS, samples, seed=20, batch=batch, **options), strict=True):
            same(one, other)
    engine = mm.Engine(model, rows=3, capacity=40)
    engine.submit(STORY, sample(STORY, 1), temperature=2.0, max_tokens=7, seed=1)
    engine.step()
    ticket = engine.submit(DIGITS, samples[0], seed=22, **options)
    same(finish(engine)[ticket], answers[2])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda e: e.submit(DIGITS, {"digits": [1, 2, 3]}, max_tokens=20, name="it"),
            StreamError,
            r"it of task 'digits -> digits': a prompt of 4 tokens and an answer of up to 20 need 24 places, more than "
            r"capacity=12; shorten the prompt, lower max_tokens",
        ),
        (lambda e: e.submit(DIGITS, {"digits": [1]}, beams=3, max_tokens=2), ConfigError, "needs 3 rows .* has rows=2"),
        (lambda e: e.submit("x -> y", {}), TaskError, "there is no task 'x -> y'"),
        (lambda e: e.submit(DIGITS, {}), TaskError, "the sample has no field 'digits'"),
        (lambda e: mm.Engine(e.model, rows=0), ConfigError, "rows=0 must be at least 1"),
        (lambda e: mm.Engine(e.model, capacity=1), ConfigError, "capacity=1 at least 2"),
    ],
    ids=range(6),
)
def test_what_does_not_fit_is_refused_by_name(make, call, kind, message):
    engine = mm.Engine(make(), rows=2, capacity=12)
    with pytest.raises(kind, match=message):
        call(engine)
    assert not engine.busy
    engine.submit(DIGITS, {"digits": [1, 2, 3]}, max_tokens=8)  # exactly full: nothing goes wrong
    assert len(finish(engine)) == 1


def test_a_step_is_one_token(make):
    model = make()
    with torch.no_grad():
        model.readout(DIGITS).linear.weight.zero_()
        model.readout(DIGITS).linear.bias.copy_(torch.tensor([0, 0, 9.0, 0, 0, 0, 0]))
        model.readout(STORY).linear.weight.zero_()
        model.readout(STORY).linear.bias.zero_()
        model.readout(STORY).linear.bias[ord("u")] = 9.0
    engine = mm.Engine(model, rows=2, capacity=64)
    first = engine.submit(STORY, sample(STORY, 0), max_tokens=4)
    second = engine.submit(DIGITS, sample(DIGITS, 0), max_tokens=2)
    third = engine.submit(STORY, sample(STORY, 1), max_tokens=2)
    steps = []
    while engine.busy:
        steps.append([(p.ticket, p.text, p.prediction and p.prediction.value) for p in engine.step()])
    assert steps == [
        [(first, "u", None), (first, "u", None)],  # the prompt gives a token, the first pass another
        [(first, "u", None), (second, "", [2, 2])],
        [(third, "u", None), (first, "u", None), (third, "u", None)],
        [(first, "", "uuuu"), (third, "", "uu")],
    ]


def copies_of(monkeypatch) -> list[tuple[int, int]]:
    made = []
    copy = Cache.copy

    def counted(self, source, target, **options):
        made.append((source, target))
        return copy(self, source, target, **options)

    monkeypatch.setattr(Cache, "copy", counted)
    return made


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2}, {"guidance": 2.0}], ids=["greedy", "drawn", "guided"])
def test_the_cache_is_copied_only_when_a_request_leaves(make, monkeypatch, options):
    engine = mm.Engine(make(), rows=16, capacity=64)
    copies = copies_of(monkeypatch)
    where = [k.data_ptr() for k in engine.cache.k]
    for i in range(8):
        engine.submit(DIGITS, sample(DIGITS, i), max_tokens=4 + 5 * (i % 3), seed=i, **options)
    quiet = moved = 0
    while engine.busy:
        before, running = len(copies), list(engine._running)
        left = sum(len(a.rows) for a in running)
        engine.step()
        left -= sum(len(a.rows) for a in running if a in engine._running)
        assert len(copies) - before <= left or not running
        quiet += len(copies) == before
        moved += len(copies) - before
    assert quiet > 5
    assert moved > 2
    assert [k.data_ptr() for k in engine.cache.k] == where


def heard(model: mm.Model, task: str) -> list[Tensor]:
    """Collects the logits of every pass from now on."""
    rows: list[Tensor] = []
    model.readout(task).linear.register_forward_hook(lambda module, args, out: rows.append(out.detach().clone()))
    return rows


def uncached(model: mm.Model, task: str, values: dict[str, Any], written: Sequence[int] | str) -> Tensor:
    """Logits (tokens + 1, V): before the first written token, after it, .., by one dense pass over everything."""
    answer = model.packer.patterns[task].answer
    given = {**values, answer: written} if len(written) else values
    with torch.no_grad():
        return model.logits(model.packer([(task, given)], answers=len(written) > 0), backend="dense")[task]


def test_places_of_what_is_written_are_counted_in_the_kinds_own_steps(make, monkeypatch):
    """Digits are two steps apart; a core that sees them one step apart must say something else."""
    model = make()
    expected = uncached(model, DIGITS, {"digits": [1, 2]}, [3, 4, 5])
    monkeypatch.setattr(Digits, "places", lambda self, count: at_times(torch.arange(count) * 1.0))
    other = uncached(model, DIGITS, {"digits": [1, 2]}, [3, 4, 5])
    assert float((expected - other).abs().max()) > 1e-3


def forced(
    model: mm.Model, task: str, values: dict[str, Any], begin: Sequence[int], count: int
) -> tuple[list[int], float, str]:
    """Greedy from a beginning, with a whole pass for every token."""
    written, log_p = list(begin), 0.0
    while True:
        row = uncached(model, task, values, written)[-1].double().log_softmax(-1)
        token = int(row.argmax())
        if token == STOP or len(written) < len(begin) + count:
            log_p += float(row[token])
        if token == STOP:
            return written, log_p, "stop"
        if len(written) == len(begin) + count:
            return written, log_p, "max_tokens"
        written.append(token)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("task", [DIGITS, MIXED, NOTHING])
def test_a_begin_is_gone_on_from(make, core, task):
    model = make(core)
    ends = set()
    for i, begin in enumerate(([3], [0, 5, 1, 1], [2, 4, 2], [5, 5])):
        values = sample(task, i)
        written, log_p, ended = forced(model, task, values, begin, 5)
        answer = model.generate(task, [values], begin=begin, max_tokens=5)[0]
        assert (answer.value, answer.ended) == (written, ended)
        assert answer.value[: len(begin)] == begin
        assert math.log(answer.confidence) == pytest.approx(log_p, abs=1e-4)
        ends.add((len(written) - len(begin), ended))
    assert len(ends) > 1 or task == MIXED


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("core", CORES)
def test_guidance_is_its_formula_over_two_whole_passes(make, core, guidance):
    """blank + guidance * (read - blank), of log p, without reading and with."""
    model = make(core)
    for i in range(3):
        values = sample(MIXED, i)
        answer = model.generate(MIXED, [values], guidance=guidance, max_tokens=6)[0]
        rows = []
        for given in (values, dict.fromkeys(values)):
            rows.append(uncached(model, MIXED, given, answer.value).double().log_softmax(-1))
        read, blank = rows
        mixed = (blank + guidance * (read - blank)).log_softmax(-1)
        chosen = [*answer.value, STOP] if answer.ended == "stop" else answer.value
        assert mixed.argmax(-1).tolist()[: len(chosen)] == chosen
        log_p = float(sum(mixed[k, token] for k, token in enumerate(chosen)))
        assert math.log(answer.confidence) == pytest.approx(log_p, abs=1e-4)
        assert float((read - blank).abs().max()) > 0.05


def test_guidance_of_one_is_the_plain_way_and_takes_one_row(make):
    model = make()
    engine = mm.Engine(model, rows=2, capacity=64)
    engine.submit(MIXED, sample(MIXED, 0), guidance=1.0, max_tokens=9)
    engine.submit(MIXED, sample(MIXED, 1), guidance=2.0, max_tokens=3)
    engine.step()
    assert len(engine._running) == 1  # the second needs two rows and waits
    for i in range(3):
        same(alone(model, MIXED, i, {"guidance": 1.0, "max_tokens": 6}), alone(model, MIXED, i, {"max_tokens": 6}))


def counted(model: mm.Model, monkeypatch) -> list[int]:
    """Rows that went through the core, pass by pass."""
    sizes: list[int] = []
    forward = model.core.forward

    def wrapped(stream_TD, *args, **kwargs):
        sizes.append(len(stream_TD))
        return forward(stream_TD, *args, **kwargs)

    monkeypatch.setattr(model.core, "forward", wrapped)
    return sizes


@pytest.mark.parametrize("core", ONE_CORE)
def test_a_prefix_is_read_once_and_changes_nothing(make, monkeypatch, core):
    model = make(core)
    image = picture(1)
    stories = ["a", "some words", "ä!", "the very same"]
    options = {"max_tokens": 7}
    expected = [model.generate(STORY, image=image, story=s, **options) for s in stories]
    sizes = counted(model, monkeypatch)
    prefix = model.read(STORY, image=image)
    patches = len(model.packer.tokenizers["image"](image))
    assert sizes == [patches] == [4]
    together = model.generate(STORY, [{"story": s} for s in stories], prefix=prefix, **options)
    assert sizes[1] == sum(len(s.encode()) + 1 for s in stories)  # the rest of the prompts; no patch again
    assert max(sizes[2:]) <= len(stories)
    for a, b in zip(together, expected, strict=True):
        same(a, b)
    for s, b in zip(stories, expected, strict=True):  # it can be used again and again
        same(model.generate(STORY, story=s, prefix=prefix, **options), b)
    whole = model.read(STORY, image=image, story=stories[1])
    same(model.generate(STORY, [{}], prefix=whole, **options)[0], expected[1])


def test_a_prefix_goes_with_beams_seeds_begins_and_an_engine_that_runs(make):
    model = make()
    image = picture(2)
    prefix, other = model.read(STORY, image=image), model.read(STORY, image=picture(5))
    tried: list[dict[str, Any]] = [
        {"beams": 3, "max_tokens": 4},
        {"temperature": 1.0, "seed": 3, "max_tokens": 6},
        {"begin": "So ", "max_tokens": 4},
        {"max_tokens": 5},
    ]
    engine = mm.Engine(model, rows=5, capacity=64)
    tickets = {}
    for i, options in enumerate(tried):
        engine.submit(DIGITS, sample(DIGITS, i), max_tokens=4)
        tickets[engine.submit(STORY, {"story": "x" * (i + 1)}, prefix=prefix, **options)] = (image, i, options)
        tickets[engine.submit(STORY, {"story": "y" * (i + 1)}, prefix=other, **options)] = (picture(5), i, options)
    found = finish(engine)
    for ticket, (picture_, i, options) in tickets.items():
        letter = "x" if picture_ is image else "y"
        same(found[ticket], model.generate(STORY, image=picture_, story=letter * (i + 1), **options))


def test_what_cannot_be_read_before_is_refused(make):
    model = make()
    prefix = model.read(STORY, image=picture(0))
    for call, message in (
        (
            lambda: model.read(STORY, story="a"),
            "a prefix is one or more of its first fields, of image, story; not story",
        ),
        (lambda: model.read(STORY), "of image, story; not none"),
        (lambda: model.read(STORY, image=picture(0), digits=[1]), "of image, story; not image, digits"),
        (
            lambda: model.generate(DIGITS, digits=[1], prefix=prefix),
            "read for task 'image story -> story', not for 'dig",
        ),
        (lambda: model.generate(STORY, story="a", prefix=prefix, guidance=2.0), "guidance needs the task's fields"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(TaskError, match="the sample has no field 'story'"):
        model.generate(STORY, [{}], prefix=prefix)
    freely = make(story=TextBytes())
    with pytest.raises(ConfigError, match=r"what comes before 'story' cannot be read once.*causal=True"):
        freely.read(STORY, image=picture(0))
    freely.read(STORY, image=picture(0), story="a")  # nothing comes after
    with pytest.raises(ConfigError, match="an EncoderDecoder reads all of a sample at once"):
        make("two cores").read(STORY, image=picture(0), story="a")


def whole_and_parts(
    lay,
    core: mm.Core,
    totals: Sequence[int],
    parts: Sequence[Sequence[int]],
    lively_std: float = 0.3,
    rows_of: Sequence[int] = (2, 0, 3, 1),
) -> tuple[Tensor, Tensor]:
    """States of causal samples: read at once, and part by part through a cache, by default with its rows in another order."""
    module = core.build().eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.normal_(std=lively_std)
    layout = lay([[(n, False)] for n in totals])
    stream_TD, position_TA = torch.randn(sum(totals), core.width), torch.randn(sum(totals), 3) * 5
    starts = [sum(totals[:i]) for i in range(len(totals))]
    rows_of = rows_of[: len(totals)]
    cache = core.cache(rows=4, capacity=max(totals))
    out_TD = torch.full_like(stream_TD, math.nan)
    done = [0] * len(totals)
    with torch.no_grad():
        expected = module(stream_TD, position_TA, layout, backend="dense")
        for sizes in parts:
            pick = torch.cat([torch.arange(s + d, s + d + n) for s, d, n in zip(starts, done, sizes, strict=True)])
            new = Layout(tuple(Span(0, n) for n in sizes), layout.info[pick])
            out_TD[pick] = module(stream_TD[pick], position_TA[pick], new, cache=cache.at(rows_of))
            done = [d + n for d, n in zip(done, sizes, strict=True)]
    assert done == list(totals)
    assert [cache.length[r] for r in rows_of] == list(totals)
    return out_TD, expected


@pytest.mark.parametrize("core", ONE_CORE)
def test_many_new_tokens_after_a_cached_prompt_are_the_whole_pass(lay, core):
    out_TD, expected = whole_and_parts(
        lay, CORES[core], [9, 14, 6, 11], [[2, 5, 1, 3], [1, 7, 3, 2], [4, 1, 1, 4], [1, 1, 1, 1], [1, 0, 0, 1]]
    )
    torch.testing.assert_close(out_TD, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("core", ONE_CORE)
@pytest.mark.parametrize(
    "prompts", [[5, 5, 5, 5], [5, 2, 4, 1], [3, 3, 3, 9]], ids=["equal", "all differ", "one differs"]
)
def test_one_new_token_in_every_row_is_the_whole_pass(lay, monkeypatch, core, prompts):
    """Rows of equal length need no mask under the default rule; under another, or if one row differs, there is one."""
    masked: list[bool] = []
    attend = StepPlan.attend

    def told(self, *args):
        masked.append(self.pairs.allowed is not None)
        return attend(self, *args)

    monkeypatch.setattr(StepPlan, "attend", told)
    totals = [n + 7 for n in prompts]
    out_TD, expected = whole_and_parts(lay, CORES[core], totals, [prompts, *[[1] * 4] * 7], rows_of=range(4))
    torch.testing.assert_close(out_TD, expected, atol=1e-5, rtol=1e-4)
    assert set(masked) == {core == "window" or len(set(prompts)) > 1}
    assert len(masked) == 7 * CORES[core].depth


def test_new_tokens_that_the_cached_ones_should_have_seen_are_refused(lay):
    """Freely read ones; unless the rule lets them be read chunk by chunk."""

    def places(order: Sequence[int], free: int) -> Layout:
        order_T = torch.tensor(order, dtype=torch.int32)
        zero = torch.zeros_like(order_T)
        return Layout((Span(len(order) if free else 0, len(order)),), MaskInfo(zero, order_T, zero + free, zero))

    core = CORES["prefix"]
    for rule, message in ((PREFIX_LM, True), (Chunked(4), False)):
        module = core.replace(mask=rule).build()
        stream_TD, position_TA = torch.randn(8, 32), torch.zeros(8, 3)
        cache = core.cache(rows=1, capacity=8)
        with torch.no_grad():
            module(stream_TD[:4], position_TA[:4], places(range(4), 1), cache=cache)
            if message:
                with pytest.raises(
                    StreamError, match="sample 0 has 4 tokens in the cache that would have had to attend to the 4 new"
                ):
                    module(stream_TD[4:], position_TA[4:], places(range(4, 8), 1), cache=cache)
                assert cache.length == [4]  # as it was
            else:
                part = module(stream_TD[4:], position_TA[4:], places(range(4, 8), 1), cache=cache)
                expected = module(stream_TD, position_TA, places(range(8), 1), backend="dense")
                torch.testing.assert_close(part, expected[4:], atol=1e-5, rtol=1e-4)


def test_copying_a_row_makes_it_the_same_from_where_it_differs():
    cache = Cache(keys=[(1, 2, 2), (2, 4, 3)], states=[5], batch=3, capacity=6)
    for x in (*cache.k, *cache.v, *cache.state, cache.origin_BA):
        x.normal_()
    cache.bidirectional_BM.random_(0, 2)
    cache.length = [5, 3, 2]
    before = [x.clone() for x in (*cache.k, *cache.v)]
    state_BF = cache.state[0].clone()
    cache.copy(0, 2, start=3)
    assert cache.length == [5, 3, 5]
    for now, then in zip((*cache.k, *cache.v), before, strict=True):
        assert torch.equal(now[2, 3:5], then[0, 3:5])
        assert torch.equal(now[2, :3], then[2, :3])
        assert torch.equal(now[:2], then[:2])
    assert torch.equal(cache.state[0], state_BF[[0, 1, 0]])
    assert torch.equal(cache.origin_BA[2], cache.origin_BA[0])
    cache.clear(2)
    assert torch.equal(cache.state[0][2], torch.zeros(5))
    small = Cache(keys=[(1, 2, 2), (2, 4, 3)], states=[5], batch=1, capacity=4)
    with pytest.raises(StreamError, match="a row of 5 tokens does not fit capacity=4"):
        small.copy(0, 0, of=cache)


@dataclass(frozen=True)
class Failing(mm.generate.Sampler):
    """A user's rule with a mistake."""

    def __call__(self, logits_BV, written):
        raise ZeroDivisionError("oh")


def test_a_sampler_that_fails_ends_its_own_request_only(make):
    model = make()
    engine = mm.Engine(model, rows=4, capacity=40)
    bad = engine.submit("digits -> digits", {"digits": [1, 2]}, sampler=Failing(), max_tokens=5)
    good = engine.submit("digits -> digits", {"digits": [1, 2]}, max_tokens=5)
    ended = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert "the sampler Failing() failed: ZeroDivisionError: oh" in str(ended[bad].error)
    assert ended[good].prediction.value == model.generate("digits -> digits", digits=[1, 2], max_tokens=5).value


def test_a_prefix_is_of_one_model_and_its_fields_come_once(make):
    model = make()
    prefix = model.read(STORY, image=picture(0))
    with pytest.raises(ConfigError, match="image came with the sample and with the prefix; give it once"):
        model.generate(STORY, image=picture(1), story="a", prefix=prefix)
    with pytest.raises(ConfigError, match="the prefix was read by another model"):
        make().generate(STORY, story="a", prefix=prefix)


@dataclass(frozen=True)
class Odd(mm.generate.Sampler):
    """Gives what a sampler must not give, or fails for answers that begin with 1."""

    how: str

    def __call__(self, logits_BV, written):
        if self.how == "picky":
            if any(w.ids[0] == 1 for w in written):
                raise ValueError("I do not like 1")
            return logits_BV
        return {"none": None, "row": logits_BV[0], "short": logits_BV[:, :3], "nan": logits_BV * float("nan")}[self.how]


@pytest.mark.parametrize("how", ["none", "row", "short", "nan"])
def test_what_no_sampler_may_give_is_said_and_harms_nobody_else(make, how):
    model = make()
    engine = mm.Engine(model, rows=4, capacity=40)
    bad = engine.submit(DIGITS, {"digits": [1, 2]}, sampler=Odd(how), max_tokens=5)
    good = engine.submit(DIGITS, {"digits": [1, 2]}, max_tokens=5)
    ended = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert "the sampler Odd(" in str(ended[bad].error)
    assert ended[good].prediction.value == model.generate(DIGITS, digits=[1, 2], max_tokens=5).value


def test_a_sampler_fails_only_for_those_it_fails_for(make):
    model = make()
    engine = mm.Engine(model, rows=4, capacity=40)
    asked = [engine.submit(DIGITS, {"digits": [2]}, begin=[i], sampler=Odd("picky"), max_tokens=3) for i in (1, 2)]
    ended = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert "I do not like 1" in str(ended[asked[0]].error)
    assert ended[asked[1]].error is None
    assert ended[asked[1]].prediction.value == model.generate(DIGITS, digits=[2], begin=[2], max_tokens=3).value


@dataclass(frozen=True)
class Fragile(Digits):
    """Cannot say what it wrote."""

    def decode(self, tokens):
        raise OSError("decode boom")


def test_a_decode_or_an_embedding_that_fails_harms_nobody_else(make, monkeypatch):
    model = make(digits=Fragile())
    engine = mm.Engine(model, rows=4, capacity=60)
    bad = engine.submit(DIGITS, {"digits": [1, 2]}, max_tokens=3)
    good = engine.submit(STORY, {"image": picture(1), "story": "ab"}, max_tokens=5)
    ended = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert "Fragile.decode failed: OSError: decode boom" in str(ended[bad].error)
    assert ended[good].prediction.value == model.generate(STORY, image=picture(1), story="ab", max_tokens=5).value
    good = engine.submit(STORY, {"image": picture(1), "story": "ab"}, max_tokens=5)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(model.embeds["digits"], "forward", lambda x: 1 / 0)
        bad = engine.submit(DIGITS, {"digits": [1, 2]}, max_tokens=3)
        news = engine.step()
    assert [type(piece.error) for piece in news if piece.ticket == bad] == [ZeroDivisionError]
    assert [p.prediction.value for p in engine.run() if p.prediction] == [
        model.generate(STORY, image=picture(1), story="ab", max_tokens=5).value
    ]


def test_weights_that_are_no_numbers_are_said(make):
    model = make()
    with torch.no_grad():
        model.readout(DIGITS).linear.weight[0, 0] = float("nan")
    with pytest.raises(StreamError, match="the model's logits are not numbers after 0 tokens"):
        model.generate(DIGITS, digits=[1], max_tokens=3)


def test_what_is_written_are_plain_tensors(make):
    answer = make().generate(DIGITS, digits=[1], max_tokens=3)
    assert not answer.tokens.content.is_inference()


@dataclass(frozen=True)
class Unlucky(ImagePatches):
    """A user's kind with a mistake."""

    def fed_back(self, features_NF, position_NA):
        raise ZeroDivisionError("oh")


def test_features_that_cannot_be_fed_back_end_their_own_request_only(lively):
    kinds = {"digits": Digits(), "image": Unlucky(patch=4, channels=1, size=(4, 8))}
    painted = mm.Task("digits -> image", mm.FlowMatching(width=16, depth=1))
    model = lively(mm.Model(kinds, CORES["prefix"], ["digits -> digits", painted]))
    engine = mm.Engine(model, rows=4, capacity=40)
    bad = engine.submit("digits -> image", {"digits": [1, 2]})
    good = engine.submit("digits -> digits", {"digits": [1, 2]}, max_tokens=5)
    ended = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert "of task 'digits -> image': oh" in str(ended[bad].error)
    assert ended[good].prediction.value == model.generate("digits -> digits", digits=[1, 2], max_tokens=5).value

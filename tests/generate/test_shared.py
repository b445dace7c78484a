"""Prompts that begin alike are read once, and answered as if each had been read alone."""

import pytest
import torch

import multimodal as mm
from multimodal.generate.engine import Engine
from multimodal.generate.shared import LEAST, longest
from multimodal.layers import MLP, Recurrent
from multimodal_tokenizers import ImagePatches, TextBytes

TASK = "text -> answer:text"
LONG = "You are a helpful clerk who answers in few words. "
KINDS = {"text": TextBytes(causal=True), "image": ImagePatches(patch=2, channels=1), "both": TextBytes()}


def model(task: str = TASK, **core) -> mm.Model:
    return mm.Model(KINDS, mm.Core(width=32, depth=2, heads=4).replace(**core), [task], seed=0).eval()


def read_tokens(monkeypatch, one: mm.Model) -> list[int]:
    """The number of tokens of each pass of the core's modules; those of a step are not among them."""
    counts: list[int] = []
    forward = one.core.forward
    monkeypatch.setattr(one.core, "forward", lambda x, *a, **k: counts.append(len(x)) or forward(x, *a, **k))
    return counts


def answers(engine: Engine, samples, task: str = TASK, **options) -> list:
    tickets = [engine.submit(task, sample, max_tokens=12, **options) for sample in samples]
    found = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    return [found[ticket].prediction.tokens.content.tolist() for ticket in tickets]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"beams": 3}, {"lookup": 4}, {"begin": "so"}])
def test_answers_are_those_of_prompts_read_whole(options, monkeypatch):
    one = model()
    samples = [{"text": LONG + end} for end in ("Why?", "Who?", "Why not?", "Why")] + [
        {"text": "Something else, just as long as that."}
    ]
    wanted = answers(Engine(one, rows=16, capacity=100, plain=True), samples, **options)
    counts = read_tokens(monkeypatch, one)
    engine = Engine(one, rows=16, capacity=100)
    assert answers(engine, samples, **options) == wanted
    read = sum(
        count for count in counts[:2]
    )  # both groups of prompts; later passes are those of tokens that are written
    whole = sum(len(sample["text"]) + 1 + len(options.get("begin", "")) for sample in samples)
    assert read < whole - 2 * len(LONG)


def test_a_prompt_that_comes_later_takes_what_an_answer_in_progress_has_read(monkeypatch):
    one = model()
    engine = Engine(one, rows=4, capacity=100)
    first = engine.submit(TASK, {"text": LONG + "Why?"}, max_tokens=20)
    engine.step()
    counts = read_tokens(monkeypatch, one)
    second = engine.submit(TASK, {"text": LONG + "Who?"}, max_tokens=20)
    found = {piece.ticket: piece.prediction for piece in engine.run() if piece.prediction}
    assert counts[0] == len("o?") + 1  # and the token that opens the answer
    plain = Engine(one, rows=1, capacity=100, plain=True)
    for ticket, text in ((first, LONG + "Why?"), (second, LONG + "Who?")):
        plain.submit(TASK, {"text": text}, max_tokens=20)
        (wanted,) = [piece.prediction for piece in plain.run() if piece.prediction]
        assert found[ticket].tokens.content.tolist() == wanted.tokens.content.tolist()


def requests(one: mm.Model, task: str, *samples) -> list:
    from multimodal.generate.request import new_request

    return [new_request(one.packer, task, sample, "a", None, {}) for sample in samples]


def test_what_is_read_in_both_directions_is_shared_whole_or_not_at_all():
    task = "image text -> answer:text"
    one = model(task)
    picture, other = torch.rand(1, 12, 12), torch.rand(1, 12, 12)
    a, b, c, d = requests(
        one,
        task,
        {"image": picture, "text": "what?"},
        {"image": picture, "text": "where?"},
        {"image": other, "text": "what?"},
        {"image": None, "text": "what?"},
    )
    assert longest(one, a, [c, b, d]) == (b, 36 + len("wh"))
    assert longest(one, a, [c, d]) is None
    task = "both -> answer:text"
    one = model(task)
    a, b, c = requests(one, task, {"both": LONG + "a"}, {"both": LONG + "b"}, {"both": LONG + "a"})
    assert longest(one, a, [b]) is None
    assert longest(one, a, [b, c]) == (c, len(LONG) + 1)
    task = "text both -> answer:text"
    one = model(task)
    a, b = requests(one, task, {"text": LONG, "both": "a"}, {"text": LONG, "both": "b"})
    assert longest(one, a, [b]) is None


def test_few_tokens_are_not_shared():
    one = model()
    a, b, c = requests(one, TASK, *({"text": "x" * (LEAST - 1 + i) + end} for i, end in ((0, "a"), (0, "b"), (1, "c"))))
    assert longest(one, a, [b]) is None
    assert longest(one, c, [requests(one, TASK, {"text": "x" * LEAST + "d"})[0]])[1] == LEAST


@pytest.mark.parametrize(
    "core",
    [
        {"block": (Recurrent(), MLP())},
        {"mask": mm.masks.Window(3) & mm.masks.Causal()},
        {"mask": mm.masks.SameSample()},
    ],
    ids=["recurrent", "window", "all"],
)
def test_other_cores_read_every_prompt_whole(core):
    one = model(**core)
    samples = [{"text": LONG + end} for end in ("Why?", "Who?")]
    assert answers(Engine(one, rows=4, capacity=100), samples) == answers(
        Engine(one, rows=4, capacity=100, plain=True), samples
    )


def test_a_prompt_whose_first_reader_failed_is_read_whole(monkeypatch):
    one = model()
    wanted = one.generate(TASK, text=LONG + "Who?", max_tokens=5).value
    engine = Engine(one, rows=4, capacity=100)
    read = Engine._read
    monkeypatch.setattr(Engine, "_read", lambda self, group: read(self, group) if group[0].ticket else 1 / 0)
    engine.submit(TASK, {"text": LONG + "Why?"}, max_tokens=5)
    second = engine.submit(TASK, {"text": LONG + "Who?"}, max_tokens=5)
    found = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert isinstance(found[0].error, ZeroDivisionError)
    assert found[second].prediction.value == wanted

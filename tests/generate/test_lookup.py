"""Guesses from what was read and written: the same answers in fewer passes."""

import pytest
import torch

import multimodal as mm
from multimodal.generate.engine import Engine
from multimodal.generate.lookup import SIZES, Lookup
from multimodal.layers import MLP, Recurrent
from multimodal_tokenizers import ImagePatches, TextBytes

TASK = "text -> text"
TEXTS = ["abcabcabcabc", "to be or not to be", "aaaaaaaa", "no two let", "ab" * 20]


def model(seed: int = 0, task: str = TASK, **core) -> mm.Model:
    kinds = {"text": TextBytes(causal=True), "image": ImagePatches(patch=2, channels=1)}
    return mm.Model(kinds, mm.Core(width=32, depth=2, heads=4).replace(**core), [task], seed=seed).eval()


def searched(ids: list[int], most: int) -> list[int]:
    """What followed where the newest tokens stood last, by looking everywhere; at the end a guess goes on with itself."""
    for size in SIZES:
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                longer = list(ids)
                while len(longer) < end + most:
                    longer.append(longer[len(longer) - len(ids) + end])
                return longer[end : end + most]
    return []


def test_a_guess_is_what_followed_the_last_time():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(3, (int(torch.randint(1, 25, (), generator=draw)),), generator=draw).tolist()
        assert Lookup(ids, 5).guess(100) == searched(ids, 5)
    assert Lookup([1, 2, 1, 2], 8).guess(3) == [1, 2, 1]
    assert Lookup([], 8).guess(3) == []


def test_wrong_guesses_become_shorter_and_right_ones_longer():
    lookup = Lookup([1, 2, 1, 2], 8)
    lookup.learn(8, 2)
    assert len(lookup.guess(100)) == 3
    lookup.learn(3, 0)
    assert len(lookup.guess(100)) == 1
    for _ in range(9):
        lookup.learn(1, 1)
    assert len(lookup.guess(100)) == 8


def passes(monkeypatch) -> list[int]:
    """The number of new tokens of each pass after the prompts."""
    counts: list[int] = []
    taken = Engine._pass.fget

    def counted(engine):
        run = taken(engine)
        return lambda stream, *rest, **more: counts.append(len(stream)) or run(stream, *rest, **more)

    monkeypatch.setattr(Engine, "_pass", property(counted))
    return counts


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.1}, {"sampler": mm.NoRepeat(6)}], ids=["greedy", "drawn", "rule"]
)
@pytest.mark.parametrize("lookup", [1, 3, 16])
def test_answers_are_those_without_guesses(lookup, options, monkeypatch):
    some = {"max_tokens": 60, "seed": 3, **options}
    one, samples = model(), [{"text": text} for text in TEXTS]
    counts = passes(monkeypatch)
    wanted = [one.generate(TASK, **sample, **some) for sample in samples]
    before = len(counts)
    found = [one.generate(TASK, **sample, **some, lookup=lookup) for sample in samples]
    assert [a.tokens.content.tolist() for a in found] == [a.tokens.content.tolist() for a in wanted]
    assert [a.ended for a in found] == [a.ended for a in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.probability == pytest.approx(b.probability, rel=1e-3)
    if not options:  # which repeats itself soon, so that guesses are right
        assert len(counts) - before < before
        assert max(counts[before:]) == 1 + lookup
    together = one.generate(TASK, samples, **{**some, "seed": 0}, lookup=lookup)
    assert [a.value for a in together] == [a.value for a in one.generate(TASK, samples, **{**some, "seed": 0})]


def test_answers_with_and_without_guesses_share_passes():
    one = model()
    alone = [one.generate(TASK, text=text, max_tokens=30).value for text in TEXTS]
    engine = Engine(one, rows=3, capacity=80)
    settings = ({"lookup": 4}, {}, {"lookup": 9}, {"beams": 2}, {"lookup": 2})
    tickets = {
        engine.submit(TASK, {"text": text}, max_tokens=30, **more): value
        for text, more, value in zip(TEXTS, settings, alone, strict=True)
        if "beams" not in more
    }
    engine.submit(TASK, {"text": TEXTS[3]}, max_tokens=30, beams=2)
    found = {piece.ticket: piece.prediction.value for piece in engine.run() if piece.prediction}
    assert {ticket: found[ticket] for ticket in tickets} == tickets


@pytest.mark.parametrize("stop", [["a"], ["bc"], ["\x00"]])
def test_stop_strings_end_an_answer_within_a_guess(stop):
    one = model()
    for text in TEXTS:
        options = {"text": text, "max_tokens": 40, "stop": stop}
        wanted, found = one.generate(TASK, **options), one.generate(TASK, **options, lookup=8)
        assert (found.value, found.ended) == (wanted.value, wanted.ended)


@pytest.mark.parametrize("limit", range(1, 9))
def test_no_answer_is_longer_than_its_limit(limit):
    one = model()
    wanted = one.generate(TASK, text="ab" * 9, begin="ab", max_tokens=limit)
    assert one.generate(TASK, text="ab" * 9, begin="ab", max_tokens=limit, lookup=8).value == wanted.value


def test_the_pieces_of_a_text_are_the_text():
    one = model()
    pieces = list(one.stream(TASK, text="abcabc", max_tokens=50, lookup=8))
    assert "".join(piece.text for piece in pieces) == pieces[-1].prediction.value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lookup": -1}, r"lookup=-1 must be from 0 to 64"),
        ({"lookup": 65}, r"lookup=65 must be from 0 to 64"),
        ({"lookup": 1.5}, r"lookup"),
        ({"lookup": 4, "beams": 2}, r"lookup=4 with beams=2"),
        ({"lookup": 4, "guidance": 2.0}, r"lookup=4 with guidance=2.0"),
    ],
)
def test_what_cannot_be_guessed_is_refused(given, message):
    with pytest.raises(mm.ConfigError, match=message):
        model().generate(TASK, text="abc", **given)


def test_cores_and_heads_that_cannot_take_guesses_back_are_refused():
    recurrent = model(block=(Recurrent(), MLP()))
    with pytest.raises(mm.ConfigError, match="lookup=4 needs a core whose cache can forget"):
        recurrent.generate(TASK, text="abc", lookup=4)
    two = mm.EncoderDecoder(reader=mm.Core(width=32, depth=1, heads=4), writer=mm.Core(width=32, depth=1, heads=4))
    translator = mm.Model({"text": TextBytes(causal=True)}, two, [TASK]).eval()
    with pytest.raises(mm.ConfigError, match="EncoderDecoder"):
        translator.generate(TASK, text="abc", lookup=4)
    pictures = {"text": TextBytes(), "image": ImagePatches(patch=2, channels=1, size=(4, 4))}
    painter = mm.Model(
        pictures, mm.Core(width=32, depth=1, heads=4), [mm.Task("text -> image", mm.FlowMatching())]
    ).eval()
    with pytest.raises(mm.ConfigError, match="lookup=4 guesses ids"):
        painter.generate("text -> image", text="abc", lookup=4)

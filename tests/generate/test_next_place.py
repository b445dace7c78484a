"""What is written stands where contents say: notes at the sum of their steps, points in space; every way of writing knows it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.attention import ALiBi
from multimodal.check import tokenizer_checks, verify
from multimodal.check.values import random_tokens
from multimodal.export.compare import largest_difference
from multimodal.export.programs import programs_of
from multimodal.generate.step import is_plain
from multimodal.shapes import AXES, ConfigError, MediaError
from multimodal.tokenizer import written_tokens
from multimodal.transcription.language_model import ModelLM
from multimodal_tokenizers import Codes, Ids, Labels, TextBytes

STEPS = 4
CORE = mm.Core(width=32, depth=2, heads=2, axes=(*AXES, "height", "voice"))


@dataclass(frozen=True)
class Notes(mm.Tokenizer):
    """Notes (pitch 0 to 5, step 0 to 3): each sounds `step` beats after the one before it, in the low or the high voice."""

    vocab_size = 6 * STEPS
    causal = True
    axes = (*AXES, "voice")
    step = (0.5, 1.0, 1.0)

    def encode(self, value: Any) -> mm.Tokens:
        if not isinstance(value, list) or not all(isinstance(note, tuple) and len(note) == 2 for note in value):
            raise MediaError(f"Notes.encode: {type(value).__name__} is no list of (pitch, step)")
        pitch, step = torch.tensor(value, dtype=torch.int64).reshape(-1, 2).unbind(1)
        position_NA = mm.at_times(step.cumsum(0) * 0.5, self.axes)
        position_NA[:, 3] = pitch // 3
        return mm.Tokens(pitch * STEPS + step, position_NA)

    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        (token,) = content.tolist()
        before = float(written.position_NA[-1, 0]) if len(written) else 0.0
        return torch.tensor([before + 0.5 * (token % STEPS), 0.0, 0.0, token // STEPS // 3])

    def decode(self, tokens: mm.Tokens) -> list[tuple[int, int]]:
        return [divmod(token, STEPS) for token in tokens.content.tolist()]


@dataclass(frozen=True)
class Points(mm.Tokenizer):
    """Points (n, 4) of x, y, z and a colour, each at its coordinates; the last feature is how far from 0 its position is."""

    feature_size = 5
    axes = (*AXES, "height")
    step = (1.0, 0.5, 0.5, 0.25)

    @property
    def written_features(self) -> int:
        return 4

    def encode(self, value: Any) -> mm.Tokens:
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] != 4:
            raise MediaError(f"Points.encode: {type(value).__name__} is no array (n, 4)")
        point_NF = torch.from_numpy(value.astype(np.float32)).clone()
        position_NA = torch.cat([torch.arange(float(len(value)))[:, None], point_NF[:, :3]], 1)
        return mm.Tokens(self.fed_back(point_NF, position_NA), position_NA)

    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        return torch.cat([torch.tensor([float(len(written))]), content[0, :3]])

    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        return torch.cat([features_NF, position_NA[:, 1:].norm(dim=1, keepdim=True)], 1)

    def decode(self, tokens: mm.Tokens) -> np.ndarray:
        return tokens.content[:, :4].numpy()


def notes(seed: int, count: int) -> list[tuple[int, int]]:
    draw = np.random.default_rng(seed)
    return [(int(draw.integers(6)), int(draw.integers(1, STEPS))) for _ in range(count)]


def points(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)


KINDS = {
    "notes": Notes(),
    "points": Points(),
    "text": TextBytes(causal=True),
    "label": Labels(("a", "b")),
}
WRITES = mm.Task("notes -> points", mm.FlowMatching(width=16, depth=1))
TASKS = ["text -> notes", "points notes -> label", "points -> text", WRITES]
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "text -> notes": [{"text": "abcd"[: 1 + i], "notes": notes(i, 2 + i)} for i in range(4)],
    "points notes -> label": [{"points": points(i, 1 + i), "notes": notes(i, 4 - i), "label": "a"} for i in range(4)],
    "points -> text": [{"points": points(i, 1 + i), "text": "dcba"[i:]} for i in range(4)],
    "notes -> points": [{"notes": notes(i, 1 + i), "points": points(i, 2 + i)} for i in range(4)],
}
CORES = {
    "plain": CORE,
    "with a prior": CORE.replace(prior=ALiBi()),
    "two": mm.EncoderDecoder(reader=CORE, writer=CORE),
}


@pytest.fixture
def model(lively) -> mm.Model:
    return lively(mm.Model(KINDS, CORE, TASKS))


def nats(
    model: mm.Model, task: str, sample: dict[str, Any], answer: mm.Prediction, begin: int = 0, stop: bool = False
) -> float:
    """Log-probability of an answer by one pass over its sample as training packs it: places are those of `encode`.

    stop: also of an answer that was cut off by max_tokens, as beams count it.
    """
    field = model.packer.patterns[task].answer
    assert field is not None
    stream = model.pack(task, [{**sample, field: answer.value}])
    with torch.no_grad():
        log_p_NV = model.logits(stream)[task].log_softmax(-1)
    target_N = stream.readings[task].target
    assert target_N is not None
    rows = slice(begin, len(target_N) - (answer.ended == "max_tokens" and not stop))
    return float(log_p_NV[rows].gather(1, target_N[rows, None]).sum())


@pytest.mark.parametrize(
    ("kind", "values"),
    [(Notes(), [notes(i, 3 + i) for i in range(3)]), (Points(), [points(i, 2 + i) for i in range(3)])],
)
def test_kinds_placed_by_content_pass_every_check(kind: mm.Tokenizer, values: list[Any]):
    slow = ("fresh_process", "worker_process")
    found = {str(check): check.result() for check in tokenizer_checks(kind, values) if str(check) not in slow}
    assert all(result.status in ("ok", "skipped") for result in found.values()), [*map(str, found.values())]
    assert found["places_agree"].status == "ok"


@pytest.mark.parametrize("core", ["plain", "two"])
def test_packed_is_alone_is_cached_is_whole_and_no_gradient_crosses(lively, core: str):
    found = verify(lively(mm.Model(KINDS, CORES[core], TASKS)), SAMPLES)
    assert found.passed, str(found)
    assert {row.subject for row in found.rows if row.check == "cached"} == {
        "text -> notes",
        "points -> text",
        "notes -> points",
    }


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"sampler": mm.NoRepeat(1)},
        {"sampler": mm.generate.AtLeast(5) | mm.TopK(3)},
        {"beams": 4},
        {"beams": 3, "begin": notes(9, 3)},
        {"begin": notes(9, 2)},
    ],
    ids=str,
)
def test_the_probability_is_that_of_the_answer_at_the_places_of_encode(lively, core: str, options: dict[str, Any]):
    model = lively(mm.Model(KINDS, CORES[core], TASKS))
    assert is_plain(model.core) == (core == "plain")
    read = [{"text": sample["text"]} for sample in SAMPLES["text -> notes"]]
    answers = model.generate("text -> notes", read, max_tokens=9, **options)
    begin = len(options.get("begin", ()))
    for sample, answer in zip(read, answers, strict=True):
        assert torch.equal(answer.tokens.position_NA, Notes()(answer.value).position_NA)
        assert not answer.tokens.position_NA.is_inference()
        assert answer.value[:begin] == options.get("begin", [])
        for one in (answer, *answer.others):
            found = nats(model, "text -> notes", sample, one, begin, "beams" in options)
            assert math.log(one.confidence) == pytest.approx(found, abs=2e-4)
    assert max(len(answer.value) for answer in answers) > 4


def test_counted_places_would_not_do(lively, monkeypatch: pytest.MonkeyPatch):
    """The test above can fail: with places that are counted the probabilities are others."""
    model = lively(mm.Model(KINDS, CORE, TASKS))
    monkeypatch.setattr(Notes, "placed_by_content", False)
    answer = model.generate("text -> notes", text="ab", max_tokens=9)
    assert abs(math.log(answer.confidence) - nats(model, "text -> notes", {"text": "ab"}, answer)) > 1e-2


def test_guidance_and_prefix_and_stream(model: mm.Model):
    answer = model.generate("text -> notes", text="ab", guidance=1.7, max_tokens=8)

    def log_p(text: str | None) -> Tensor:
        with torch.no_grad():
            stream = model.packer([("text -> notes", {"text": text, "notes": answer.value})])
            return model.logits(stream)["text -> notes"].log_softmax(-1)

    read, blank = log_p("ab"), log_p(None)
    best_N = (blank + 1.7 * (read - blank)).argmax(-1)
    assert best_N[: len(answer.value)].tolist() == answer.tokens.content.tolist()
    assert (
        answer.tokens.content.tolist()
        != model.generate("text -> notes", text="ab", max_tokens=8).tokens.content.tolist()
    )

    plain = model.generate("text -> notes", text="abc", max_tokens=8)
    prefix = model.read("text -> notes", text="abc")
    assert model.generate("text -> notes", prefix=prefix, max_tokens=8).value == plain.value
    (*_, last) = model.stream("text -> notes", text="abc", max_tokens=8)
    assert last.prediction is not None
    assert last.prediction.value == plain.value


def test_features_that_are_written_stand_at_their_coordinates(model: mm.Model):
    read = [{"notes": sample["notes"]} for sample in SAMPLES["notes -> points"]]
    answers = model.generate("notes -> points", read, max_tokens=6, temperature=0.0)
    for sample, answer in zip(read, answers, strict=True):
        wanted = Points()(answer.value)
        torch.testing.assert_close(answer.tokens.position_NA, wanted.position_NA)
        torch.testing.assert_close(answer.tokens.content, wanted.content)
        # each point is the one that the states before it flow to, read in one pass
        stream = model.pack("notes -> points", [{**sample, "points": answer.value}])
        head, readout = model.packer.head("notes -> points"), model.readout("notes -> points")
        with torch.no_grad():
            rows = stream.readings["notes -> points"].row_N[: len(answer.value)]
            features_NF, _ = head.draw(readout, model(stream)[rows], torch.zeros(len(rows), 4), temperature=0.0)
        torch.testing.assert_close(features_NF, wanted.content[:, :4], atol=1e-4, rtol=1e-4)
    assert max(len(answer.value) for answer in answers) > 2


def test_answers_of_all_kinds_in_one_engine_are_as_if_alone(model: mm.Model):
    asked = [
        ("text -> notes", {"text": "abc"}, {"max_tokens": 9}),
        ("points -> text", {"points": points(1, 2)}, {"max_tokens": 5}),
        ("notes -> points", {"notes": notes(2, 3)}, {"max_tokens": 4, "temperature": 0.0}),
        ("text -> notes", {"text": "d"}, {"max_tokens": 7, "beams": 2}),
        ("text -> notes", {"text": None}, {"max_tokens": 3}),
    ]
    engine = mm.Engine(model, rows=3, capacity=64)
    tickets = [engine.submit(task, sample, **options) for task, sample, options in asked]
    found: dict[int, Any] = {piece.ticket: piece.prediction for piece in engine.run() if piece.prediction is not None}
    for ticket, (task, sample, options) in zip(tickets, asked, strict=True):
        alone = model.generate(task, [sample], **options)[0]
        torch.testing.assert_close(found[ticket].tokens.content, alone.tokens.content, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[ticket].tokens.position_NA, alone.tokens.position_NA, atol=1e-4, rtol=0)


class Failing(Notes):
    """Fails after two notes that are alike."""

    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        if len(written) == 2:
            raise KeyError("a third note")
        return super().next_place(written, content)


def test_one_that_fails_stops_only_its_own_answer(lively):
    model = lively(mm.Model({"notes": Failing(), "text": TextBytes()}, CORE, ["text -> notes", "text -> text"]))
    engine = mm.Engine(model, rows=2, capacity=64)
    failing = engine.submit("text -> notes", {"text": "ab"}, sampler=mm.generate.AtLeast(5), max_tokens=6)
    other = engine.submit("text -> text", {"text": "ab"}, max_tokens=6)
    ended: dict[int, Any] = {piece.ticket: piece for piece in engine.run() if piece.prediction or piece.error}
    assert str(ended[failing].error) == (
        "request 0 of task 'text -> notes': Failing.next_place: fails after 2 tokens: KeyError: 'a third note'"
    )
    assert ended[other].prediction is not None
    assert ended[other].prediction.value == model.generate("text -> text", text="ab", max_tokens=6).value


def test_a_beginning_at_other_places_is_refused(model: mm.Model):
    wrong = mm.Tokens(torch.tensor([3, 5]), mm.at_times(torch.arange(2), Notes.axes))
    with pytest.raises(ConfigError, match="begin is at other positions than the first 2 tokens of what is written"):
        model.generate("text -> notes", text="ab", begin=wrong)


class Late(Notes):
    """Forgets the step of the note itself."""

    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        token = int(written.content[-1]) if len(written) else 0
        return super().next_place(written, torch.tensor([token // STEPS * STEPS + token % STEPS]))


class Flat(Notes):
    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        return super().next_place(written, content)[:3]


class Unknown(Notes):
    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        return super().next_place(written, content) / float(len(written) != 2)


class Choosy(Notes):
    """Knows the places of notes that values have, and of no others."""

    def next_place(self, written: mm.Tokens, content: Tensor) -> Tensor:
        return {i: super(Choosy, self).next_place(written, content) for i in range(STEPS + 1, 23)}[int(content)]


class Farther(Points):
    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        return super().fed_back(features_NF, position_NA + (len(features_NF) == 1))


class Counted(Points):
    """Has its places in encode only."""

    next_place = mm.Tokenizer.next_place


FAULTS = {
    "places_agree": [
        (Late(), r"next_place puts token 0 at \[0\.0, .*\], and encode at \[1\.\d, "),
        (Flat(), r"Flat\.next_place: gave Tensor \(3,\) .*, wanted finite numbers \(4,\): time, row, column, voice"),
        (Unknown(), r"Unknown\.next_place: gave .*, wanted finite numbers"),
        (Farther(), r"fed_back gives .* that is not the content of token 0 with these features and this place"),
        (Counted(), r"places\(2\) are not those of a value of as many tokens; where contents say .* write next_place"),
    ],
    "decode_takes_anything": [
        (Choosy(), r"have no place, but a model may write them: Choosy\.next_place: fails after")
    ],
}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [(name, kind, message) for name, faults in FAULTS.items() for kind, message in faults],
    ids=lambda x: type(x).__name__ if isinstance(x, mm.Tokenizer) else None,
)
def test_a_wrong_place_is_found_by_its_check(name: str, kind: mm.Tokenizer, message: str):
    given = [[(5, 2), (4, 1), (2, 3)], [(2, 3), (1, 1), (3, 1), (5, 3)]]
    values = [points(i, 2 + i) for i in range(2)] if isinstance(kind, Points) else given
    (check,) = [check for check in tokenizer_checks(kind, values) if str(check) == name]
    with pytest.raises(mm.check.ConformanceError, match=message):
        check()


def test_kinds_that_count_their_places_are_written_as_fast_as_before(lively):
    """No call of next_place, and places for many tokens at once."""
    asked: list[int] = []

    @dataclass(frozen=True)
    class Counting(Ids):
        def places(self, count: int) -> Tensor:
            asked.append(count)
            return super().places(count)

    model = lively(mm.Model({"ids": Counting(50)}, CORE, ["-> ids"]))
    asked.clear()
    answer = model.generate("-> ids", sampler=mm.generate.AtLeast(200), max_tokens=200)
    assert len(answer.tokens) == 200
    assert asked == [1, 1, 0, 64, 192, 200]  # whether it can be written, then in growing parts
    assert not Counting(50).placed_by_content


def test_other_ways_to_write_and_read_know_it(lively):
    model = lively(mm.Model({"notes": Notes(), "text": TextBytes()}, CORE, ["-> notes", "text -> notes"]))
    tokens = Notes()(notes(4, 8))
    with torch.no_grad():
        wanted = model.logits(model.packer([("-> notes", {})], answers=False, begins=[tokens]))["-> notes"].log_softmax(
            -1
        )
    lm, ids = ModelLM(model, "-> notes"), tokens.content.tolist()
    for count in (3, 8, 5, 6):
        torch.testing.assert_close(lm.log_p(ids[:count]), wanted[count], atol=1e-5, rtol=0)
    made = {program.name: program for program in programs_of(model, "text -> notes")}
    with torch.no_grad():
        programs = list(made.values())
        assert largest_difference(model, "text -> notes", programs, lambda name, inputs: made[name](inputs)) < 1e-5
    for one in random_tokens(Notes(), 0):
        assert torch.equal(one.position_NA, Notes()(Notes().decode(one)).position_NA)


def test_symbols_of_a_ctc_head_stand_where_they_say(lively, monkeypatch: pytest.MonkeyPatch):
    seen: list[mm.Tokens] = []
    monkeypatch.setattr(Notes, "decode", lambda self, tokens: seen.append(tokens) or len(tokens))
    model = lively(mm.Model({"notes": Notes(), "text": TextBytes()}, CORE, [mm.Task("text -> notes", mm.CTC())]))
    assert model.predict("text -> notes", text="a good day").value > 2
    assert torch.equal(seen[-1].position_NA, written_tokens(Notes(), seen[-1].content).position_NA)
    assert not torch.equal(seen[-1].position_NA, Notes().places(len(seen[-1])))


def test_codes_of_what_stands_at_its_features_are_read_only():
    codes = Codes.train(Points(), [points(i, 6) for i in range(3)], size=4, quiet=True)
    assert torch.equal(codes(points(7, 3)).position_NA, Points()(points(7, 3)).position_NA)
    with pytest.raises(
        ConfigError, match="where a token of Points stands depends on its features, which codes only approximate"
    ):
        mm.Model({"codes": codes}, CORE, ["codes -> codes"])


def test_it_is_trained(model: mm.Model, tmp_path):
    run = mm.fit(model, SAMPLES, steps=3, batch=4, folder=tmp_path / "run", quiet=True)
    assert run.finished
    again = mm.Model.load(tmp_path / "run" / "model").eval()
    first, second = (m.eval().generate("text -> notes", text="abc", max_tokens=6) for m in (model, again))
    assert dataclasses.astuple(first)[:2] == dataclasses.astuple(second)[:2]

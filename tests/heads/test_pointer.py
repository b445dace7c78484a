"""The head that points: the paper's formula by loops, PyTorch's cross entropy, and every way to write against the others."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.attention import Additive, General, LocationBased, ScaledDotProduct
from multimodal.check import head_checks
from multimodal.heads import Memory
from multimodal.heads.pointer import Pointer, PointerReadout
from multimodal.layers import CrossAttention, Recurrent
from multimodal.shapes import ConfigError, StreamError, TaskError
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal_tokenizers import Labels, TextBytes

TASK = "points -> hull:points"


@dataclass(frozen=True)
class Points(Tokenizer):
    """Points of the plane, one token each."""

    causal: bool = False
    feature_size = 2

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.tensor(value, dtype=torch.float32), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> list[list[float]]:
        return tokens.content.tolist()


RECURRENT = {"width": 32, "depth": 1, "heads": 1, "rotary_split": (0, 0, 0)}
CORES = {
    "one core": mm.Core(width=32, depth=2, heads=2),
    "two cores": mm.EncoderDecoder(
        reader=mm.Core(width=32, depth=1, heads=2), writer=mm.Core(width=32, depth=2, heads=2)
    ),
    "recurrent": mm.EncoderDecoder(
        reader=mm.Core(block=(Recurrent(cell="lstm", both_ways=True),), **RECURRENT),
        writer=mm.Core(block=(Recurrent(cell="lstm"), CrossAttention(score=Additive())), **RECURRENT),
    ),
}


def points(count: int, seed: int) -> list[list[float]]:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).tolist()


def sample(count: int, seed: int) -> dict[str, Any]:
    """So many points, and an answer that starts at the last one and leaves some out."""
    value = points(count, seed)
    return {"points": value, "hull": value[::-2]}


SAMPLES = [sample(n, seed) for seed, n in enumerate((5, 7, 5, 9, 3))]


def made(core: str = "one core", head: Pointer | None = None, task: str = TASK, **tokenizers: Tokenizer) -> mm.Model:
    model = mm.Model({"points": Points(), **tokenizers}, CORES[core], [mm.Task(task, head or Pointer())])
    draw = torch.Generator().manual_seed(2)  # with these weights every core writes something
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def case(rows: list[int], keys: list[int], width: int = 6, dtype=torch.float32):
    """States and memory of samples with so many written rows and keys, and targets that are none of what was pointed at."""
    state = torch.randn(sum(rows), width, dtype=dtype)
    pointed = [torch.randperm(k)[: r - 1] for r, k in zip(rows, keys, strict=True)]
    memory = Memory(
        torch.randn(sum(keys), width, dtype=dtype), tuple(keys), torch.cat(pointed), tuple(map(len, pointed))
    )
    target = torch.cat([torch.cat([p, torch.tensor([k])]) for p, k in zip(pointed, keys, strict=True)])
    return state, memory, target


def test_logits_are_equation_3_of_the_paper() -> None:
    head = Pointer(score=Additive(hidden=5))
    readout = head.readout(6, Points())
    weights: Any = readout.weights
    assert {name for name, _ in readout.named_parameters()} == {
        "query",
        "stop",
        *(f"weights.{n}" for n in ("query", "key", "vector")),
    }
    rows, keys = [3, 1, 3, 1], [4, 2, 4, 0]  # where nothing was read only the stop is left
    state, memory, _ = case(rows, keys)
    logits = head.logits(readout, state, rows, memory)
    assert logits.shape == (8, 5)
    at_row = at_key = at_pointed = 0
    for r, k in zip(rows, keys, strict=True):
        e = [*memory.state_MD[at_key : at_key + k], readout.stop]
        for i in range(r):
            d = state[at_row + i]
            before = memory.pointed_N[at_pointed : at_pointed + i].tolist()
            for j in range(5):
                if j > k or j in before:
                    assert logits[at_row + i, j] == -math.inf
                    continue
                u = sum(
                    weights.vector[0, h] * torch.tanh(d @ weights.query[0, :, h] + e[j] @ weights.key[0, :, h])
                    for h in range(5)
                )
                torch.testing.assert_close(logits[at_row + i, j], u)
        at_row, at_key, at_pointed = at_row + r, at_key + k, at_pointed + r - 1


def test_scores_see_the_stop_behind_all_that_was_read() -> None:
    state, memory, _ = case([2, 2], [3, 3])
    for score in (ScaledDotProduct(), General(), LocationBased(places=4)):
        head = Pointer(score=score, repeats=True)
        readout = head.readout(6, Points())
        weights: Any = readout.weights
        logits = head.logits(readout, state, [2, 2], memory)
        for i, d in enumerate(state):
            keys = [*memory.state_MD[3 * (i // 2) : 3 * (i // 2) + 3], readout.stop]
            for j, e in enumerate(keys):
                if isinstance(score, ScaledDotProduct):
                    wanted = d @ e / math.sqrt(6)
                elif isinstance(score, General):
                    wanted = d @ weights.matrix[0] @ e
                else:  # the stop's place is 0, wherever it stands
                    wanted = d @ weights.matrix[0][:, (1, 2, 3, 0)[j]]
                torch.testing.assert_close(logits[i, j], wanted)


def test_loss_is_cross_entropy_of_logits_that_were_made_by_hand() -> None:
    head = Pointer()
    logits = torch.tensor([[1.0, 2.0, 0.5, -math.inf], [0.0, -math.inf, 3.0, -math.inf], [0.1, 0.2, 0.3, 0.4]])
    target = torch.tensor([1, 2, 3])
    wanted = (
        -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(0.5)))
        - math.log(math.exp(3) / (1 + math.exp(3)))
        - math.log(math.exp(0.4) / sum(math.exp(x) for x in (0.1, 0.2, 0.3, 0.4)))
    )
    assert float(head.loss(logits, [2, 1], target, [2, 1])) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("repeats", [False, True])
def test_loss_from_states_is_cross_entropy_of_the_logits(repeats: bool, monkeypatch) -> None:
    head = Pointer(repeats=repeats)
    readout = head.readout(6, Points())
    rows, keys = [3, 1, 3, 4], [4, 2, 4, 6]
    state, memory, target = case(rows, keys)
    loss = head.state_loss(readout, state, rows, target, rows, memory)
    logits = head.logits(readout, state, rows, memory)
    wanted = F.cross_entropy(logits.double(), target, reduction="sum")
    assert torch.isneginf(logits).sum() == sum(r * (6 - k) for r, k in zip(rows, keys, strict=True)) + (
        0 if repeats else sum(r * (r - 1) // 2 for r in rows)
    )
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    grads = torch.autograd.grad(loss, list(readout.parameters())[1:])
    monkeypatch.setattr("multimodal.heads.pointer.BLOCK", 1)  # row by row
    blocked = head.state_loss(readout, state, rows, target, rows, memory)
    torch.testing.assert_close(blocked, loss)
    for a, b in zip(grads, torch.autograd.grad(blocked, list(readout.parameters())[1:]), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_the_loss() -> None:
    head = Pointer(score=Additive(hidden=3))
    readout = head.readout(4, Points()).double()
    rows, keys = [2, 3, 2], [3, 3, 3]
    state, memory, target = case(rows, keys, width=4, dtype=torch.float64)

    def loss(state, read, stop, query, key, vector):
        for name, x in (("query", query), ("key", key), ("vector", vector)):
            delattr(readout.weights, name) if hasattr(readout.weights, name) else None
            setattr(readout.weights, name, x)
        del readout.stop
        readout.stop = stop
        return head.state_loss(readout, state, rows, target, rows, dataclasses.replace(memory, state_MD=read))

    learned = [getattr(readout.weights, name) for name in ("query", "key", "vector")]
    inputs = [x.detach().clone().requires_grad_() for x in (state, memory.state_MD, readout.stop, *learned)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("core", CORES)
def test_packed_is_alone(core: str) -> None:
    model = made(core)
    together = model.pack(TASK, SAMPLES)
    logits, reading = model.logits(together)[TASK], together.readings[TASK]
    losses = 0.0
    for i, part, keys in zip(reading.samples, logits.split(list(reading.lengths)), reading.key_lengths, strict=True):
        stream = model.pack(TASK, [SAMPLES[i]])
        alone = model.logits(stream)[TASK]
        torch.testing.assert_close(part[:, : keys + 1], alone, atol=1e-5, rtol=1e-5)
        assert torch.isneginf(part[:, keys + 1 :]).all()
        assert (~torch.isneginf(alone)).sum() == sum(keys + 1 - j for j in range(len(alone)))
        losses += float(model.losses(stream)[TASK].detach())
    assert float(model.losses(together)[TASK].detach()) == pytest.approx(losses, rel=1e-5)
    assert len(set(reading.key_lengths)) > 2  # samples of other lengths were packed with it


def test_targets_are_numbers_of_what_was_read_and_then_the_stop() -> None:
    model = made()
    reading = model.pack(TASK, [SAMPLES[1]]).readings[TASK]
    assert reading.target is not None
    assert reading.pointed_N is not None
    assert reading.target.tolist() == [6, 4, 2, 0, 7]
    assert reading.pointed_N.tolist() == [6, 4, 2, 0]
    assert reading.count == 5


def test_what_is_pointed_at_is_fed_back_with_its_content_and_place() -> None:
    model = made()
    stream = model.pack(TASK, [SAMPLES[0]])
    assert stream.position_TA[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 10, 8, 6]  # 5 points, the start, points 4, 2 and 0
    rows = model.rows(stream)
    torch.testing.assert_close(rows[6:], rows[[4, 2, 0]])


def uncached(model: mm.Model, value: dict[str, Any], limit: int = 99) -> tuple[list[list[float]], float]:
    """Greedy by one pass of the whole stream for each token, no cache; the answer and its log-probability."""
    head = model.packer.head(TASK)
    assert isinstance(head, Pointer)
    read = Points()(value["points"])
    chosen: list[int] = []
    log_p = 0.0
    while True:
        begun = Tokens(read.content[chosen], at_times(torch.arange(len(chosen)))) if chosen else None
        stream = model.packer([(TASK, value)], answers=False, begins=[begun])
        with torch.no_grad():
            score_V = model.logits(stream)[TASK][-1].double()
        if not head.repeats:
            assert torch.isneginf(score_V).nonzero()[:, 0].tolist() == sorted(chosen)
        log_p_V = score_V.log_softmax(-1)
        best = int(log_p_V.argmax())
        if best < len(read) and len(chosen) == limit:
            return read.content[chosen].tolist(), log_p
        log_p += float(log_p_V[best])
        if best == len(read):
            return read.content[chosen].tolist(), log_p
        chosen.append(best)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_cached_is_uncached_and_batch_is_single(core: str, repeats: bool) -> None:
    model = made(core, Pointer(repeats=repeats))
    answers = model.generate(TASK, SAMPLES, max_tokens=12)
    assert {a.ended for a in answers} <= {"stop", "max_tokens"}
    assert min(len(a.value) for a in answers) >= 1
    for value, answer in zip(SAMPLES, answers, strict=True):
        wanted, log_p = uncached(model, value, 12)
        assert answer.value == wanted
        assert math.log(answer.confidence) == pytest.approx(log_p, abs=1e-4)
        assert answer.tokens is not None
        assert answer.value == answer.tokens.content.tolist()
        at = [value["points"].index(p) for p in map(_found(value), answer.value)]
        assert answer.tokens.position_NA[:, 0].tolist() == at
        alone = model.generate(TASK, [value], max_tokens=12)[0]
        assert alone.value == answer.value
    if not repeats:
        assert all(len(set(map(tuple, a.value))) == len(a.value) for a in answers)


def _found(value: dict[str, Any]):
    """The point as it was given, for one in single precision."""
    return lambda p: min(value["points"], key=lambda q: abs(p[0] - q[0]) + abs(p[1] - q[1]))


@pytest.mark.parametrize("core", ["one core", "recurrent"])
def test_samples_drawn_never_repeat_unless_they_may(core: str) -> None:
    again = 0
    for repeats in (False, True):
        model = made(core, Pointer(repeats=repeats))
        for answer in model.generate(TASK, SAMPLES * 4, max_tokens=20, temperature=3.0, seed=3):
            twice = len(answer.value) - len(set(map(tuple, answer.value)))
            again += twice
            assert repeats or not twice
    assert again  # where it was allowed it happened


@dataclass(frozen=True)
class Widths(mm.generate.Sampler):
    """Greedy; every answer has as many choices as it has read, and the stop."""

    def __call__(self, logits_BV, written):
        assert not logits_BV[:, -1].isneginf().any()
        assert {w.stop for w in written} == {logits_BV.shape[1] - 1}
        return mm.generate.Greedy()(logits_BV, written)


def test_samplers_see_the_choices_of_one_answer_as_if_it_were_alone() -> None:
    model = made("recurrent")
    answers = model.generate(TASK, SAMPLES, max_tokens=12, sampler=Widths())
    assert [a.value for a in answers] == [a.value for a in model.generate(TASK, SAMPLES, max_tokens=12)]


def test_beams_find_what_is_likelier_than_greedy() -> None:
    model = made("recurrent")
    rule = mm.generate.AtLeast(2)  # else the likeliest is to write nothing
    greedy = model.generate(TASK, SAMPLES, max_tokens=12, sampler=rule)
    wide = model.generate(TASK, SAMPLES, max_tokens=12, sampler=rule, beams=40, length_penalty=0.0, batch=200)
    better = 0
    for value, one, many in zip(SAMPLES, greedy, wide, strict=True):
        assert many.confidence >= one.confidence - 1e-6
        better += many.confidence > one.confidence + 1e-6
        stream = model.pack(TASK, [{"points": value["points"], "hull": [*map(_found(value), many.value)]}])
        with torch.no_grad():
            loss = float(model.losses(stream)[TASK])
        assert math.log(many.confidence) == pytest.approx(-loss, abs=1e-4)
        assert len({tuple(map(tuple, o.value)) for o in (many, *many.others)}) == 1 + len(many.others)
    assert better


def test_an_answer_goes_on_from_what_it_began_with() -> None:
    model = made("recurrent")
    value = SAMPLES[1]
    whole = model.generate(TASK, [value])[0]
    begin = [*map(_found(value), whole.value[:2])]
    assert len(whole.value) > 2
    rest = model.generate(TASK, [value], begin=begin)[0]
    assert rest.value == whole.value
    with pytest.raises(
        StreamError, match=r"sample 0 of task .*, begin: Pointer: token 0 of the answer.* is none of the 7"
    ):
        model.generate(TASK, [value], begin=[[0.5, 0.5]])


def test_text_is_copied_word_by_word_and_twins_in_their_order() -> None:
    model = made(task="text -> copy:text", text=TextBytes())
    head = model.packer.head("text -> copy:text")
    assert head.pointed(TextBytes()("abba"), TextBytes()("baab")).tolist() == [1, 0, 3, 2]
    assert Pointer(repeats=True).pointed(TextBytes()("abba"), TextBytes()("baab")).tolist() == [1, 0, 0, 1]
    for text in ("pointer", "noon"):
        answer = model.generate("text -> copy:text", text=text, sampler=mm.generate.AtLeast(3))
        assert answer.tokens is not None
        assert answer.value == TextBytes().decode(answer.tokens)
        assert len(answer.value) >= 3
        assert all(answer.value.count(c) <= text.count(c) for c in answer.value)
        pieces = list(model.stream("text -> copy:text", text=text, sampler=mm.generate.AtLeast(3)))
        assert "".join(piece.text for piece in pieces) == answer.value


def test_only_the_written_kind_is_pointed_at() -> None:
    task = "text left:points more:text right:points -> hull:points"
    model = made(task=task, text=TextBytes())
    value = {"text": "ab", "left": points(3, 0), "more": "xyz", "right": points(2, 1)}
    value["hull"] = [value["right"][1], value["left"][0]]
    reading = model.pack(task, [value]).readings[task]
    assert reading.key_N is not None
    assert reading.target is not None
    assert reading.key_N.tolist() == [2, 3, 4, 8, 9]
    assert reading.target.tolist() == [4, 0, 5]
    nothing = model.generate(task, [{**value, "left": None, "right": None}])[0]
    assert nothing.value == []  # there is only the stop


def test_save_and_load(tmp_path) -> None:
    model = made("recurrent", Pointer(score=General(), repeats=True))
    again = mm.Model.load(model.save(tmp_path / "model"))
    assert again.packer.head(TASK) == Pointer(score=General(), repeats=True)
    stream = model.pack(TASK, SAMPLES)
    with torch.no_grad():
        assert torch.equal(again.logits(stream)[TASK], model.logits(stream)[TASK])


def test_it_learns_to_point() -> None:
    """The point that lies furthest to the right: a few steps, and most answers are right."""
    draw = torch.Generator().manual_seed(0)
    data = []
    for _ in range(256):
        value = torch.rand(3, 2, generator=draw).tolist()
        data.append({"points": value, "hull": [max(value)]})
    model = mm.Model({"points": Points()}, mm.Core(width=32, depth=1, heads=2), [mm.Task(TASK, Pointer())])
    run = mm.fit(model, {TASK: data}, steps=40, batch=32, lr=1e-2, quiet=True)
    assert run.history[0]["loss"] > 0.9
    right = [
        a.value == Points().decode(Points()(s["hull"]))
        for s, a in zip(data, model.generate(TASK, data[:64]), strict=False)
    ]
    assert sum(right) > 48


@pytest.mark.parametrize("check", head_checks(Pointer(), TextBytes(), ["word", "a letter", "two"]), ids=str)
def test_conformance_over_ids(check) -> None:
    check()


POINTS = [points(3, 0), points(5, 1), points(4, 2)]


@pytest.mark.parametrize("check", head_checks(Pointer(General(), repeats=True), Points(), POINTS), ids=str)
def test_conformance_over_features(check) -> None:
    check()


def test_answers_that_were_not_read_are_refused() -> None:
    model, value = made(), SAMPLES[0]["points"]
    with pytest.raises(
        StreamError, match=r"sample 0 of task .*: Pointer: token 1 of the answer, \[2.0, 2.0\], is none of the 5"
    ):
        model.pack(TASK, [{"points": value, "hull": [value[0], [2.0, 2.0]]}])
    with pytest.raises(
        StreamError, match=r"token 1 of the answer.* more often than it was read; Pointer\(repeats=True\)"
    ):
        model.pack(TASK, [{"points": value, "hull": [value[0], value[0]]}])
    made(head=Pointer(repeats=True)).pack(TASK, [{"points": value, "hull": [value[0], value[0]]}])
    with pytest.raises(StreamError, match="token 0 of the answer"):  # half of it is the same
        model.pack(TASK, [{"points": value, "hull": [[value[0][0], 2.0]]}])
    with pytest.raises(StreamError, match="is none of the 0 that were read"):
        model.pack(TASK, [{"points": None, "hull": value}])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(TaskError, match=r"reads nothing of kind 'points'.*as in 'seen:points -> points'"):
        mm.Model({"points": Points(), "text": TextBytes()}, CORES["one core"], [mm.Task("text -> points", Pointer())])
    model = made()
    with pytest.raises(
        ConfigError, match=r"Pointer points at what is read with the answer, so guidance=2.0 has no meaning"
    ):
        model.generate(TASK, SAMPLES[:1], guidance=2.0)
    causal = mm.Model({"points": Points(causal=True)}, CORES["one core"], [mm.Task(TASK, Pointer())])
    with pytest.raises(ConfigError, match="so a prefix has no meaning there"):
        causal.generate(TASK, prefix=causal.read(TASK, points=points(3, 0)))
    with pytest.raises(ConfigError, match="would share the weights of another head"):
        mm.Model(
            {"points": Points()},
            CORES["one core"],
            [mm.Task(TASK, Pointer()), mm.Task("points -> other:points", Pointer(score=General()))],
        )
    head, readout = Pointer(), Pointer().readout(6, Points())
    assert isinstance(readout, PointerReadout)
    state, memory, target = case([2], [3])
    with pytest.raises(ConfigError, match="also needs the states of what was read"):
        head.logits(readout, state, [2])
    with pytest.raises(StreamError, match="each row needs one"):
        head.state_loss(readout, state, [2], target[:1], [1], memory)
    with pytest.raises(StreamError, match="but their lengths add up to"):
        head.logits(readout, state, [1], memory)
    with pytest.raises(ConfigError, match=r"use Model\.generate"):
        head.answer(torch.zeros(1, 2), [1], Points())
    assert Pointer().vocab(Labels(("a", "b"))) == 1

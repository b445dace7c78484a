"""Data: mixing as declared, packs that are full, states to resume from, broken samples reported and counted."""

import copy
import itertools
import json
import pickle
import random

import pytest
import torch

import multimodal as mm
from multimodal.data import Mixed, Packs
from multimodal.data.packs import fullest
from multimodal.data.sources import IterableReader, Schedule, index_at, permutation, scattered, shares, weighed
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

READ, SEE, WRITE = "text -> label", "image -> label", "-> text"


def make() -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("a", "b")), "image": ImagePatches(patch=4, channels=1)}
    return mm.Model(tokenizers, mm.Core(width=16, depth=1, heads=2), [READ, SEE, WRITE])


PACKER = make().packer
DRAWN = random.Random(0)
TEXTS = [{"text": f"{i} " + "x" * DRAWN.randint(0, 60), "label": "a"} for i in range(50)]
PICTURES = [{"image": torch.rand(4 * DRAWN.randint(1, 5), 8), "label": "b"} for _ in range(20)]


class Words:
    """Can only be iterated, and resumes from a state."""

    def __init__(self, size: int = 31) -> None:
        self.at, self.size, self.read = 0, size, 0

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            self.read += 1
            yield {"text": f"word {self.at}"}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Plain:
    def __iter__(self):
        return iter([{"text": f"word {i}"} for i in range(1, 32)])


def packs(*, words=None, start=0, stop=12, state=None, workers=0, **changes) -> tuple[list, list]:
    """What each step has, by lane, and the state after each."""
    data = {READ: TEXTS, SEE: PICTURES, WRITE: words or Words()}
    settings = {"tokens": 160, "packs": 2, "look_ahead": 16, **changes}
    source = Packs(PACKER, data, **settings)
    if state is not None:
        source.restore(json.loads(json.dumps(state)))
    found, states = [], []
    for batch in source.loader(start, stop, workers):
        found.append(dict(zip(batch.numbers, zip(batch.names, batch.streams, strict=True), strict=True)))
        states.append(copy.deepcopy(source.state()))
    return found, states


def content(found: list) -> list:
    return [{lane: names for lane, (names, _) in step.items()} for step in found]


@pytest.mark.parametrize("seed", range(30))
def test_a_pack_is_as_full_as_any_choice_with_its_first_sample(seed):
    drawn = random.Random(seed)
    lengths, budget = [drawn.randint(1, 30) for _ in range(10)], drawn.randint(30, 80)
    chosen = fullest(lengths, budget)
    every = (c for n in range(10) for c in itertools.combinations(range(1, 10), n))
    best = max(total for c in every if (total := lengths[0] + sum(lengths[i] for i in c)) <= budget)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(lengths[i] for i in chosen) == best


def test_packs_hold_their_budget_and_every_sample_comes_once_a_round():
    found, _ = packs(stop=40)
    assert all(len(stream) <= 160 for step in found for _, stream in step.values())
    assert sum(len(stream) for step in found[:20] for _, stream in step.values()) / (20 * 2 * 160) > 0.985
    for lane in range(2):
        places = [int(name.split("place ")[1].split()[0]) for step in found for name in step[lane][0]]
        assert len(set(places)) == len(places) > 100  # each once, and all but those that still wait
        assert len(set(range(max(places))) - set(places)) < 16


def test_each_round_has_each_sample_once():
    order = [index_at(TEXTS, "0/text", visit) for visit in range(100)]
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]


@pytest.mark.parametrize("words", [Words, Plain])
def test_packs_resume_from_a_state_with_other_workers_and_processes(words):
    whole, states = packs(words=words())
    assert content(packs(words=words(), workers=2)[0]) == content(whole)
    ranks = [packs(words=words(), rank=rank, ranks=2) for rank in range(2)]
    assert [{**a, **b} for a, b in zip(*(content(found) for found, _ in ranks), strict=True)] == content(whole)
    merged = {"lanes": {**ranks[0][1][5]["lanes"], **ranks[1][1][5]["lanes"]}}
    assert merged == states[5]
    again, later = packs(words=words(), start=6, state=merged, workers=1)
    assert content(again) == content(whole)[6:]
    assert later == states[6:]
    for step, other in zip(again, whole[6:], strict=True):
        for lane, (_, stream) in step.items():
            assert torch.equal(stream.position_TA, other[lane][1].position_TA)
            assert all(torch.equal(x, other[lane][1].content[kind]) for kind, x in stream.content.items())


def test_a_source_with_a_state_is_not_read_again_from_its_start():
    reader = IterableReader(Words(1000))
    for visit in range(700):
        assert reader.at(visit)["text"] == f"word {visit + 1}"
    state = json.loads(json.dumps(reader.state(650)))
    assert 650 - IterableReader.EVERY < state["turn"] <= 650
    words = Words(1000)
    other = IterableReader(words)
    other.restore(state)
    assert other.at(690)["text"] == "word 691"
    assert other.source.read < 2 * IterableReader.EVERY
    assert words.read == 0  # the user's own is left alone


def test_a_stream_begins_again_when_it_ends_also_right_after_a_state():
    reader = IterableReader(Words(64))
    assert [reader.at(visit)["text"] for visit in (63, 64, 127, 128)] == ["word 64", "word 1", "word 64", "word 1"]
    reader = IterableReader(Words(64))
    reader.at(64)
    other = IterableReader(Words(64))
    other.restore(reader.state(64))
    assert other.visit == 64
    assert other.at(64)["text"] == "word 1"
    with pytest.raises(MediaError, match="Words: the data have no samples"):
        IterableReader(Words(0)).at(0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4099])
def test_an_order_without_memory_is_a_permutation(size):
    order = [scattered(size, "a")(place) for place in range(size)]
    assert sorted(order) == list(range(size))
    if size > 60:
        assert order != [scattered(size, "b")(place) for place in range(size)]
        moved = sum(abs(a - b) for a, b in enumerate(order)) / size
        assert 0.25 * size < moved < 0.42 * size  # a third of the size, as of an order drawn evenly


def test_visits_are_counted_and_every_block_has_the_shares():
    schedule = Schedule({"a": 6, "b": 3, "c": 1}, "key")
    drawn = [schedule(position) for position in range(40)]
    for who, share in (("a", 6), ("b", 3), ("c", 1)):
        assert [visit for name, visit in drawn if name == who] == list(range(4 * share))
        assert [name for name, _ in drawn[10:20]].count(who) == share
    assert [name for name, _ in drawn[:10]] != [name for name, _ in drawn[10:20]]
    assert Schedule({"a": 6, "b": 3, "c": 1}, "key")(37) == drawn[37]  # in any order of asking
    assert [name for name, _ in map(Schedule({"a": 2, "b": 1}), range(6))] == list("aabaab")


def test_a_temperature_weighs_by_length():
    data = {"a": range(100), "b": range(900)}
    for temperature, ratio in ((1.0, 9), (2.0, 3), (float("inf"), 1)):
        weights = weighed(data, temperature, "fit")
        assert weights["b"] / weights["a"] == pytest.approx(ratio)
    assert shares(100, weighed(data, 1e-3, "fit")) == {"a": 1, "b": 99}
    assert shares(100, weighed(data, 1e9, "fit")) == {"a": 50, "b": 50}
    assert weighed(data, {"a": 3.0}, "fit") == {"a": 3.0, "b": 1.0}


def test_mixed_data_sets_have_their_shares():
    mixed = Mixed([{"n": i} for i in range(10)], [{"n": i} for i in range(100, 400)], weights=[1, 3])
    order = mixed.shuffled("key")
    drawn = [mixed[order(place)]["n"] for place in range(len(mixed))]
    small = [n for n in drawn if n < 10]
    assert 0.2 < len(small) / len(drawn) < 0.3
    assert {small.count(n) for n in range(10)} <= {len(small) // 10, len(small) // 10 + 1}
    assert len({n for n in drawn if n >= 100}) == sum(n >= 100 for n in drawn)
    assert mixed.shuffled("key")(17) == order(17)


class Broken(list):
    def __getitem__(self, index):
        if index % 7 == 3:
            raise OSError(f"file {index} is damaged")
        return super().__getitem__(index)


def test_packs_skip_broken_samples_and_resume_exactly():
    def run(state=None, start=0):
        made = Packs(PACKER, {READ: Broken(TEXTS)}, tokens=200, look_ahead=8, max_bad=9)
        if state:
            made.restore(state)
        return [(b.names, [bad.sample for bad in b.bad], made.state()) for b in made.loader(start, 20, 0)]

    whole = run()
    assert {s for _, bad, _ in whole for s in bad} == {f"sample {n}" for n in range(50) if n % 7 == 3}
    assert run(whole[8][2], 9) == whole[9:]


def test_what_is_longer_than_the_budget_counts_as_broken():
    long = [*TEXTS, {"text": "y" * 500, "label": "a"}]
    with pytest.raises(StreamError, match=r"is 501 tokens long, and a pack holds tokens=200; raise that"):
        list(Packs(PACKER, {READ: long}, tokens=200, look_ahead=8).loader(0, 20, 0))


@pytest.mark.parametrize("settings", [{"batch": 4}, {"tokens": 20, "look_ahead": 4}])
def test_data_that_are_all_broken_end_at_once(settings):
    class Gone(list):
        def __getitem__(self, index):
            raise OSError("no such file")

    with pytest.raises(
        MediaError, match=r"10\d samples in a row are broken, and max_bad=3 may be; the last one: .* no such file"
    ):
        mm.fit(make(), {READ: Gone(TEXTS)}, steps=2, max_bad=3, device="cpu", quiet=True, **settings)


def test_what_is_declared_wrongly_is_no_broken_sample():
    with pytest.raises(TaskError, match="has no field 'label'"):
        mm.fit(make(), {READ: [{"text": "a"}]}, steps=1, batch=1, max_bad=5, device="cpu", quiet=True)


def test_workers_get_no_sources_of_the_main_process():
    source = Packs(PACKER, {READ: TEXTS}, tokens=200)
    next(iter(source.loader(0, 1, 0)))
    assert pickle.loads(pickle.dumps(source)).lanes == []


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({}, {}, "no data were given"),
        ({READ: Words()}, {}, r"Words, which has no length and \[index\]; .* set tokens=4096"),
        ({READ: iter(TEXTS)}, {"tokens": 100}, "are an iterator, which ends and cannot be gone back in"),
        ({READ: 3}, {"tokens": 100}, "are int; wanted a list"),
        ({READ: []}, {"tokens": 100}, "are empty"),
        ({READ: TEXTS}, {"tokens": 100, "mix": {READ: 0}}, "mix gives 0 to 'text -> label'"),
        ({READ: TEXTS, WRITE: Words()}, {"tokens": 100, "mix": 2.0}, "have no length to weigh them by"),
        ({READ: TEXTS}, {"mix": -1.0}, "mix=-1.0 is a temperature; wanted a number above 0"),
        ({READ: TEXTS}, {"mix": "x"}, "mix='x' is str; wanted weights by task"),
        ({READ: TEXTS}, {"mix": {READ: float("inf")}}, "mix gives inf to 'text -> label'"),
        ({READ: TEXTS}, {"lr": "1e-3"}, "lr='1e-3' is str, wanted a number"),
        ({READ: TEXTS}, {"betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers"),
        ({READ: TEXTS}, {"seed": None}, "seed=None is NoneType, wanted a whole number"),
    ],
)
def test_bad_data_are_refused(data, settings, message):
    mix = {"mix": settings.pop("mix")} if "mix" in settings else {}
    with pytest.raises(ConfigError, match=message):
        mm.fit(make(), data, steps=1, device="cpu", quiet=True, **mix, **settings)


def test_orders_are_drawn_from_their_keys():
    assert not torch.equal(permutation(50, "a"), permutation(50, "b"))
    assert torch.equal(permutation(50, "a"), permutation(50, "a"))

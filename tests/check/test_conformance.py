"""The conformance kit: what comes with the framework passes it, and each check notices the fault it is for."""

import itertools
import os
import pickle
import unittest
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import get_worker_info

import multimodal as mm
from multimodal.check import (
    HEAD_CHECKS,
    TOKENIZER_CHECKS,
    ConformanceError,
    check_head,
    check_tokenizer,
    head_checks,
    tokenizer_checks,
)
from multimodal.heads import Readout
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBPE, TextBytes
from tests.check.planted import PLANTED

COUNT = len(TOKENIZER_CHECKS)
WORDS = ["good day", "bad night é", "what?"]
_random = np.random.default_rng(0)
GREY = [_random.random(shape, dtype=np.float32) for shape in ((8, 12), (9, 5), (8, 8))]
RGB = [_random.random((*shape, 3), dtype=np.float32) for shape in ((8, 12), (9, 5), (8, 8))]
SOUNDS = [(_random.standard_normal(n).astype(np.float32) * 0.1, 16000) for n in (4000, 6000)]
BUILT_IN = [
    (TextBytes(), WORDS),
    (TextBytes(causal=True), WORDS),
    (TextBPE.train(WORDS * 5, vocab_size=290), WORDS),
    *((ImagePatches(patch=4, channels=1, position=p), GREY) for p in ("sincos", "learned", "rotary")),
    *((ImagePatches(patch=4, channels=3, position=p), RGB) for p in ("sincos", "learned", "rotary")),
    (AudioFrames(), SOUNDS),
    (Labels(("cat", "dog", "cow")), ["cat", "dog"]),
    (Labels(("cat", "dog", "cow"), several=True), [["cat"], ["dog", "cow"], []]),
]
HEADS = [
    (mm.Classify(), Labels(("cat", "dog", "cow")), ["cat", "dog"]),
    (mm.Classify(label_smoothing=0.1), Labels(("cat", "dog", "cow"), several=True), [["cat"], ["dog", "cow"]]),
    (mm.NextToken(), TextBytes(), WORDS),
    (mm.CTC(), TextBytes(), WORDS),
]


def _named(cases, make):
    return [
        pytest.param(check, id=f"{type(case[0]).__name__}{i}-{check}")
        for i, case in enumerate(cases)
        for check in make(*case)
    ]


@pytest.mark.parametrize("check", _named(BUILT_IN, tokenizer_checks))
def test_built_in_tokenizer(check):
    check()


@pytest.mark.parametrize("check", _named(HEADS, head_checks))
def test_built_in_head(check):
    check()


@dataclass(frozen=True)
class Wave(mm.Tokenizer):
    """A sound tokenizer of numbers: (n,) floats as n tokens of two features."""

    scale: float = 1.0
    feature_size = 2

    def encode(self, value):
        if not isinstance(value, np.ndarray) or value.ndim != 1:
            raise mm.MediaError(f"Wave.encode: {value!r} is no array (n,)")
        x = torch.from_numpy(value.astype(np.float32)) * self.scale
        return mm.Tokens(torch.stack([x, x**2], 1), mm.at_times(torch.arange(len(x))))

    def decode(self, tokens):
        return tokens.content[:, 0].numpy() / self.scale


def waves():
    return [np.sin(np.arange(5) + i) for i in range(3)]


def words():
    return ["good day", "bad tune", "what? é"]


class Both(Wave):
    vocab_size = 5


class LosesPlace(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA[1:])


class Double(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content.double(), tokens.position_NA)


class IdsTooLarge(TextBytes):
    vocab_size = 100


class Infinite(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content / 0.0, tokens.position_NA)


class Draws(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content + torch.rand(1), tokens.position_NA)


class Deaf(Wave):
    def encode(self, value):
        return super().encode(value * 0)


class Heap(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA * 0)


class Early(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA - 1)


class Backwards(Wave):
    causal = True

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA.flip(0))


class Milliseconds(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA * 1000)


class InPlace(Wave):
    def encode(self, value):
        value -= value.mean()
        return super().encode(value)


class Seeds(Wave):
    def encode(self, value):
        np.random.seed(0)
        return super().encode(value)


class Learned(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content.requires_grad_(), tokens.position_NA)


class OtherInWorker(Wave):
    def encode(self, value):
        return super().encode(value + (get_worker_info() is not None))


class DiesInWorker(Wave):
    def encode(self, value):
        if get_worker_info() is not None:
            raise OSError("the file is open elsewhere")
        return super().encode(value)


class TakesAll(TextBytes):
    def encode(self, value):
        return super().encode(str(value))


class Nameless(TextBytes):
    def encode(self, value):
        if not isinstance(value, str):
            raise mm.MediaError("bad value")
        return super().encode(value)


class Fills(TextBytes):
    def encode(self, value):
        return super().encode(value or "?")


class Cuts(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content[: self.max_tokens or 1], tokens.position_NA[: self.max_tokens or 1])


class Unlimited(Wave):
    def __call__(self, value):
        return self.encode(value)


class Lowers(TextBytes):
    def decode(self, tokens):
        return super().decode(tokens).replace("é", "e")


class Halves(Wave):
    def decode(self, tokens):
        return super().decode(tokens) / 2


class Strict(TextBytes):
    def decode(self, tokens):
        return bytes(tokens.content.tolist()).decode("utf-8")


class NeverEmpty(TextBytes):
    def decode(self, tokens):
        return chr(tokens.content[0]) + super().decode(tokens)[1:]


class PlacesFromOne(TextBytes):
    def encode(self, value):
        return TextBytes().encode(value)

    def places(self, count):
        return super().places(count) + 1


class Rows(nn.Module):
    """A linear layer or table, and what a fault makes of its rows."""

    def __init__(self, inner, then=lambda rows: rows):
        super().__init__()
        self.inner, self.then = inner, then

    def forward(self, content):
        return self.then(self.inner(content))


class Pools(Wave):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows.mean(0, keepdim=True))


class Centres(Wave):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows - rows.mean(0))


class CentresIds(TextBytes):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows - rows.mean(0))


class CentresQuietly(Wave):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows - rows.detach().mean(0))


class Normalises(Wave):
    """Batch norm: innocent in evaluation, leaks in training."""

    def embed(self, width):
        return nn.Sequential(super().embed(width), nn.BatchNorm1d(width))


class Numbers(Wave):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows + torch.arange(len(rows))[:, None])


class Idle(Wave):
    def embed(self, width):
        rows = Rows(super().embed(width))
        rows.unused = nn.Parameter(torch.zeros(width))
        return rows


class Silent(Wave):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows * 0)


_made = itertools.count(1)


class Counts(Wave):
    """Every module it makes scales by another number, which is in no state dict."""

    def embed(self, width):
        scale = float(next(_made))
        return Rows(super().embed(width), lambda rows: rows * scale)


class Rebuilt(Wave):
    def __reduce__(self):
        return type(self), ()


@dataclass(frozen=True)
class Closure(Wave):
    def __post_init__(self):
        object.__setattr__(self, "trick", lambda: 1)


class Forgets(Wave):
    def config(self):
        return {}


class NotJson(Wave):
    def config(self):
        return {"scale": np.float32(self.scale)}


class NoTokens(Wave):
    def encode(self, value):
        return super().encode(value).content


class Elsewhere(Wave):
    def encode(self, value):
        os.chdir("/")
        return super().encode(value)


class ById(Wave):
    def encode(self, value):
        return super().encode(value + id(value) % 1009)


class View(Wave):
    def encode(self, value):
        tokens = super().encode(value.astype(np.float32))
        return mm.Tokens(torch.from_numpy(value)[:, None], tokens.position_NA)


class Grows(TextBytes):
    known: ClassVar[dict] = {}

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content + self.known.setdefault(value, len(self.known)), tokens.position_NA)


class KnowsAll(Wave):
    causal = True

    def encode(self, value):
        return super().encode(value - value.mean())


class Listed(TextBytes):
    def decode(self, tokens):
        return list(super().decode(tokens))


class Seven(TextBytes):
    length = 7


class Raises(Wave):
    def picture(self, tokens):
        return tokens.content[:, 7]


class Roots(Wave):
    def embed(self, width):
        return Rows(super().embed(width), lambda rows: rows.sqrt())


FAULTS = [
    ("declared", Both(), "exactly one"),
    ("gives_tokens", NoTokens(), "gave Tensor"),
    ("process_untouched", Elsewhere(), "encode changes the current folder"),
    ("copies_agree", ById(), "which object it is given"),
    ("memory_own", View(), "a view of the caller's array"),
    ("fresh_process", Grows(), "which values came before"),
    ("nothing_lost", Deaf(), "the same 5 tokens"),
    ("causal_prefix", KnowsAll(), "tokens know the whole value"),
    ("text_as_declared", Listed(), "decode gives list"),
    ("length_as_declared", Seven(), "no value has the 7 tokens"),
    ("picture_tiles", Raises(), "picture fails"),
    ("embed_any_numbers", Roots(), "NaN or infinity"),
    ("decode_gives_value", Halves(), "comes back from decode"),
    ("one_place_a_token", LosesPlace(), r"5 tokens have places \(4, 3\)"),
    ("content_as_declared", Double(), "float64"),
    ("content_as_declared", IdsTooLarge(), r"outside 0\.\.99"),
    ("finite", Infinite(), "not finite"),
    ("deterministic", Draws(), "the next time"),
    ("values_differ", Deaf(), "values 0 and 1"),
    ("places_differ", Heap(), "5 tokens of .* at 1 places"),
    ("time_from_zero", Early(), "at time -1"),
    ("time_from_zero", Backwards(), "order of time"),
    ("step_fits_places", Milliseconds(), "1e\\+03 steps apart"),
    ("input_untouched", InPlace(), "before encoding"),
    ("generators_untouched", Seeds(), r"generator of numpy\.random;"),
    ("plain_tensors", Learned(), "requires a gradient"),
    ("worker_process", OtherInWorker(), "in a worker process"),
    ("worker_process", DiesInWorker(), "open elsewhere"),
    ("wrong_type_refused", TakesAll(), "object .* without complaint"),
    ("wrong_type_refused", Nameless(), "does not name Nameless"),
    ("empty_refused", Fills(), "str '' was encoded without complaint"),
    ("too_long_refused", Cuts(), "max_tokens=4 let .* of 5 tokens pass"),
    ("too_long_refused", Unlimited(), "max_tokens=4 let .* of 5 tokens pass"),
    ("decode_inverts_encode", Lowers(), "comes back from decode as str 'what. e'"),
    ("decode_inverts_encode", Halves(), "comes back from decode"),
    ("decode_takes_anything", Strict(), "UnicodeDecodeError"),
    ("decode_takes_anything", NeverEmpty(), r"the ids \[\]: IndexError"),
    ("places_agree", PlacesFromOne(), r"places\(8\)"),
    ("embed_rows", Pools(), r"\(1, 48\), wanted \(5, 48\)"),
    ("embed_by_token", Centres(), "differ by"),
    ("embed_learns", Idle(), "no gradient reaches unused"),
    ("pickled", Rebuilt(scale=2.0), r"Rebuilt\(scale=1.0\), not"),
    ("pickled", Closure(), "pickle"),
    ("config_round_trip", Forgets(scale=2.0), "came back from JSON"),
    ("config_round_trip", NotJson(), "not JSON serializable"),
    ("packed_is_alone", Centres(), "packed and alone"),
    ("packed_is_alone", CentresIds(), "packed and alone"),
    ("order_of_pack", Numbers(), "turned round"),
    ("neighbour_unseen", CentresQuietly(), "sees what is in its neighbours"),
    ("neighbour_unseen", CentresIds(), "sees what is in its neighbours"),
    ("neighbour_unseen", Normalises(), "sees what is in its neighbours"),
    ("neighbour_gradient", Centres(), "by its neighbours' value"),
    ("neighbour_gradient", Normalises(), "by its neighbours' value"),
    ("neighbour_gradient", Silent(), "no gradient by its own content"),
    ("save_load", Counts(), "other logits"),
    ("extends_trained_model", Counts(), "other logits"),
    ("trains", Silent(), "the loss went from"),
]


def _one(checks, name):
    return next(check for check in checks if str(check) == name)


@pytest.mark.parametrize(
    ("name", "faulty", "problem"), FAULTS, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_planted_fault_is_named(name, faulty, problem):
    values = words if isinstance(faulty, TextBytes) else waves
    with pytest.raises(ConformanceError, match=f"{name}: .*{problem}"):
        _one(tokenizer_checks(faulty, values()), name)()


def test_without_a_fault_the_same_values_pass():
    assert not check_tokenizer(Wave(scale=2.0), waves()).failed
    assert not check_tokenizer(TextBytes(), words()).failed


def test_there_is_a_fault_for_every_check():
    planted = {name for _, _, name, _ in PLANTED}
    assert {name for name, *_ in FAULTS} | planted == {check.name for check in TOKENIZER_CHECKS}
    assert {name for name, *_ in HEAD_FAULTS} == {check.name for check in HEAD_CHECKS}
    assert len(TOKENIZER_CHECKS) >= 15


class Narrow(mm.Classify):
    def logits(self, readout, state_ND, lengths):
        return super().logits(readout, state_ND, lengths)[:, :-1]


class Mean(mm.Classify):
    def loss(self, logits, lengths, target, target_lengths):
        return super().loss(logits, lengths, target, target_lengths) / len(target)


class IdleReadout(mm.Classify):
    def readout(self, width, tokenizer):
        readout = super().readout(width, tokenizer)
        readout.unused = nn.Parameter(torch.zeros(width))
        return readout


class FirstOnly(mm.Classify):
    def answer(self, logits, lengths, tokenizer):
        return super().answer(logits, lengths, tokenizer)[:1]


class Overconfident(mm.Classify):
    def answer(self, logits, lengths, tokenizer):
        return [mm.Prediction(a.value, a.confidence * 100) for a in super().answer(logits, lengths, tokenizer)]


class Jealous(mm.Classify):
    """Answers differently in company."""

    def answer(self, logits, lengths, tokenizer):
        return super().answer(logits if len(logits) == 1 else -logits, lengths, tokenizer)


class WritesNothing(mm.Classify):
    def vocab(self, tokenizer):
        return tokenizer.vocab_size or 7


class AnyError(mm.Classify):
    def vocab(self, tokenizer):
        return int(tokenizer.vocab_size or tokenizer.feature_size)


class CentresLogits(mm.Classify):
    def logits(self, readout, state_ND, lengths):
        logits = super().logits(readout, state_ND, lengths)
        return logits - logits.mean(0)


class NumbersLogits(mm.Classify):
    def logits(self, readout, state_ND, lengths):
        return super().logits(readout, state_ND, lengths) + torch.arange(len(state_ND))[:, None]


class CountsReadout(mm.Classify):
    def readout(self, width, tokenizer):
        readout = super().readout(width, tokenizer)
        readout.scale = float(next(_made))
        return readout

    def logits(self, readout: Readout, state_ND, lengths):
        return super().logits(readout, state_ND, lengths) * readout.scale


class NoLoss(mm.Classify):
    def loss(self, logits, lengths, target, target_lengths):
        return super().loss(logits, lengths, target, target_lengths) * 0


class RebuiltHead(mm.Classify):
    def __reduce__(self):
        return type(self), ()


class ForgetsHead(mm.Classify):
    def config(self):
        return {}


HEAD_FAULTS = [
    ("logits_shape", Narrow(), r"\(2, 2\), wanted \(2, 3\)"),
    ("loss_is_a_sum", Mean(), "differ by"),
    ("readout_learns", IdleReadout(), "no gradient reaches unused"),
    ("one_answer_a_sample", FirstOnly(), ""),
    ("one_answer_a_sample", Overconfident(), "confidence is"),
    ("one_answer_a_sample", Jealous(), "beside others the answer is"),
    ("unwritable_refused", WritesNothing(), "was taken"),
    ("unwritable_refused", AnyError(), "TypeError"),
    ("pickled", RebuiltHead(label_smoothing=0.1), "the copy is"),
    ("config_round_trip", ForgetsHead(label_smoothing=0.1), "came back from JSON"),
    ("packed_is_alone", CentresLogits(), "packed and alone"),
    ("order_of_pack", NumbersLogits(), "turned round"),
    ("neighbour_unseen", CentresLogits(), "sees what is in its neighbours"),
    ("neighbour_gradient", CentresLogits(), "by its neighbours' signal"),
    ("save_load", CountsReadout(), "other logits"),
    ("extends_trained_model", CountsReadout(), "other logits"),
    ("trains", NoLoss(), "the loss went from 0 to 0"),
]


@pytest.mark.parametrize(
    ("name", "faulty", "problem"), HEAD_FAULTS, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_planted_fault_of_a_head_is_named(name, faulty, problem):
    with pytest.raises(ConformanceError, match=f"{name}: .*{problem}"):
        _one(head_checks(faulty, Labels(("cat", "dog", "cow")), ["cat", "dog"]), name)()


def test_the_error_and_the_table_list_every_failed_check():
    class Twice(PlacesFromOne, Strict):
        pass

    with pytest.raises(ConformanceError, match=rf"fails 5 of {COUNT} checks:\n  .*(\n  .*){{4}}$") as error:
        check_tokenizer(Twice(), words())
    for name in (
        "decode_takes_anything",
        "places_agree",
        "text_grows",
        "names_for_tokens",
        "pickled",
    ):  # a class within a function cannot be pickled
        assert f"\n  {name}: " in str(error.value)
    report = check_tokenizer(PlacesFromOne(), words(), raises=False)
    assert [result.name for result in report.failed] == ["places_agree"]
    assert "  FAILED   places_agree" in str(report)
    assert str(report).endswith(f"{COUNT} checks: {COUNT - 2} ok, 1 FAILED, 1 skipped")
    assert all(result.says in str(report) for result in report)


def test_checks_that_need_unbroken_tokens_are_skipped():
    report = check_tokenizer(LosesPlace(), waves(), raises=False)
    assert [result.name for result in report.failed] == ["one_place_a_token"]
    later = [result for result in report if result.name == "trains"]
    assert [(r.status, r.detail) for r in later] == [("skipped", "needs one_place_a_token")]


def test_a_known_failure_has_a_reason_and_must_fail():
    reasons = {"places_agree": "written by another head"}
    report = check_tokenizer(PlacesFromOne(), words(), expected_failures=reasons)
    assert next(r for r in report if r.name == "places_agree").detail == "written by another head"
    assert f"{COUNT - 2} ok, 1 skipped, 1 expected failure" in str(report)
    with pytest.raises(unittest.SkipTest, match="expected failure: written by another head"):
        _one(tokenizer_checks(PlacesFromOne(), words(), expected_failures=reasons), "places_agree")()
    with pytest.raises(ConformanceError, match="places_agree: passes, but is listed"):
        check_tokenizer(TextBytes(), words(), expected_failures=reasons)
    with pytest.raises(mm.ConfigError, match=r"no check 'places_agre'.*did you mean 'places_agree'"):
        check_tokenizer(TextBytes(), words(), expected_failures={"places_agre": "?"})


class ReadOnly(Wave):
    """Read, but not written."""

    decode = mm.Tokenizer.decode


def test_what_cannot_be_tried_says_why():
    report = check_tokenizer(ReadOnly(), waves())
    skipped = {r.name: r.detail for r in report if r.status == "skipped"}
    assert set(skipped) == {
        *("decode_inverts_encode", "decode_gives_value"),
        *("decode_takes_anything", "places_agree", "places_grow", "text_grows"),
        *("wanted_as_decoded", "written_fits", "file_holds_value"),
    }
    assert "no decode" in skipped["places_agree"]


def test_bad_calls():
    with pytest.raises(mm.ConfigError, match="not a Tokenizer made by its constructor"):
        check_tokenizer(TextBytes, words())
    with pytest.raises(mm.ConfigError, match="1 values came; give two or more"):
        check_tokenizer(TextBytes(), ["one"])
    with pytest.raises(ConformanceError, match="values 0 and 1 give the same tokens"):
        check_tokenizer(TextBytes(), ["one", "one"])


def test_checks_leave_the_generators_alone():
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    check_head(*HEADS[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == pickle.dumps(np.random.get_state())

"""Rules of choice: each against its formula, against brute force, and by the frequencies of what is drawn."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor

import multimodal as mm
from multimodal.declare import declaration, rebuild
from multimodal.generate.next_token import draw_tokens
from multimodal.generate.request import Options, Request
from multimodal.generate.samplers import Then, Written
from multimodal.shapes import ConfigError, StreamError
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import TextBPE, TextBytes

NEVER = -math.inf
WORDS = ("yes", "yesterday", "no", "nobody", "Übung")


@dataclass(frozen=True)
class Letters(mm.Tokenizer):
    """a, b and c, so that everything can be tried."""

    causal: bool = False
    text = True
    vocab_size = 3

    def encode(self, value: str) -> Tokens:
        return Tokens(torch.tensor(["abc".index(letter) for letter in value]), self.places(len(value)))

    def decode(self, tokens: Tokens) -> str:
        return "".join("abc"[i] for i in tokens.content.tolist())


BPE = TextBPE.train([" ".join(WORDS[:4])] * 5, vocab_size=270)


def row(*logits: float) -> Tensor:
    return torch.tensor([logits])


def probable(*p: float) -> Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


def so_far(ids: Sequence[int], tokenizer: mm.Tokenizer | None = None, stop: int = 3) -> Written:
    tokenizer = tokenizer or Letters()
    return Written(list(ids), tokenizer, stop)


def support(sampler: mm.generate.Sampler, logits_BV: Tensor, written: Written | None = None) -> set[int]:
    """What is left of the one row; whatever is left must keep its logit where the rule only rules out."""
    (out_V,) = sampler(logits_BV, [written or so_far([])])
    return {i for i, x in enumerate(out_V.tolist()) if x != NEVER}


@pytest.mark.parametrize("seed", range(5))
def test_greedy_keeps_the_first_likeliest_alone(seed):
    logits_BV = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
    logits_BV[0, 2] = logits_BV[0, 5] = 9.0
    out_BV = mm.generate.Greedy()(logits_BV, [])
    for before, after in zip(logits_BV.tolist(), out_BV.tolist(), strict=True):
        best = before.index(max(before))
        assert after == [x if i == best else NEVER for i, x in enumerate(before)]
    assert out_BV[0, 2] == 9.0  # the first of equals


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_is_p_to_the_power_of_its_inverse(temperature):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    out = mm.Temperature(temperature)(p.log()[None], []).softmax(-1)[0]
    expected = p ** (1 / temperature)
    torch.testing.assert_close(out, expected / expected.sum())


def test_entropy_grows_with_the_temperature():
    logits_BV = torch.randn(4, 9)
    entropies = []
    for temperature in (0.1, 0.5, 1.0, 2.0, 10.0):
        p = mm.Temperature(temperature)(logits_BV, []).softmax(-1)
        entropies.append(torch.special.entr(p).sum(-1))
    assert (torch.stack(entropies).diff(dim=0) > 0).all()
    assert torch.equal(mm.Temperature(0.0)(logits_BV, []), mm.generate.Greedy()(logits_BV, []))


def test_top_k_keeps_the_k_likeliest_and_of_equals_the_first():
    logits = row(0.0, 3.0, 1.0, 3.0, 2.0, 1.0)
    assert [support(mm.TopK(k), logits) for k in (1, 2, 3, 4, 5, 6, 99)] == [
        {1},
        {1, 3},
        {1, 3, 4},
        {1, 2, 3, 4},  # the first of the two 1.0
        {1, 2, 3, 4, 5},
        set(range(6)),
        set(range(6)),
    ]
    out = mm.TopK(3)(logits, [])
    assert out[0, [1, 3, 4]].tolist() == [3.0, 3.0, 2.0]


def smallest_set(p: Sequence[float], wanted: float) -> int:
    """By trying every set: how many tokens the smallest that holds `wanted` has."""
    for size in range(1, len(p) + 1):
        if any(math.fsum(chosen) >= wanted for chosen in itertools.combinations(p, size)):
            return size
    return len(p)


@pytest.mark.parametrize("wanted", [0.01, 0.3, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(4))
def test_top_p_keeps_the_smallest_set_that_holds_p(wanted, seed):
    logits_BV = 2 * torch.randn(1, 7, generator=torch.Generator().manual_seed(seed))
    p = logits_BV.double().softmax(-1)[0].tolist()
    kept = support(mm.TopP(wanted), logits_BV)
    assert len(kept) == smallest_set(p, wanted)
    assert math.fsum(p[i] for i in kept) >= wanted
    assert min(p[i] for i in kept) >= max([p[i] for i in range(7) if i not in kept], default=0.0)
    out = mm.TopP(wanted)(logits_BV, [])
    assert all(out[0, i] == logits_BV[0, i] for i in kept)


def test_top_p_with_equals_at_its_border_and_at_its_ends():
    equal = probable(0.25, 0.25, 0.25, 0.25)
    assert support(mm.TopP(0.5), equal) == {0, 1}  # exactly half: no third
    assert support(mm.TopP(0.51), equal) == {0, 1, 2}
    assert support(mm.TopP(0.2), equal) == {0}
    assert support(mm.TopP(1.0), probable(0.6, 0.3, 0.1 - 1e-9, 1e-9)) == {0, 1, 2, 3}
    assert support(mm.TopP(1e-9), probable(0.2, 0.5, 0.3)) == {1}
    assert support(mm.TopP(1.0), torch.cat([equal, torch.full((1, 1), NEVER)], 1)) == {0, 1, 2, 3}


def test_top_p_applies_its_temperature_first_and_min_p_afterwards():
    logits = probable(0.5, 0.3, 0.15, 0.05)
    torch.testing.assert_close(
        mm.TopP(0.79, temperature=3.0)(logits, []), (mm.Temperature(3.0) | mm.TopP(0.79))(logits, [])
    )
    assert support(mm.TopP(0.79, temperature=3.0), logits) == {0, 1, 2}  # flat: two no longer hold 0.79
    assert support(mm.TopP(0.79), logits) == {0, 1}
    torch.testing.assert_close(
        mm.generate.MinP(0.4, temperature=3.0)(logits, []), (mm.generate.MinP(0.4) | mm.Temperature(3.0))(logits, [])
    )
    assert support(mm.generate.MinP(0.4, temperature=3.0), logits) == {0, 1}
    # the other order is another rule
    assert support(mm.Temperature(3.0) | mm.generate.MinP(0.4), logits) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, {0, 1, 2, 3}), (0.09, {0, 1, 2, 3}), (0.11, {0, 1, 2}), (0.59, {0, 1}), (1.0, {0})]
)
def test_min_p_keeps_what_is_at_least_p_times_the_likeliest(p, kept):
    assert support(mm.generate.MinP(p), probable(0.5, 0.3, 0.15, 0.05)) == kept
    assert support(mm.generate.MinP(p), probable(0.5, 0.3, 0.15, 0.05) + 7.0) == kept  # wherever the zero lies


@pytest.mark.parametrize("last", [0, 2, 4, 64])
def test_repetition_takes_nats_off_what_was_written(last):
    ids = [0, 0, 2, 1, 2]
    logits = torch.randn(2, 4)
    out = mm.generate.Repetition(1.5, each=0.25, last=last)(logits, [so_far(ids), so_far([])])
    window = ids[len(ids) - min(last or len(ids), len(ids)) :]
    for token in range(4):
        times = window.count(token)
        assert float(out[0, token]) == pytest.approx(float(logits[0, token]) - (1.5 + 0.25 * times) * (times > 0))
    assert torch.equal(out[1], logits[1])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_is_written_twice_and_nothing_else_is_ruled_out(size):
    """Brute force over all texts of up to five tokens."""
    for ids in itertools.chain.from_iterable(itertools.product(range(3), repeat=n) for n in range(6)):
        allowed = set()
        for token in range(3):
            longer = [*ids, token]
            runs = [tuple(longer[i : i + size]) for i in range(len(longer) - size + 1)]
            if runs[-1:] == [] or runs[-1] not in runs[:-1]:
                allowed.add(token)
        assert support(mm.NoRepeat(size), torch.zeros(1, 4), so_far(ids)) == allowed | {3}


def test_at_least_keeps_the_stop_away():
    for count in range(5):
        expected = {0, 1, 2} if count < 3 else {0, 1, 2, 3}
        assert support(mm.generate.AtLeast(3), torch.zeros(1, 4), so_far([0] * count)) == expected


def reachable(
    sampler: mm.generate.Sampler, tokenizer: mm.Tokenizer, longest: int
) -> tuple[set[str], set[tuple[int, ...]]]:
    """All answers of up to so many tokens that a rule allows, by following every choice; and beginnings that lead nowhere."""
    assert tokenizer.vocab_size is not None
    whole, stuck = set(), set()
    open_: list[tuple[int, ...]] = [()]
    while open_:
        ids = open_.pop()
        allowed = support(
            sampler, torch.zeros(1, tokenizer.vocab_size + 1), so_far(ids, tokenizer, tokenizer.vocab_size)
        )
        if not allowed:
            stuck.add(ids)
        for token in allowed:
            if token == tokenizer.vocab_size:
                whole.add(ids)
            elif len(ids) < longest:
                open_.append((*ids, token))
    texts = {tokenizer.decode(Tokens(torch.tensor(ids, dtype=torch.long), tokenizer.places(len(ids)))) for ids in whole}
    assert len(texts) == len(whole)
    return texts, stuck


@pytest.mark.parametrize("tokenizer", [TextBytes(), BPE], ids=["bytes", "bpe"])
def test_one_of_allows_its_values_and_nothing_else(tokenizer):
    texts, stuck = reachable(mm.generate.OneOf(WORDS), tokenizer, 20)
    assert texts == set(WORDS)  # "yes" is a beginning of "yesterday", and "no" of "nobody"
    assert not stuck


@pytest.mark.parametrize("tokenizer", [TextBytes(), BPE], ids=["bytes", "bpe"])
def test_only_allows_every_row_of_words_and_nothing_else(tokenizer):
    words = ("no", "nobody", "yes") if tokenizer is BPE else ("no", "nob", "yes")
    longest = 7
    texts, stuck = reachable(mm.generate.Only(words), tokenizer, longest)
    expected = {
        text
        for count in range(1, longest + 1)
        for text in map(" ".join, itertools.product(words, repeat=count))
        if len(tokenizer(text)) <= longest
    }
    assert not stuck
    assert texts == expected
    assert len(texts) > 8


def test_the_pieces_of_the_bpe_cases_are_what_they_are_meant_to_be():
    """Words of one piece and of several, another first piece after a blank, and a word with two bytes for a letter."""
    lengths = {word: (len(BPE(word)), len(BPE(" " + word))) for word in WORDS}
    assert {n for pair in lengths.values() for n in pair} >= {1, 2, 3}
    assert any(BPE(" " + w).content.tolist()[1:] != BPE(w).content.tolist() for w in WORDS)
    assert len(BPE("Übung")) > 5


def test_a_value_that_was_left_has_no_way_on():
    assert support(mm.generate.OneOf(("ab",)), torch.zeros(1, 4), so_far([1])) == set()
    assert support(mm.generate.OneOf(("ab",)), torch.zeros(1, 4), so_far([0, 1])) == {3}
    assert support(mm.generate.Only(("xy",)), torch.zeros(1, 257), so_far(b"xz", TextBytes(), 256)) == set()


def test_what_is_forbidden_is_ruled_out_and_some_at_the_beginning_only():
    rule = mm.generate.Forbid((1,), first=(0, 3))
    for ids, allowed in (([], {2}), ([2], {0, 2, 3}), ([2, 0], {0, 2, 3})):
        assert support(rule, torch.zeros(1, 4), so_far(ids)) == allowed
    with pytest.raises(mm.ConfigError, match=r"Forbid: first='a' must be ids, whole numbers from 0, in a tuple"):
        mm.generate.Forbid((), first="a")  # type: ignore[arg-type]


def test_a_head_says_which_ids_are_never_written():
    """The likeliest letter is a, then b, then c."""
    tasks = {(): "aa", (0,): "bb"}
    for never, written in tasks.items():
        task = mm.Task("text -> text", mm.NextToken(never=never, never_first=(3,)))
        model = mm.Model({"text": Letters()}, mm.Core(width=16, depth=1, heads=2), [task])
        model.load_state_dict(chooser(BIAS).state_dict())
        assert model.generate("text -> text", text="a", max_tokens=2).value == written
        assert model.generate("text -> text", text="a", max_tokens=2, beams=2).value == written
        assert model.generate("text -> text", text="a", max_tokens=1, sampler=mm.generate.OneOf(("c",))).value == "c"
        for seed in range(20):
            found = model.generate("text -> text", text="a", max_tokens=4, temperature=5.0, seed=seed).value
            assert found
            assert not never or "a" not in found
    with pytest.raises(mm.ConfigError, match=r"never=\(7,\) is not among the ids 0 to 3"):
        mm.Model({"text": Letters()}, mm.Core.tiny(), [mm.Task("text -> text", mm.NextToken(never=(7,)))])


def test_rules_apply_from_left_to_right():
    logits = probable(0.5, 0.3, 0.15, 0.05)
    double = so_far([0])
    assert support(mm.TopK(1) | mm.NoRepeat(1), logits, double) == set()
    assert support(mm.NoRepeat(1) | mm.TopK(1), logits, double) == {1}
    three = mm.NoRepeat(1) | mm.TopK(2) | mm.Temperature(0.5)
    assert three == Then(Then(mm.NoRepeat(1), mm.TopK(2)), mm.Temperature(0.5))
    out = three(logits, [double]).softmax(-1)[0]
    torch.testing.assert_close(out, torch.tensor([0.0, 0.3**2, 0.15**2, 0.0], dtype=torch.float64) / (0.09 + 0.0225))


EVERY = [
    mm.generate.Greedy(),
    mm.Temperature(0.7),
    mm.TopK(2),
    mm.TopP(0.6, 0.9),
    mm.generate.MinP(0.2),
    mm.generate.Repetition(0.5, 0.1, 3),
    mm.NoRepeat(2),
    mm.generate.AtLeast(2),
    mm.generate.Forbid((1,), first=(0,)),
    mm.generate.OneOf(("ab", "c")),
    mm.generate.Only(("ab", "c")),
]


@pytest.mark.parametrize("sampler", EVERY[:-1], ids=lambda s: type(s).__name__)
def test_rows_of_a_batch_do_not_touch_each_other_or_what_came_in(sampler):
    logits_BV = torch.randn(4, 4)
    before = logits_BV.clone()
    written = [so_far(ids) for ids in ([], [0], [0, 1, 0], [2, 2])]
    together = sampler(logits_BV, written)
    assert torch.equal(logits_BV, before)
    for i in range(4):
        assert torch.equal(together[i : i + 1], sampler(logits_BV[i : i + 1], written[i : i + 1]))


@pytest.mark.parametrize(
    "sampler", [*EVERY, mm.TopK(3) | mm.NoRepeat(2) | mm.TopP(0.5)], ids=lambda s: type(s).__name__
)
def test_samplers_go_through_json_and_back(sampler):
    back = rebuild(json.loads(json.dumps(declaration(sampler))))
    assert back == sampler
    assert hash(back) == hash(sampler)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mm.Temperature(-0.5), r"Temperature: temperature=-0\.5 must be 0 or more"),
        (lambda: mm.Temperature(math.nan), "Temperature: temperature=nan must be 0 or more"),
        (lambda: mm.Temperature(math.inf), "Temperature: temperature=inf must be 0 or more"),
        (lambda: mm.TopK(0), "TopK: k=0 leaves no candidate; use 1 or more"),
        (lambda: mm.TopP(0.0), r"TopP: p=0\.0 must be above 0 and at most 1"),
        (lambda: mm.TopP(1.5), r"TopP: p=1\.5 must be above 0 and at most 1"),
        (lambda: mm.TopP(0.5, temperature=-1.0), r"temperature=-1\.0 must be 0 or more"),
        (lambda: mm.generate.MinP(-0.1), r"MinP: p=-0\.1 must be from 0 to 1"),
        (lambda: mm.generate.MinP(0.1, temperature=-1.0), r"temperature=-1\.0 must be 0 or more"),
        (lambda: mm.generate.Repetition(last=-1), r"Repetition: last=-1 must be 0 \(all\) or more"),
        (lambda: mm.NoRepeat(0), "NoRepeat: size=0 must be at least 1"),
        (lambda: mm.generate.OneOf("yes"), "OneOf: values='yes' must be one value or more, in a tuple"),
        (lambda: mm.generate.OneOf(()), r"OneOf: values=\(\) must be one value or more"),
        (lambda: mm.generate.Only(("a b",)), r"Only: words=\('a b',\) must be one word or more, without blanks"),
        (lambda: mm.generate.Only(("",)), r"Only: words=\('',\) must be one word or more"),
        (lambda: mm.generate.Only("yes"), "Only: words='yes' must be one word or more"),
    ],
    ids=range(16),
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def chooser(bias: Sequence[float]) -> mm.Model:
    """A model of a, b, c that says the same every time."""
    model = mm.Model({"text": Letters()}, mm.Core(width=16, depth=1, heads=2), ["text -> text"])
    with torch.no_grad():
        model.readout("text -> text").linear.weight.zero_()
        model.readout("text -> text").linear.bias.copy_(torch.tensor(bias))
    return model.eval()


BIAS = (1.0, 0.2, -0.7, -1.5)


def answer_for(model: mm.Model, **options) -> Request:
    packer = model.packer
    encoded = packer.encoded("text -> text", {"text": "a"}, "x")
    return Request("text -> text", encoded, "x", Options(**options), packer, None)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_formula_says(temperature):
    """Chi-square over 20 000 draws; the seed is fixed, so the test is."""
    logits_V = torch.tensor(BIAS)
    answer = answer_for(chooser(BIAS), temperature=temperature, max_tokens=30_000, seed=3)
    chances_V = answer.options.rule(logits_V[None], [])[0]
    count = Counter()
    for _ in range(20_000):
        answer.take(int(draw_tokens([answer], [1], chances_V[None])), 0.0)
        if answer.ended:
            answer.ended = ""
            count[3] += 1
        else:
            count[answer.ids.pop()] += 1
            answer.detokenizer = None
    weight = [math.exp(x / temperature) for x in BIAS]
    expected = [20_000 * w / sum(weight) for w in weight]
    assert stats.chisquare([count[i] for i in range(4)], expected).pvalue > 0.001


def test_whole_answers_are_drawn_as_often_as_the_formula_says():
    """Through generate: the first token of 300 answers, and how long they are (a geometric law)."""
    model = chooser(BIAS)
    answers = model.generate("text -> text", [{"text": "a"}] * 300, sampler=mm.TopK(3), max_tokens=12, seed=11)
    p = [math.exp(x) for x in BIAS[:3]]
    first = Counter(a.value[:1] for a in answers)
    assert set(first) <= {"a", "b", "c"}
    expected = [300 * x / sum(p) for x in p]
    assert stats.chisquare([first[letter] for letter in "abc"], expected).pvalue > 0.001
    answers = model.generate("text -> text", [{"text": "a"}] * 150, temperature=1.0, max_tokens=150, seed=5)
    stop = math.exp(BIAS[3]) / sum(math.exp(x) for x in BIAS)
    lengths = Counter(min(len(a.value), 6) for a in answers)
    law = [stop * (1 - stop) ** n for n in range(6)]
    expected = [150 * x for x in [*law, 1 - sum(law)]]
    assert stats.chisquare([lengths[n] for n in range(7)], expected).pvalue > 0.001
    assert all(a.complete for a in answers)


def test_what_was_ruled_out_is_never_drawn_and_the_confidence_is_the_models_own():
    model = chooser(BIAS)
    p = torch.tensor(BIAS).softmax(-1).tolist()
    answers = model.generate(
        "text -> text",
        [{"text": "a"}] * 100,
        sampler=mm.generate.AtLeast(2) | mm.TopK(2) | mm.Temperature(5.0),
        max_tokens=4,
    )
    assert {letter for a in answers for letter in a.value} == {"a", "b"}
    for a in answers:
        assert not a.complete  # TopK(2) never stops
        expected = math.prod(p["abc".index(letter)] for letter in a.value)
        assert a.confidence == pytest.approx(expected, rel=1e-4)


def test_the_smallest_random_number_draws_nothing_that_was_ruled_out(monkeypatch):
    answer = answer_for(chooser(BIAS), temperature=1.0)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.zeros((), dtype=torch.float64))
    assert draw_tokens([answer], [1], torch.tensor([[NEVER, NEVER, 0.0, 1.0]])).tolist() == [2]


def test_a_small_temperature_is_greedy():
    model = chooser((0.0, 1e-3, 0.0, -1.0))
    greedy = model.generate("text -> text", text="a", max_tokens=5)
    assert greedy.value == "bbbbb"
    assert model.generate("text -> text", text="a", max_tokens=5, temperature=1e-6, seed=9).value == "bbbbb"
    assert model.generate("text -> text", text="a", max_tokens=5, temperature=0.0).value == "bbbbb"


def test_a_rule_that_leaves_nothing_names_the_sample_and_itself():
    model = chooser(BIAS)
    samples = [{"text": "a"}, {"text": "b"}]
    with pytest.raises(StreamError, match=r"sample 0 of task 'text -> text': TopK\(k=1\) \| NoRepeat\(size=1\) leaves"):
        model.generate("text -> text", samples, sampler=mm.TopK(1) | mm.NoRepeat(1), max_tokens=5)
    with pytest.raises(StreamError, match="leaves no candidate after 3 tokens; give it a wider choice"):
        model.generate("text -> text", samples, sampler=mm.NoRepeat(1) | mm.generate.AtLeast(9), max_tokens=5)
    with pytest.raises(StreamError, match=r"OneOf\(values=\('ab',\)\) leaves no candidate after 0 tokens"):
        model.generate("text -> text", samples, sampler=mm.generate.OneOf(("ab",)), begin="b")


@pytest.mark.parametrize("beams", [1, 4])
def test_one_of_and_only_hold_through_generate(lively, beams):
    """With beams too, where there are fewer beginnings than beams, and with a begin."""
    model = mm.Model({"text": TextBytes()}, mm.Core(width=32, depth=2, heads=2), ["text -> text"])
    model = lively(model)
    samples = [{"text": text} for text in ("a", "Mond", "wer?")]
    found = model.generate("text -> text", samples, sampler=mm.generate.OneOf(WORDS), beams=beams)
    assert {a.value for a in found} <= set(WORDS)
    assert all(a.complete for a in found)
    if beams > 1:
        assert all(len(a.others) == beams - 1 for a in found)
        assert all({o.value for o in a.others} <= set(WORDS) for a in found)
    begun = model.generate("text -> text", samples, sampler=mm.generate.OneOf(WORDS), beams=beams, begin="n")
    assert {a.value for a in begun} <= {"no", "nobody"}
    for answer in model.generate("text -> text", samples, sampler=mm.generate.Only(WORDS), beams=beams, max_tokens=30):
        *whole, last = answer.value.split(" ")
        assert set(whole) <= set(WORDS)
        assert any(w.encode().startswith(last.replace("\ufffd", "").encode()) for w in WORDS)
        if answer.complete:
            assert last in WORDS


@dataclass(frozen=True)
class Halved(mm.generate.Sampler):
    """Half of every logit; in place, as a stranger may write it."""

    in_place: bool
    draws = True

    def __call__(self, logits_BV, written):
        return logits_BV.div_(2) if self.in_place else logits_BV / 2


def test_a_rule_that_writes_into_what_it_is_given_changes_nothing_else():
    model = mm.Model({"text": TextBytes()}, mm.Core(width=16, depth=1, heads=2), ["text -> text"])
    told = []
    for in_place in (True, False):
        answers = model.generate(
            "text -> text", [{"text": "ab"}, {"text": "c"}], sampler=Halved(in_place), max_tokens=6, seed=3
        )
        told.append([(answer.value, answer.confidence) for answer in answers])
    assert told[0] == told[1]

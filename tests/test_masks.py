"""Mask rules against a plain loop over pairs of tokens."""

import itertools
import json
from dataclasses import dataclass

import pytest
import torch

from multimodal.declare import declaration, rebuild
from multimodal.masks import PREFIX_LM, Causal, MaskInfo, Prefix, Rule, SameSample, SameSegment, Window
from multimodal.shapes import ConfigError

MIXED = [
    [(3, True), (2, False)],  # a picture, then words that are written
    [(4, False)],  # causal only
    [(2, False), (3, True), (1, False)],  # causal words before a picture
    [(1, True)],
    [(2, True), (2, True)],
]


@dataclass(frozen=True)
class Token:
    sample: int
    order: int
    bidirectional: int
    segment: int


def tokens_of(places: MaskInfo) -> list[Token]:
    columns = (places.sample, places.order, places.bidirectional, places.segment)
    return [Token(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


SIMPLE = [
    (SameSample(), lambda q, k: q.sample == k.sample),
    (SameSegment(), lambda q, k: q.sample == k.sample and q.segment == k.segment),
    (Causal(), lambda q, k: k.order <= q.order),
    (Prefix(), lambda q, k: bool(q.bidirectional and k.bidirectional)),
    (Window(1), lambda q, k: q.order == k.order),
    (Window(3), lambda q, k: abs(q.order - k.order) < 3),
]


def matrix(rule: Rule, places: MaskInfo) -> torch.Tensor:
    return rule.allows(places[:, None], places[None, :])


def by_loop(says, places: MaskInfo) -> torch.Tensor:
    tokens = tokens_of(places)
    return torch.tensor([[bool(says(q, k)) for k in tokens] for q in tokens])


@pytest.mark.parametrize(("rule", "says"), SIMPLE, ids=lambda x: str(x) if isinstance(x, Rule) else "")
def test_each_rule_and_its_opposite_match_a_loop(lay, rule, says):
    places = lay(MIXED).info
    expected = by_loop(says, places)
    assert expected.any()
    assert not expected.all()
    assert torch.equal(matrix(rule, places), expected)
    assert torch.equal(matrix(~rule, places), ~expected)


def test_every_pair_of_rules_combines_as_their_words_do(lay):
    places = lay(MIXED).info
    for (a, says_a), (b, says_b) in itertools.product(SIMPLE, repeat=2):
        both = by_loop(lambda q, k, x=says_a, y=says_b: x(q, k) and y(q, k), places)
        either = by_loop(lambda q, k, x=says_a, y=says_b: x(q, k) or y(q, k), places)
        first_only = by_loop(lambda q, k, x=says_a, y=says_b: x(q, k) and not y(q, k), places)
        assert torch.equal(matrix(a & b, places), both), (a, b)
        assert torch.equal(matrix(a | b, places), either), (a, b)
        assert torch.equal(matrix(a & ~b, places), first_only), (a, b)


@pytest.mark.parametrize(
    ("fields", "drawn"),
    [
        ([(3, True)], ["xxx", "xxx", "xxx"]),
        ([(3, False)], ["x..", "xx.", "xxx"]),
        ([(2, True), (2, False)], ["xx..", "xx..", "xxx.", "xxxx"]),
        ([(2, True), (1, True), (1, False)], ["xxx.", "xxx.", "xxx.", "xxxx"]),
        # causal words, then a picture: the words stay blind to it, it sees them and all of itself
        ([(2, False), (2, True)], ["x...", "xx..", "xxxx", "xxxx"]),
        # two pictures around causal words see each other, the words only what came before them
        ([(1, True), (2, False), (1, True)], ["x..x", "xx..", "xxx.", "xxxx"]),
    ],
    ids=["free", "causal", "free then written", "two free fields", "causal then free", "free around causal"],
)
def test_the_default_rule_drawn_by_hand(lay, fields, drawn):
    expected = torch.tensor([[c == "x" for c in row] for row in drawn])
    assert torch.equal(matrix(PREFIX_LM, lay([fields]).info), expected)
    # the same sample between two others: the same picture on the diagonal, nothing beside it
    size = len(drawn)
    packed = matrix(PREFIX_LM, lay([[(2, True)], fields, [(1, False)]]).info)
    assert torch.equal(packed[2 : 2 + size, 2 : 2 + size], expected)
    assert packed[2 : 2 + size].sum() == packed[:, 2 : 2 + size].sum() == expected.sum()


@pytest.mark.parametrize(
    "rule", [PREFIX_LM, SameSample() & Window(7) & ~(Causal() | SameSegment()), Window(2)], ids=str
)
def test_rules_survive_json(lay, rule):
    again = rebuild(json.loads(json.dumps(declaration(rule))))
    assert again == rule
    places = lay(MIXED).info
    assert torch.equal(matrix(again, places), matrix(rule, places))


def test_rules_that_differ_are_not_equal():
    assert SameSample() & Causal() != SameSample() | Causal()
    assert Window(3) != Window(4)


def test_a_window_that_sees_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"Window: size=0 sees nothing, not even itself; use 1 or more"):
        Window(0)

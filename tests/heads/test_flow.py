"""The head that writes features: what it draws against the distribution it was shown, its loss and rows against formulas."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from multimodal.heads.flow import FlowMatching, FlowReadout
from multimodal.shapes import ConfigError, ShapeError, StreamError
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class Walk(Tokenizer):
    """A list of points, one token each."""

    size: int = 2
    count: int | None = None

    @property
    def feature_size(self) -> int:
        return self.size

    @property
    def length(self) -> int | None:
        return self.count

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.tensor(value, dtype=torch.float32), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> list[list[float]]:
        return tokens.content.tolist()


@dataclass(frozen=True)
class ReadOnly(Tokenizer):
    feature_size = 2

    def encode(self, value: Any) -> Tokens:
        raise NotImplementedError


STATE_ND = 4 * torch.eye(8)[[0, 1, 2, 3]]  # what the core says: "class 0", "class 1", "anything", "this is the end"
MEAN = torch.tensor([[2.0, -1.0], [-1.0, 0.5]])
STD = torch.tensor([[0.3, 0.8], [0.5, 0.5]])
WIDE = 1.5
TURN = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # class 0: the second feature follows the first with correlation 0.8


def shown(classes: torch.Tensor) -> torch.Tensor:
    """Class 0 is one Gaussian with correlated features; class 1 is two of them, 1.5 to each side; class 2 is wide."""
    x_NF = torch.randn(len(classes), 2)
    one = MEAN[0] + STD[0] * (x_NF @ TURN.T)
    side = torch.randint(2, (len(classes), 1)) * 2 - 1
    two = MEAN[1] + STD[1] * x_NF + side * torch.tensor([1.5, 0.0])
    return torch.where(classes[:, None] == 0, one, torch.where(classes[:, None] == 1, two, WIDE * x_NF))


def lively(readout: FlowReadout) -> FlowReadout:
    with torch.no_grad():
        for weight in readout.parameters():
            weight += 0.2 * torch.randn(weight.shape)
    return readout


@pytest.fixture(scope="module")
def learned() -> tuple[FlowMatching, FlowReadout]:
    """A flow that saw samples of all classes for some seconds; a value is one token, and then the end."""
    torch.manual_seed(0)
    head = FlowMatching(width=64, depth=2, draws=2, steps=8)
    readout = head.readout(8, Walk())
    assert isinstance(readout, FlowReadout)
    steps = 700
    optimizer = torch.optim.AdamW(readout.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        classes = torch.randint(3, (128,))
        states = torch.stack([STATE_ND[classes], STATE_ND[[3]].expand(128, -1)], 1).flatten(0, 1)
        loss = head.state_loss(readout, states, [2] * 128, shown(classes), [1] * 128) / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head, readout.eval()


@torch.no_grad()
def test_what_is_drawn_has_the_distribution_that_was_shown(learned) -> None:
    head, readout = learned
    for c in (0, 1):
        x_NF, _ = head.draw(readout, STATE_ND[[c]].expand(4000, -1), torch.randn(4000, 2))
        spread = STD[c] if c == 0 else (STD[c] ** 2 + torch.tensor([1.5**2, 0.0])).sqrt()  # variance within and between
        torch.testing.assert_close(x_NF.mean(0), MEAN[c], atol=0.12, rtol=0)
        torch.testing.assert_close(x_NF.std(0), spread, atol=0.0, rtol=0.12)
        correlation = float(torch.corrcoef(x_NF.T)[0, 1])
        assert correlation == pytest.approx((0.8, 0.0)[c], abs=0.08)
        middle = float(((x_NF[:, 0] - MEAN[c, 0]).abs() < 0.5).float().mean())
        wanted = (math.erf(0.5 / 0.3 / 2**0.5), 0.5 * (math.erf(2 / 0.5 / 2**0.5) - math.erf(1 / 0.5 / 2**0.5)))[c]
        assert middle == pytest.approx(wanted, abs=0.06)  # two humps: hardly anything lies between them


@torch.no_grad()
def test_logits_are_means_and_the_stop(learned) -> None:
    head, readout = learned
    logits = head.logits(readout, STATE_ND, [2, 2])
    assert logits.shape == (4, 3)
    torch.testing.assert_close(logits[:3, :2], torch.cat([MEAN, torch.zeros(1, 2)]), atol=0.2, rtol=0)
    assert (logits[:3, 2] < -1).all()
    assert logits[3, 2] > 1
    _, stop_N = head.draw(readout, STATE_ND, torch.randn(4, 2))
    torch.testing.assert_close(stop_N, logits[:, 2])


def guided_covariance(guidance: float) -> torch.Tensor:
    """Of class 0 guided away from "anything", exactly.

    The velocity of a Gaussian with variance v is linear in x, by (t v - (1 - t)) / (t^2 v + (1 - t)^2) along each main axis.
    Its integral over time is log(v) / 2, so a mixture of two velocities multiplies the noise by the same mixture of logs.
    """
    covariance = torch.diag(STD[0]) @ TURN @ TURN.T @ torch.diag(STD[0])
    variance, axes = torch.linalg.eigh(covariance)
    return axes @ torch.diag(variance**guidance * WIDE ** (2 * (1 - guidance))) @ axes.T


@torch.no_grad()
def test_cold_draws_and_guided_draws_spread_less(learned) -> None:
    head, readout = learned
    state, noise = STATE_ND[[0]].expand(2000, -1), torch.randn(2000, 2)
    plain, _ = head.draw(readout, state, noise)
    cold, _ = head.draw(readout, state, noise, temperature=0.5)
    # a Gaussian's flow is linear in the noise
    torch.testing.assert_close(cold.std(0), plain.std(0) / 2, rtol=0.1, atol=0)
    frozen, _ = head.draw(readout, state, noise, temperature=0.0)
    assert (frozen == frozen[0]).all()
    guide = STATE_ND[[2]].expand(2000, -1)
    same, _ = head.draw(readout, state, noise, guide_ND=guide, guidance=1.0)
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    for guidance in (1.5, 2.0):
        sharp, _ = head.draw(readout, state, noise, guide_ND=guide, guidance=guidance)
        torch.testing.assert_close(sharp.T.cov(), guided_covariance(guidance), atol=0.03, rtol=0.15)
        assert sharp.std(0).prod() < 0.8 * plain.std(0).prod()
    back, _ = head.draw(readout, state, noise, guide_ND=guide, guidance=0.0)
    other, _ = head.draw(readout, guide, noise)
    torch.testing.assert_close(back, other)


@torch.no_grad()
def test_a_batch_draws_what_each_draws_alone(learned) -> None:
    head, readout = learned
    states, noise, guide = torch.randn(7, 8), torch.randn(7, 2), torch.randn(7, 8)
    together = head.draw(readout, states, noise, guide_ND=guide, guidance=1.5)
    again = head.draw(readout, states, noise, guide_ND=guide, guidance=1.5)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for i in range(7):
        alone = head.draw(readout, states[[i]], noise[[i]], guide_ND=guide[[i]], guidance=1.5)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[[i]], b, atol=2e-6, rtol=2e-6)


def test_more_steps_change_little(learned) -> None:
    _, readout = learned
    states, noise = STATE_ND[:2].repeat(50, 1), torch.randn(100, 2)
    with torch.no_grad():
        exact, _ = FlowMatching(width=64, depth=2, steps=200).draw(readout, states, noise)
        errors = [
            float((FlowMatching(width=64, depth=2, steps=n).draw(readout, states, noise)[0] - exact).square().mean())
            for n in (4, 8)
        ]
    assert errors[1] < errors[0] / 2
    assert errors[1] ** 0.5 < 0.05


def test_the_loss_is_its_formula() -> None:
    """Draws are counted out by hand: four times a token, evenly spread, and a velocity that is asked one point at a time."""
    head = FlowMatching(width=16, depth=1, draws=4, spread=2.0)
    readout = lively(head.readout(8, Walk(3))).eval()
    lengths, counts = [3, 2], [2, 1]
    states, target = torch.randn(5, 8), torch.randn(3, 3)
    with torch.no_grad():
        got = head.state_loss(readout, states, lengths, target, counts)
    time_N, noise_NF = head._times_and_noises(readout, target, counts)
    assert time_N.shape == (12, 1)
    quarter = (time_N.reshape(4, 3) * 4).long()
    assert torch.equal(quarter, torch.arange(4)[:, None].expand(4, 3))
    total = 0.0
    for draw in range(4):
        for token, row in enumerate([0, 1, 3]):  # rows 2 and 4 are the ends
            x, e, t = target[token] / 2, noise_NF[draw * 3 + token], time_N[draw * 3 + token]
            point = (1 - t) * e + t * x
            v = readout.velocity(point[None], t[None], readout.linear(states[[row]]))[0]
            total += ((v - (x - e)) ** 2).mean().item() / 4
    for row, ended in enumerate([0, 0, 1, 0, 1]):
        p = 1 / (1 + math.exp(-readout.stop(states[row]).item()))
        total -= math.log(p if ended else 1 - p)
    assert float(got) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_features_are_written_at_the_spread_they_have(learned) -> None:
    _, readout = learned
    noise = torch.randn(4, 2)
    plain, wide = (FlowMatching(spread=spread) for spread in (1.0, 3.0))
    drawn, stop_N = plain.draw(readout, STATE_ND, noise)
    again, same_N = wide.draw(readout, STATE_ND, noise)
    torch.testing.assert_close(again, 3 * drawn)
    torch.testing.assert_close(same_N, stop_N)
    torch.testing.assert_close(
        wide.logits(readout, STATE_ND, [4]), plain.logits(readout, STATE_ND, [4]) * torch.tensor([3.0, 3.0, 1.0])
    )


def test_half_precision_changes_little() -> None:
    head = FlowMatching(width=16, depth=1)
    readout = lively(head.readout(8, Walk())).eval()
    states, target = torch.randn(9, 8), torch.randn(8, 2)
    with torch.no_grad():
        exact = head.state_loss(readout, states, [9], target, [8])
        with torch.autocast("cpu", torch.bfloat16):
            rough = head.state_loss(readout, states, [9], target, [8])
            drawn, _ = head.draw(readout, states, torch.randn(9, 2))
    assert rough.dtype == drawn.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


def test_a_fixed_length_has_no_stop() -> None:
    head = FlowMatching(width=16, depth=1)
    tokenizer = Walk(3, count=2)
    readout = lively(head.readout(8, tokenizer))
    assert readout.stop is None
    assert (head.vocab(tokenizer), head.vocab(Walk(3))) == (3, 4)
    states = torch.randn(3, 8)
    assert head.logits(readout, states, [3]).shape == (3, 3)
    _, stop_N = head.draw(readout, states, torch.randn(3, 3))
    assert stop_N.tolist() == [-math.inf] * 3
    states.requires_grad_()
    head.state_loss(readout, states, [3], torch.randn(2, 3), [2]).backward()
    assert states.grad[:2].any(1).all()
    assert not states.grad[2].any()  # nothing follows the last token, and nothing is learned from it
    with pytest.raises(
        StreamError,
        match=r"the answer has 1 tokens, but every written Walk has 2; bring it to that size first",
    ):
        head.target(tokenizer([[1.0, 2.0, 3.0]]), 1, tokenizer)


def test_gradients_reach_states_and_every_weight() -> None:
    head = FlowMatching(width=16, depth=2)
    readout = lively(head.readout(8, Walk()))
    states = torch.randn(4, 8, requires_grad=True)
    head.state_loss(readout, states, [4], torch.randn(3, 2), [3]).backward()
    assert states.grad.any(1).all()
    still = [n for n, p in readout.named_parameters() if n != "query" and (p.grad is None or not p.grad.any())]
    assert still == []  # the query is embedded by the model


def test_evaluation_draws_the_same_noise_and_training_does_not() -> None:
    head = FlowMatching(width=16, depth=1)
    readout = lively(head.readout(8, Walk(20)))
    states, target = torch.randn(9, 8), torch.randn(7, 20)

    def loss(rows: slice = slice(None), lengths=(3, 6), answers: slice = slice(None)) -> float:
        counts = [n - 1 for n in lengths]
        return head.state_loss(readout, states[rows], lengths, target[answers], counts).item()

    assert loss() != loss()
    readout.eval()
    assert loss() == loss()
    parts = loss(slice(3), (3,), slice(2)) + loss(slice(3, None), (6,), slice(2, None))
    assert loss() == pytest.approx(parts, rel=1e-5)


def test_the_target_is_what_is_written() -> None:
    tokenizer = ImagePatches(patch=4, channels=1, size=(8, 8))
    tokens = tokenizer(torch.rand(8, 8))
    target = FlowMatching().target(tokens, 1, tokenizer)
    assert torch.equal(target, tokens.content[:, :16])
    assert FlowMatching().vocab(tokenizer) == 16
    assert FlowMatching().vocab(AudioFrames(mels=8, stack=2)) == 17


def test_rows_and_targets_must_agree() -> None:
    head = FlowMatching(width=16, depth=1)
    with pytest.raises(StreamError, match=r"\[2\] written tokens were read from \[2\] states; one more is wanted"):
        head.state_loss(head.readout(8, Walk()), torch.randn(2, 8), [2], torch.randn(2, 2), [2])
    with pytest.raises(ShapeError, match=r"FlowMatching.draw: noise_NF is \(3, 2\), so N=3, but N=2"):
        head.draw(head.readout(8, Walk()), torch.randn(2, 8), torch.randn(3, 2))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (TextBytes(), r"^FlowMatching writes features, which TextBytes has not: it has no features; use NextToken$"),
        (Labels(("a",), several=True), "which Labels has not: its values are classes; use Classify$"),
        (Labels(("a",)), "which Labels has not: its values are classes; use Classify$"),
        (ReadOnly(), r"^FlowMatching: ReadOnly has no decode, so what is written could not be read$"),
        (
            ImagePatches(),
            r"^FlowMatching cannot write it: ImagePatches: to write pictures, give it size=\(rows, columns\)",
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_kinds_that_it_cannot_write(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowMatching().vocab(tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"draws": 0}, "draws=0 must be at least 1"),
        ({"width": 17}, "width=17 is odd; try width=18"),
        ({"spread": 0.0}, "spread=0.0 must be more than 0"),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^FlowMatching: {message}$"):
        FlowMatching(**settings)


def test_what_needs_states_says_so() -> None:
    with pytest.raises(ConfigError, match="use state_loss"):
        FlowMatching().loss(torch.zeros(1, 2), [1], torch.zeros(1, 2), [1])
    with pytest.raises(ConfigError, match=r"use Model\.generate"):
        FlowMatching().answer(torch.zeros(1, 2), [1], Walk())

"""Ready-made features: conformance, values computed by hand or by another library, and what is refused."""

import numpy as np
import pytest
import torch

from multimodal import ConfigError, MediaError
from multimodal.check import tokenizer_checks
from multimodal.check.values import plausible_values
from multimodal_tokenizers.features import Features

RANDOM = np.random.default_rng(0)
FRAMES = [(RANDOM.standard_normal((n, 3)) * [1, 5, 0.1] + [0, 2, -1]).astype(np.float32) for n in (12, 17, 8, 12)]
KINDS = [
    Features(3),
    Features(3, stack=4, normalise="none"),
    Features(3, step_s=0.02, stack=3, context=2, deltas=1),
    Features(3, stack=2, context=5, deltas=2, hidden=16),
]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, tokenizer in enumerate(KINDS)
        for check in tokenizer_checks(tokenizer, FRAMES)
    ],
)
def test_conformance(check):
    check()


def test_examples_are_values():
    assert len(plausible_values(Features(5, stack=2, context=1))) == 4


def test_a_token_is_its_frames_and_their_neighbours():
    frames = np.arange(14, dtype=np.float32).reshape(7, 2)  # the frame t is (2t, 2t + 1)
    tokens = Features(2, stack=3, context=1, normalise="none").encode(frames)
    seen = [[0, 0, 1, 2, 3], [2, 3, 4, 5, 6], [5, 6, 6, 6, 6]]  # the ends are repeated, also to fill the last token
    assert tokens.content[:, ::2].tolist() == [[2 * t for t in row] for row in seen]
    assert tokens.content[:, 1::2].tolist() == [[2 * t + 1 for t in row] for row in seen]


def test_places_are_seconds():
    tokenizer = Features(3, step_s=0.02, stack=5, context=2)
    tokens = tokenizer.encode(FRAMES[0])
    assert torch.allclose(tokens.position_NA, torch.tensor([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]]))
    assert tokenizer.step == pytest.approx((0.1, 1, 1))


def test_deltas_are_numpy_gradients_inside():
    rows = Features(3, deltas=2, normalise="none").encode(FRAMES[0]).content.numpy()
    first = np.gradient(FRAMES[0], axis=0)
    assert np.allclose(rows[:, :3], FRAMES[0])
    assert np.allclose(rows[1:-1, 3:6], first[1:-1], atol=1e-6)
    assert np.allclose(rows[2:-2, 6:], np.gradient(first, axis=0)[2:-2], atol=1e-6)


def test_deltas_repeat_the_ends():
    rows = Features(1, deltas=2, normalise="none").encode(np.float32([[0], [2], [8]])).content
    assert rows.tolist() == [[0, 1, 1.5], [2, 4, 1], [8, 3, -0.5]]


def test_each_column_is_normalised_over_the_value():
    tokenizer = Features(3, deltas=1)
    rows = tokenizer.encode(FRAMES[0]).content
    assert torch.allclose(rows.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(rows.std(0, correction=0), torch.ones(6), atol=1e-5)
    scaled = (FRAMES[0] * [7, 0.01, 300] + [5, -3, 100]).astype(np.float32)  # another microphone
    assert torch.allclose(tokenizer.encode(scaled).content, rows, atol=1e-3)


def test_a_column_that_never_changes_is_zero():
    frames = FRAMES[0].copy()
    frames[:, 1] = 0.1
    rows = Features(3).encode(frames).content
    assert (rows[:, 1] == 0).all()
    assert torch.allclose(rows[:, 0].std(correction=0), torch.tensor(1.0))


@pytest.mark.parametrize(
    "same",
    [
        lambda x: torch.from_numpy(x),
        lambda x: torch.from_numpy(x).double().requires_grad_(),
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, 0)[::2],
    ],
)
def test_the_same_numbers_in_another_form(same):
    tokenizer = Features(3, stack=2)
    assert torch.equal(tokenizer(same(FRAMES[0])).content, tokenizer(FRAMES[0]).content)


def test_integers_and_halves_are_numbers():
    frames = np.arange(12).reshape(4, 3) % 5
    wanted = Features(3)(frames.astype(np.float32)).content
    for other in (frames, frames.astype(np.uint8), frames.astype(np.float16), torch.tensor(frames).bfloat16()):
        assert torch.equal(Features(3)(other).content, wanted)


def test_picture_shows_each_frame_once():
    tokenizer = Features(3, stack=4, context=2, normalise="none")
    picture = tokenizer.picture(tokenizer.encode(FRAMES[0]))
    level = (FRAMES[0] - FRAMES[0].min()) / (FRAMES[0].max() - FRAMES[0].min())
    assert picture.shape == (3, 12, 1)
    assert np.allclose(picture[:, :, 0].flip(0).numpy(), level.T, atol=1e-4)


@pytest.mark.parametrize(("hidden", "layers"), [(None, [(9, 8)]), (16, [(9, 16), (16, 8)])])
def test_hidden_is_the_width_between_two_layers(hidden, layers):
    embed = Features(3, stack=3, hidden=hidden).embed(8)
    linear = [m for m in embed.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == layers
    x, y = torch.randn(2, 5, 9)
    assert torch.allclose(embed(x) + embed(y), embed(x + y) + embed(0 * x), atol=1e-5) == (hidden is None)


def bad(row=2, column=1, value=np.nan):
    frames = FRAMES[0].copy()
    frames[row, column] = value
    return frames


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cepstra.npy", r"wanted an array or tensor \(frames, 3\) of numbers, not str"),
        ([[1.0, 2.0, 3.0]] * 4, "not list"),
        (np.zeros((5, 4), np.float32), r"not ndarray \(5, 4\) float32$"),
        (np.zeros((3, 50), np.float32), r"not ndarray \(3, 50\) float32; turn it round$"),
        (np.zeros(9, np.float32), r"not ndarray \(9,\) float32"),
        (np.zeros((5, 3), bool), "bool"),
        (np.zeros((5, 3), complex), "complex"),
        (torch.zeros(5, 3, dtype=torch.complex64), "complex"),
        (np.zeros((0, 3), np.float32), "has no frames"),
        (np.ones((1, 3), np.float32), "leaves nothing of a single frame"),
        (bad(), "not finite"),
        (bad(value=np.inf), "not finite"),
        (bad().astype(np.float64) * 0 + 1e300, "not finite"),
    ],
)
def test_bad_values_are_refused_by_name(value, message):
    with pytest.raises(MediaError, match=f"^Features.encode: .*{message}"):
        Features(3)(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features=0 must be at least 1"),
        ({"stack": 0}, "stack=0"),
        ({"context": -1}, "context=-1 must be at least 0"),
        ({"hidden": 0}, "hidden=0"),
        ({"deltas": 3}, "deltas=3 must be 0, 1 or 2"),
        ({"step_s": 0.0}, "step_s=0.0 must be more than 0 seconds"),
        ({"normalise": "clip"}, "normalise='clip' must be 'value' or 'none'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=f"^Features: {message}"):
        Features(**{"features": 3, **settings})

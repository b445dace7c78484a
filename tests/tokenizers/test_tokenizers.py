"""The contract of `Tokenizer`, and the kinds that come with the framework, against formulas and other libraries."""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from multimodal.check import check_tokenizer
from multimodal.declare import declaration, rebuild
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.tokenizer import Places, Tokenizer, Tokens, at_times, describe
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBPE, TextBytes

TEXTS = [
    "the cat sat on the mat",
    "a cat and a hat, that is that",
    "grüße aus köln 🙂 🙂",
    "the theme of the thesis",
] * 5


# The contract


@dataclass(frozen=True)
class Ids(Tokenizer):
    """Gives back whatever it is told to, as a careless stranger's might."""

    vocab_size = 10

    def encode(self, value: Any) -> Tokens:
        if isinstance(value, Exception):
            raise value
        return value


@dataclass(frozen=True)
class Rows(Ids):
    vocab_size = None
    feature_size = 4


@dataclass(frozen=True)
class Neither(Ids):
    vocab_size = None


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


BROKEN = [
    (Ids, Tokens(ids(), torch.zeros(0, 3)), r"gave no tokens; to leave a field out of a sample, give None"),
    (
        Ids,
        Tokens(torch.zeros(65537, dtype=torch.int64), torch.zeros(65537, 3)),
        "gave 65537 tokens, more than max_tokens=65536; shorten or shrink it first",
    ),
    (
        Ids,
        Tokens(ids(1, 2), torch.zeros(2, 2)),
        r"position is torch.float32 \(2, 2\), wanted float32 \(2, 3\): time, row, column",
    ),
    (Ids, Tokens(ids(1, 2), torch.zeros(3, 3)), r"position is torch.float32 \(3, 3\), wanted float32 \(2, 3\)"),
    (Ids, Tokens(ids(1), torch.zeros(1, 3).double()), r"position is torch.float64 \(1, 3\), wanted float32 \(1, 3\)"),
    (Ids, Tokens(ids(1), torch.zeros(1, 3).long()), r"position is torch.int64 \(1, 3\), wanted float32"),
    (Ids, Tokens(ids(1), torch.full((1, 3), torch.nan)), "gave positions that are not finite"),
    (Ids, Tokens(ids(1).int(), torch.zeros(1, 3)), r"content is torch.int32 \(1,\), wanted ids: int64 \(N,\)"),
    (Ids, Tokens(torch.ones(1), torch.zeros(1, 3)), r"content is torch.float32 \(1,\), wanted ids"),
    (Ids, Tokens(ids(1)[None], torch.zeros(1, 3)), r"content is torch.int64 \(1, 1\), wanted ids"),
    (Ids, Tokens(ids(3, 10), torch.zeros(2, 3)), r"ids run from 3 to 10, outside 0\.\.9"),
    (Ids, Tokens(ids(-1, 9), torch.zeros(2, 3)), r"ids run from -1 to 9, outside 0\.\.9"),
    (Ids, Tokens([1], torch.zeros(1, 3)), r"content is list \(int 1\), wanted a tensor with a row for each token"),  # type: ignore[arg-type]
    (Ids, Tokens(ids(1), np.zeros((1, 3))), r"position is ndarray \(1, 3\) float64, wanted a tensor"),  # type: ignore[arg-type]
    (
        Ids,
        Tokens(torch.tensor(1), torch.zeros(1, 3)),
        r"content is Tensor \(\) torch.int64, wanted a tensor with a row",
    ),
    (Ids, None, r"gave NoneType None, wanted Tokens\(content, position\)"),
    (Ids, KeyError("speed"), r"cannot read KeyError KeyError\('speed'\): KeyError: 'speed'"),
    (Ids, ValueError("no digits"), r"cannot read .*: ValueError: no digits"),
    (Ids, RuntimeError("out of order"), "RuntimeError: out of order"),
    (
        Rows,
        Tokens(torch.zeros(2, 3), torch.zeros(2, 3)),
        r"content is torch.float32 \(2, 3\), wanted features: float32 \(N, 4\)",
    ),
    (
        Rows,
        Tokens(torch.zeros(2, 4).double(), torch.zeros(2, 3)),
        r"content is torch.float64 \(2, 4\), wanted features",
    ),
    (Rows, Tokens(torch.zeros(2), torch.zeros(2, 3)), r"content is torch.float32 \(2,\), wanted features"),
    (
        Rows,
        Tokens(torch.full((2, 4), torch.nan), torch.zeros(2, 3)),
        r"gave features that are not finite \(NaN or infinity\)",
    ),
    (Rows, Tokens(torch.full((2, 4), torch.inf), torch.zeros(2, 3)), "not finite"),
    (Rows, Tokens(torch.tensor([[3e38, 3e38, 0, torch.nan]]), torch.zeros(1, 3)), "gave features that are not finite"),
    (Rows, Tokens(torch.tensor([[torch.inf, -torch.inf, 0, 0]]), torch.zeros(1, 3)), "features that are not finite"),
    (Rows, Tokens(torch.zeros(1, 4), torch.tensor([[3e38, 3e38, -torch.inf]])), "gave positions that are not finite"),
]


@pytest.mark.parametrize(("kind", "value", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_encode_is_caught_and_named(kind: type[Tokenizer], value: object, message: str) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        kind()(value)
    assert str(raised.value).startswith(f"{kind.__name__}.encode: ")


def test_large_numbers_are_finite_though_their_sum_is_not() -> None:
    large = torch.full((2, 4), torch.finfo(torch.float32).max)
    for sign in (1, -1):
        tokens = Tokens(sign * large, sign * large[:, :3].contiguous())
        assert Rows()(tokens) is tokens
        assert not tokens.content.sum().isfinite()
        assert not tokens.position_NA.sum().isfinite()


def test_own_errors_of_an_encode_pass_unchanged() -> None:
    for error in (MediaError("Ids.encode: too dark"), ConfigError("Ids: no map")):
        with pytest.raises(type(error)) as raised:
            Ids()(error)
        assert raised.value is error


def test_good_tokens_pass_unchanged() -> None:
    for kind, content in ((Ids(), ids(0, 9)), (Rows(), torch.rand(2, 4))):
        tokens = Tokens(content, torch.rand(2, 3))
        assert kind(tokens) is tokens


def test_no_decode_and_no_declared_size() -> None:
    with pytest.raises(ConfigError, match=r"^Ids has no decode: this kind can be read but not written$"):
        Ids().decode(Tokens(ids(1), torch.zeros(1, 3)))
    with pytest.raises(
        ConfigError, match=r"^Neither declares neither vocab_size nor feature_size; it needs one of them$"
    ):
        Neither().embed(8)


def test_default_embeddings() -> None:
    table, linear = Ids().embed(8), Rows().embed(8)
    torch.testing.assert_close(table(ids(7, 7, 1)), F.one_hot(ids(7, 7, 1), 10).float() @ table.weight)
    rows = torch.rand(3, 4)
    torch.testing.assert_close(linear(rows), rows @ linear.weight.T + linear.bias)


def test_describe() -> None:
    assert describe(np.zeros((30, 48), np.uint8)) == "ndarray (30, 48) uint8"
    assert describe("cat.png") == "str 'cat.png'"
    assert describe((1, "a")) == "tuple (int 1, str 'a')"
    assert len(describe("x" * 1000)) < 70


RANDOM = np.random.default_rng(0)
KINDS: list[tuple[Tokenizer, object]] = [
    (TextBytes(causal=True), "grüße 🙂"),
    (TextBPE.train(TEXTS, vocab_size=280), "grüße 🙂 the cat"),
    (Labels(("cat", "dog")), "dog"),
    (Labels(("cat", "dog"), several=True), ["dog"]),
    (ImagePatches(patch=4, mean=(0.1, 0.2, 0.3), position="learned", max_side=12), RANDOM.random((9, 14, 3))),
    (AudioFrames(rate_hz=8000, mels=8), (RANDOM.random(999, np.float32), 8000)),
    (AudioFrames(rate_hz=8000, mels=8, trim_db=20.0, stem_channels=2), (RANDOM.random(999, np.float32), 8000)),
]


@pytest.mark.parametrize(("tokenizer", "value"), KINDS, ids=range(len(KINDS)))
def test_pickle_and_declaration_give_the_same_tokenizer(tokenizer: Tokenizer, value: object) -> None:
    before = tokenizer(value)
    json_trip = json.loads(json.dumps(declaration(tokenizer)))
    for copy in (pickle.loads(pickle.dumps(tokenizer)), rebuild(json_trip, tokenizer.files())):
        assert copy == tokenizer
        assert copy.step == tokenizer.step
        assert (copy.vocab_size, copy.feature_size) == (tokenizer.vocab_size, tokenizer.feature_size)
        after = copy(value)
        assert torch.equal(after.content, before.content)
        assert torch.equal(after.position_NA, before.position_NA)


@pytest.mark.parametrize(("tokenizer", "value"), KINDS, ids=range(len(KINDS)))
def test_encode_neither_draws_nor_remembers(tokenizer: Tokenizer, value: object) -> None:
    state = torch.get_rng_state()
    before, untouched = tokenizer(value), pickle.dumps(value)
    assert torch.equal(torch.get_rng_state(), state)
    assert pickle.dumps(value) == untouched
    assert torch.equal(tokenizer(value).content, before.content)


# ImagePatches


def numbered(height: int, width: int) -> np.ndarray:
    """(Y, X, C): every pixel holds its own row and column, in 256ths."""
    array = np.zeros((height, width, 3), np.float32)
    array[:, :, 0] = np.arange(height)[:, None] / 256
    array[:, :, 1] = np.arange(width)[None, :] / 256
    return array


@pytest.mark.parametrize(("height", "width", "patch"), [(12, 20, 4), (20, 12, 4), (3, 7, 1), (16, 16, 16), (6, 40, 2)])
@pytest.mark.parametrize("position", ["rotary", "sincos", "learned"])
def test_every_patch_stands_at_its_own_place(height: int, width: int, patch: int, position: str) -> None:
    tokenizer = ImagePatches(patch=patch, mean=0.0, std=1.0, position=position)  # type: ignore[arg-type]
    tokens = tokenizer(numbered(height, width))
    assert len(tokens) == (height // patch) * (width // patch)
    pixels = tokens.content[:, : 3 * patch**2].unflatten(1, (3, patch, patch)) * 256
    inside = torch.arange(patch)
    for place, patch_CYX in zip(tokens.position_NA, pixels, strict=True):
        time, row, column = place.int().tolist()
        assert time == 0
        assert torch.equal(patch_CYX[0], (row * patch + inside)[:, None].expand(patch, patch).float())
        assert torch.equal(patch_CYX[1], (column * patch + inside)[None, :].expand(patch, patch).float())
    places = [tuple(p) for p in tokens.position_NA[:, 1:].int().tolist()]
    assert places == [(r, c) for r in range(height // patch) for c in range(width // patch)]  # row by row


def test_mean_and_std_by_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    picture = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    content = ImagePatches(patch=4, mean=mean, std=std, position="rotary")(picture).content
    wanted = ((picture - mean) / std).transpose(2, 0, 1).reshape(1, -1)
    np.testing.assert_allclose(content, wanted, atol=1e-6)


def test_lists_are_as_good_as_tuples() -> None:
    assert ImagePatches(mean=[0.1, 0.2, 0.3], std=[1, 2, 3]) == ImagePatches(mean=(0.1, 0.2, 0.3), std=(1, 2, 3))  # type: ignore[arg-type]
    assert len(ImagePatches(mean=[0.1, 0.2, 0.3])(np.zeros((16, 16, 3)))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("position", ["rotary", "sincos", "learned"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_inverts_encode(position: str, channels: int) -> None:
    picture = torch.rand(channels, 12, 20)
    tokenizer = ImagePatches(patch=4, channels=channels, mean=0.3, std=0.2, position=position)  # type: ignore[arg-type]
    torch.testing.assert_close(tokenizer.decode(tokenizer(picture)), picture)


@pytest.mark.parametrize(("height", "width"), [(13, 20), (12, 17), (9, 7)])
def test_edge_repeat(height: int, width: int) -> None:
    tokenizer = ImagePatches(patch=4, mean=0.0, std=1.0)
    array = numbered(height, width)
    wanted = np.pad(array, ((0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")
    np.testing.assert_allclose(tokenizer.decode(tokenizer(array)), wanted.transpose(2, 0, 1), atol=1e-6)


def test_edge_error() -> None:
    tokenizer = ImagePatches(patch=16, edge="error")
    message = r"image is 30x48 pixels, which patch=16 does not divide; resize or pad it first, or use edge='repeat'$"
    with pytest.raises(MediaError, match="^ImagePatches.encode: " + message):
        tokenizer(np.zeros((30, 48)))
    assert len(tokenizer(np.zeros((32, 48)))) == 6


def test_smaller_than_a_patch() -> None:
    with pytest.raises(MediaError, match=r"image is 1x1 pixels, smaller than one patch=16; enlarge it first"):
        ImagePatches()(np.zeros((1, 1)))
    assert len(ImagePatches(patch=1)(np.zeros((1, 1)))) == 1


@pytest.mark.parametrize(
    ("height", "width", "wanted"), [(40, 80, (16, 32)), (80, 40, (32, 16)), (64, 64, (32, 32)), (20, 32, (20, 32))]
)
def test_max_side_keeps_the_aspect(height: int, width: int, wanted: tuple[int, int]) -> None:
    tokenizer = ImagePatches(patch=4, max_side=32, mean=0.0, std=1.0)
    ramp = np.linspace(0, 1, width, dtype=np.float32)[None, :].repeat(height, 0)
    picture = tokenizer.decode(tokenizer(ramp))
    assert picture.shape[1:] == wanted
    centres = (np.arange(wanted[1]) + 0.5) * width / wanted[1] - 0.5  # a ramp that is shrunk is a ramp
    np.testing.assert_allclose(picture[0, 0, 2:-2], centres[2:-2] / (width - 1), atol=1e-3)


def test_sincos_is_its_formula() -> None:
    tokenizer = ImagePatches(patch=2, channels=1)
    embed = tokenizer.embed(24)
    torch.nn.init.zeros_(embed.linear.weight)
    torch.nn.init.zeros_(embed.linear.bias)
    tokens = tokenizer(np.zeros((6, 10)))
    got = embed(tokens.content).detach().numpy()
    turn = 100.0 ** (-np.arange(6) / 6)  # 24 numbers: 6 sines and 6 cosines for the row, and as many for the column
    for row in range(3):
        for column in range(5):
            wanted = np.concatenate(
                [np.sin(row * turn), np.cos(row * turn), np.sin(column * turn), np.cos(column * turn)]
            )
            np.testing.assert_allclose(got[row * 5 + column], wanted, atol=1e-5)


def bilinear(grid_DYX: np.ndarray, y: float, x: float) -> np.ndarray:
    """The grid's value at fractions (y, x) of its height and width: points lie at cell centres, edges are continued."""
    rows, columns = grid_DYX.shape[1:]
    y, x = np.clip(y * rows - 0.5, 0, rows - 1), np.clip(x * columns - 0.5, 0, columns - 1)
    top, left = int(min(y, rows - 2)), int(min(x, columns - 2))
    dy, dx = y - top, x - left
    corner = grid_DYX[:, top : top + 2, left : left + 2]
    return (
        corner[:, 0, 0] * (1 - dy) * (1 - dx)
        + corner[:, 0, 1] * (1 - dy) * dx
        + corner[:, 1, 0] * dy * (1 - dx)
        + corner[:, 1, 1] * dy * dx
    )


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (8, 2), (6, 6), (1, 1)])
def test_learned_grid_is_stretched_over_the_picture(rows: int, columns: int) -> None:
    tokenizer = ImagePatches(patch=2, channels=1, position="learned", grid=6)
    embed = tokenizer.embed(8)
    torch.nn.init.zeros_(embed.linear.weight)
    torch.nn.init.zeros_(embed.linear.bias)
    got = embed(tokenizer(np.zeros((2 * rows, 2 * columns))).content).detach().numpy().reshape(rows, columns, 8)
    grid = embed.learned.grid_DYX.detach()
    for row in range(rows):
        for column in range(columns):
            wanted = bilinear(grid.numpy(), (row + 0.5) / rows, (column + 0.5) / columns)
            np.testing.assert_allclose(got[row, column], wanted, atol=1e-6)
    resized = F.interpolate(grid[None], (rows, columns), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(got, resized, atol=1e-6)


def test_same_fraction_same_vector() -> None:
    embed = ImagePatches(patch=1, channels=1, position="learned", grid=4).embed(8)
    small = embed.learned(torch.tensor([[0.5 / 2, 1.5 / 2]]))
    large = embed.learned(torch.tensor([[1.5 / 6, 4.5 / 6]]))
    torch.testing.assert_close(small, large)


WRONG_PATCHES = [
    ({"patch": 0}, "patch=0 must be at least 1 and channels=3 1, 3 or 4"),
    ({"channels": 2}, "patch=16 must be at least 1 and channels=2 1, 3 or 4"),
    ({"position": "absolute"}, "position='absolute' must be 'sincos', 'learned' or 'rotary'"),
    ({"edge": "crop"}, "edge='crop' 'repeat', 'error' or 'cut'"),
    ({"mean": (0.5, 0.5)}, "mean has 2 numbers for channels=3"),
    ({"std": [0.5] * 4}, "std has 4 numbers for channels=3"),
    ({"std": 0.0}, "std=0.0 must be more than 0"),
    ({"std": (1.0, 0.0, 1.0)}, "must be more than 0"),
    ({"max_side": 8}, "max_side=8 is smaller than patch=16"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_PATCHES, ids=range(len(WRONG_PATCHES)))
def test_wrong_settings_of_patches(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^ImagePatches: .*{message}"):
        ImagePatches(**settings)


def test_width_that_sincos_cannot_fill() -> None:
    with pytest.raises(
        ConfigError, match=r"^sine_cosine: width=30 is not a multiple of 4; use one that is, or another"
    ):
        ImagePatches().embed(30)


# AudioFrames: see test_media.py, beside the spectrogram

WRONG_FRAMES = [
    ({"rate_hz": 0}, "rate_hz=0 must be more than 0"),
    ({"mels": -1}, "mels=-1 must be more than 0"),
    ({"stack": 0}, "stack=0 must be more than 0"),
    ({"hop_ms": 0.01}, "hop_ms=0.01 must be a sample or more and window_ms=25.0 no less"),
    ({"hop_ms": 30.0}, "hop_ms=30.0 must be a sample or more and window_ms=25.0 no less"),
    ({"normalise": "none"}, "normalise='none' must be 'clip' or 'fixed'"),
    ({"trim_db": 0}, "trim_db=0 must be more than 0 and finite, or None"),
    ({"trim_db": math.nan}, "trim_db=nan must be more than 0 and finite, or None"),
    ({"trim_db": "20"}, "trim_db='20' must be more than 0 and finite, or None"),
    ({"trim_db": 20.0, "causal": True}, "trim_db=20.0 needs the loudest frame, .* use trim_db=None"),
    ({"stem_channels": -1}, "stem_channels=-1 must be .*"),
    ({"stem_channels": 4, "causal": True}, "stem_channels=4 reads the next token, .* use stem_channels=0"),
    ({"stem_channels": 4, "mels": 7}, "mels=7 must be at least 8 for the 3 convolutions of stem_channels=4, .*"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_FRAMES, ids=range(len(WRONG_FRAMES)))
def test_wrong_settings_of_frames(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^AudioFrames: {message}$"):
        AudioFrames(**settings)


def word(before_s: float, after_s: float) -> np.ndarray:
    """Two bursts of noise with a pause between them, and faint noise around them."""
    draw = np.random.default_rng(0)
    wave = np.concatenate(
        [draw.standard_normal(800) * 0.1, draw.standard_normal(800) * 1e-4, draw.standard_normal(800) * 0.05]
    )
    around = [draw.standard_normal(round(8000 * duration_s)) * 1e-4 for duration_s in (before_s, after_s)]
    return np.concatenate([around[0], wave, around[1]]).astype(np.float32)


def test_silence_at_both_ends_is_left_out_and_a_pause_stays() -> None:
    whole = AudioFrames(rate_hz=8000, mels=16, stack=1, normalise="fixed")
    for before_s, after_s in ((0.2, 0.3), (0.0, 0.5), (0.4, 0.0)):
        sound = (word(before_s, after_s), 8000)
        power_NF = np.exp(whole.log_mel(whole(sound)).double().numpy()) - 1e-6
        decibels_N = 10 * np.log10(power_NF.sum(1) / power_NF.sum(1).max())
        loud = np.flatnonzero(decibels_N > -20)
        trimmed = replace(whole, trim_db=20.0)(sound)
        torch.testing.assert_close(trimmed.content, whole(sound).content[loud[0] : loud[-1] + 1])
        assert 28 <= len(trimmed) <= 34  # 0.3 s, with the pause
        torch.testing.assert_close(trimmed.position_NA, whole.places(len(trimmed)))
    clip = AudioFrames(rate_hz=8000, mels=16, trim_db=20.0)
    silent = clip((np.zeros(800, np.float32), 8000))
    assert len(silent) == 3
    assert silent.content.isfinite().all()


def test_the_stem_of_bands_convolves_each_value_by_itself() -> None:
    tokenizer = AudioFrames(rate_hz=8000, mels=17, stack=3, stem_channels=2)
    values = [tokenizer((word(0, length_s), 8000)) for length_s in (0.1, 0.0, 0.25)]
    stem: Any = tokenizer.embed(12)
    for convolution in stem.convolutions:
        torch.nn.init.normal_(convolution.bias)
    packed = stem(torch.cat([tokens.content for tokens in values]), Places.of(values, tokenizer.step))
    wanted = []
    for tokens in values:
        hidden = tokens.content.reshape(1, 1, -1, 17)
        for convolution, size in zip(stem.convolutions, ((3, 2), (1, 2), (1, 2)), strict=True):
            hidden = torch.nn.functional.conv2d(hidden, convolution.weight, convolution.bias, padding=1)
            hidden = torch.nn.functional.max_pool2d(hidden, size).relu()
        wanted.append(stem.linear(hidden[0].permute(1, 0, 2).flatten(1)))
    assert packed.std() > 0.01
    torch.testing.assert_close(packed, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    # padded behind with anything, as in an exported program
    lengths = torch.tensor([len(tokens) for tokens in values])
    beside = torch.full((3, int(lengths.max()), 51), 7.0)
    for row, tokens in zip(beside, values, strict=True):
        row[: len(tokens)] = tokens.content
    found = stem.padded(beside, torch.zeros(3, beside.shape[1], 3), lengths)
    for row, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(row[: len(one)], one, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_stem_of_bands_is_packed_exported_and_saved_like_any_kind() -> None:
    kind = AudioFrames(rate_hz=8000, mels=16, trim_db=20.0, stem_channels=2)
    values = [(word(0, 0)[:count], 8000) for count in (1000, 1800, 2400)]
    known = {"decode_inverts_encode": "a written sound is trimmed once more"}
    assert check_tokenizer(kind, values, expected_failures=known).failed == []


# Text


@pytest.fixture(scope="module")
def bpe() -> TextBPE:
    return TextBPE.train(TEXTS, vocab_size=300)


anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(anything)
@settings(deadline=None)
def test_bytes_are_utf_8(text: str) -> None:
    tokens = TextBytes()(text)
    assert bytes(tokens.content.tolist()) == text.encode()
    assert tokens.position_NA.tolist() == [[i, 0, 0] for i in range(len(tokens))]
    assert TextBytes().decode(tokens) == text


@given(text=anything)
@settings(deadline=None)
def test_pieces_give_back_any_text(bpe: TextBPE, text: str) -> None:
    tokens = bpe(text)
    assert bpe.decode(tokens) == text
    assert tokens.position_NA.tolist() == [[i, 0, 0] for i in range(len(tokens))]


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧 ", "\0", " \n\t\r\n", "é", "漢字かな", "<|endoftext|>", "Ġ"])
def test_awkward_texts(bpe: TextBPE, text: str) -> None:
    for tokenizer in (bpe, TextBytes()):
        assert tokenizer.decode(tokenizer(text)) == text


def test_bytes_that_are_no_text_decode_with_a_mark() -> None:
    assert TextBytes().decode(Tokens(ids(0xE4, 65), torch.zeros(2, 3))) == "\ufffdA"


@pytest.mark.parametrize("name", ["TextBytes", "TextBPE"])
def test_not_a_text(bpe: TextBPE, name: str) -> None:
    tokenizer = bpe if name == "TextBPE" else TextBytes()
    for value, message in [
        ("", "str '' gave no tokens; to leave a field out of a sample, give None"),
        (None, r"wanted text \(str\), not NoneType None"),
        (7, r"wanted text \(str\), not int 7"),
        (b"abc", r"wanted text \(str\), not bytes b'abc'"),
        (["a"], r"wanted text \(str\), not list \(str 'a'\)"),
        ("ab\ud800", r"str 'ab\\ud800' is not valid Unicode: a lone surrogate at 2"),
    ]:
        with pytest.raises(MediaError, match=f"^{name}.encode: {message}$"):
            tokenizer(value)


def test_pieces_are_those_of_the_library(bpe: TextBPE, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    with pytest.warns(FutureWarning, match=r"TextBPE.write\(path\) is now TextBPE.save\(path\)"):
        assert bpe.write(tmp_path / "again.json").read_text() == path.read_text()
    assert bpe.write("a text", tmp_path / "said").read_text() == "a text"
    library = HFTokenizer.from_file(str(path))
    ours = TextBPE.open(path)
    assert ours == bpe
    assert ours.vocab_size == library.get_vocab_size() <= 300
    for text in [*TEXTS, "something else entirely 🚀"]:
        assert ours(text).content.tolist() == library.encode(text).ids
    assert len(ours("the cat")) < 5 < len(TextBytes()("the cat"))


def test_training_is_deterministic(bpe: TextBPE) -> None:
    assert TextBPE.train(iter(TEXTS), vocab_size=300) == bpe
    program = "import sys; from test_tokenizers import *; spec = TextBPE.train(TEXTS, vocab_size=300).spec"
    program += "; sys.stdout.buffer.write(spec.encode())"
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert elsewhere.stdout.decode() == bpe.spec


def test_nothing_in_a_text_is_special(bpe: TextBPE) -> None:
    library = HFTokenizer.from_str(bpe.spec)
    library.add_special_tokens(["<eos>"])
    eos = library.token_to_id("<eos>")
    assert eos in library.encode("cat<eos>").ids
    ours = TextBPE(library.to_str())
    tokens = ours("cat<eos>")
    assert eos not in tokens.content.tolist()
    assert tokens.content.tolist() == bpe("cat<eos>").content.tolist()
    assert ours.decode(tokens) == "cat<eos>"
    assert ours.vocab_size == bpe.vocab_size + 1
    assert eos not in pickle.loads(pickle.dumps(ours))("cat<eos>").content.tolist()


def test_a_file_that_cuts_or_pads_does_neither_here(bpe: TextBPE) -> None:
    library = HFTokenizer.from_str(bpe.spec)
    library.enable_truncation(4)
    library.enable_padding(length=50)
    assert len(library.encode("the cat sat on the mat, and then it sat").ids) == 50
    long, short = "the cat sat on the mat, and then it sat", "cat"
    for text in (long, short):
        assert TextBPE(library.to_str())(text).content.tolist() == bpe(text).content.tolist()


def test_ids_with_holes_still_fit(bpe: TextBPE) -> None:
    """Some published files skip ids; the table must reach to the largest."""
    top = bpe.vocab_size - 1
    holes = TextBPE(bpe.spec.replace(f":{top}", f":{top + 50}"))
    assert holes.vocab_size == top + 51
    assert HFTokenizer.from_str(holes.spec).get_vocab_size() == top + 1
    assert max(int(holes(text).content.max()) for text in TEXTS) <= top + 50


def test_words_that_end_at_white_space_only_may_hold_punctuation():
    texts = ["end, end, end, end,"]
    plain = TextBPE.train(texts, vocab_size=262)
    whole = TextBPE.train(texts, vocab_size=262, words=r"\s?\S+|\s")
    pieces = {whole.decode(Tokens(torch.tensor([i]), whole.places(1))) for i in range(256, 262)}
    assert any(piece.endswith(",") and len(piece) > 1 for piece in pieces)
    assert not any(
        "d," in plain.decode(Tokens(torch.tensor([i]), plain.places(1))) for i in range(256, plain.vocab_size)
    )
    assert whole.decode(whole("end,\n\tthen, 🙂")) == "end,\n\tthen, 🙂"
    with pytest.raises(ConfigError, match=r"TextBPE.train: words='\(' is no regular expression"):
        TextBPE.train(texts, vocab_size=262, words="(")


def test_what_cannot_be_trained_or_opened(bpe: TextBPE, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^TextBPE.train: vocab_size=255 is less than the 256 bytes it starts from$"):
        TextBPE.train(TEXTS, vocab_size=255)
    with pytest.raises(ConfigError, match=r"^TextBPE.train: texts is one text; give a list of texts$"):
        TextBPE.train("the cat", vocab_size=300)
    with pytest.raises(MediaError, match=r"^TextBPE.open: there is no file '.*none\.json'$"):
        TextBPE.open(tmp_path / "none.json")
    for junk in (b"{}", b"junk", b"\xff\xfe\0"):
        (tmp_path / "junk.json").write_bytes(junk)
        with pytest.raises(ConfigError, match=r"^TextBPE.open: cannot read '.*junk\.json': ."):
            TextBPE.open(tmp_path / "junk.json")
    with pytest.raises(ConfigError, match=r"^TextBPE: this is no tokenizer.json: ."):
        TextBPE("{}")
    with pytest.raises(CheckpointError, match=r"^TextBPE: its file tokenizer.json is missing$"):
        TextBPE.from_config({}, {})


# Labels


def test_labels_are_numbered_in_order() -> None:
    labels = Labels(("cat", "dog", "eel"))
    for number, name in enumerate(labels.names):
        tokens = labels(name)
        assert tokens.content.tolist() == [number]
        assert labels.decode(tokens) == name
    assert (labels.vocab_size, labels.feature_size, labels.classes) == (3, None, True)


def test_labels_that_are_numbers() -> None:
    digits = Labels(range(10))  # type: ignore[arg-type]
    assert digits.names == tuple("0123456789")
    for value in (7, "7", np.int64(7)):
        assert digits(value).content.tolist() == [7]
    assert Labels(["5", "9"]).encode(9).content.tolist() == [1]  # type: ignore[arg-type]  # a name, not an index


def test_several_labels() -> None:
    labels = Labels(("cat", "dog", "eel"), several=True)
    for value, hot in [
        (["eel", "cat"], [1, 0, 1]),
        (("dog", "dog"), [0, 1, 0]),
        ([], [0, 0, 0]),
        ({"cat"}, [1, 0, 0]),
        (["cat", "dog", "eel"], [1, 1, 1]),
    ]:
        tokens = labels(value)
        assert tokens.content.tolist() == [hot]
        assert labels.decode(tokens) == [name for name, on in zip(labels.names, hot, strict=True) if on]
    assert (labels.vocab_size, labels.feature_size) == (None, 3)


def test_unknown_labels() -> None:
    labels = Labels(("cat", "dog", "eel"))
    with pytest.raises(
        MediaError, match=r"^Labels.encode: 'dgo' is not one of the 3 classes: cat, dog, eel; did you mean 'dog'\?$"
    ):
        labels("dgo")
    with pytest.raises(MediaError, match=r"^Labels.encode: 0 is not one of the 3 classes: cat, dog, eel; Fields\("):
        labels(0)
    with pytest.raises(MediaError, match=r"None is not one of the 3 classes"):
        labels(None)
    with pytest.raises(
        MediaError, match=r"'x' is not one of the 20 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(20 in all\)$"
    ):
        Labels(tuple(map(str, range(20))))("x")
    several = Labels(("cat", "dog"), several=True)
    for value in ("cat", None, 3):
        with pytest.raises(MediaError, match=rf"^Labels.encode: several=True wants a list of names, not {value!r}$"):
            several(value)
    with pytest.raises(MediaError, match=r"'hat' is not one of the 2 classes: cat, dog; did you mean 'cat'\?$"):
        several(["dog", "hat"])


def test_labels_from_data_are_its_classes():
    assert Labels.from_data(["dog", "cat", "dog"]) == Labels(("cat", "dog"))
    assert Labels.from_data(np.array([10, 9, -1, 10])) == Labels(("-1", "9", "10"))
    assert Labels.from_data(iter([True, False])) == Labels(("False", "True"))
    assert Labels.from_data(np.array([True, False])) == Labels(("False", "True"))
    assert Labels.from_data([["dog"], [], ["cat", "dog"]], several=True) == Labels(("cat", "dog"), several=True)


@pytest.mark.parametrize(
    ("values", "several", "message"),
    [
        ([], False, "there are no values"),
        ("cat", False, "wanted the labels of all samples, not 'cat'"),
        (
            ["cat", None],
            False,
            "value 1 is None, wanted a text, a whole number or a truth value as the name of a class; leave",
        ),
        ([0.5], False, "value 0 is 0.5, wanted a text"),
        (["cat"], True, "several=True wants lists of names, and value 0 is 'cat'"),
    ],
)
def test_labels_from_data_name_the_value_that_is_none(values, several, message):
    with pytest.raises(ConfigError, match=f"^Labels.from_data: {message}"):
        Labels.from_data(values, several=several)


def test_wrong_label_names() -> None:
    with pytest.raises(ConfigError, match=r"^Labels: names occur twice: 1, cat$"):
        Labels(("cat", "dog", "cat", "1", 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^Labels: no names were given$"):
        Labels(())
    for names in ("cat", None, 5):
        with pytest.raises(ConfigError, match=f"^Labels: names={names!r} is not a list of names$"):
            Labels(names)  # type: ignore[arg-type]


def test_at_times() -> None:
    assert at_times(torch.tensor([0.5, 2.0])).tolist() == [[0.5, 0, 0], [2, 0, 0]]

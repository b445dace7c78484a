"""Sound as Whisper and the Audio Spectrogram Transformer read it: equal to transformers' numbers; their embeddings too."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.check import tokenizer_checks
from multimodal.declare import declaration, rebuild
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Places
from multimodal_tokenizers import SpectrogramPatches, WhisperFrames
from tests.tokenizers.real_data import recordings

RATE = 16000  # Hz
TOLERANCE = 1e-5


def synthetic() -> list[np.ndarray]:
    """A chord, noise behind silence, a click, and a quiet slide, of odd lengths."""
    random = np.random.default_rng(0)
    time = np.arange(51234) / RATE
    chord = sum(np.sin(2 * np.pi * f * time) for f in (220, 277, 3300)) * 0.2
    noise = np.concatenate([np.zeros(7000), random.uniform(-0.9, 0.9, 23456)])
    click = np.zeros(1601)
    click[800] = 1.0
    slide = 1e-4 * np.sin(2 * np.pi * (50 + 2000 * time[:30011]) * time[:30011])
    return [wave.astype(np.float32) for wave in (chord, noise, click, slide)]


def content(tokenizer: Any, wave_S: np.ndarray) -> Tensor:
    return tokenizer((wave_S, RATE)).content


def frames(tokenizer: WhisperFrames, wave_S: np.ndarray) -> Tensor:
    """Log-mels (mels, frames), as transformers has them."""
    return content(tokenizer, wave_S).reshape(-1, tokenizer.mels).T


# Whisper


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("real", [False, True])
def test_log_mels_of_whisper(mels: int, real: bool) -> None:
    theirs = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=mels)
    mine, own_length = WhisperFrames(mels=mels), WhisperFrames(mels=mels, pad_seconds=None)
    waves = recordings("esc10_folds1-3.zip", 6) + recordings("ljspeech.zip", 6) if real else synthetic()
    for wave_S in waves:
        wanted = torch.from_numpy(theirs(wave_S, sampling_rate=RATE)["input_features"][0])
        assert wanted.shape == (mels, 3000)
        torch.testing.assert_close(frames(mine, wave_S), wanted, atol=TOLERANCE, rtol=0)

        whole = np.pad(wave_S, (0, -len(wave_S) % 320))
        wanted = theirs(whole, sampling_rate=RATE, padding="do_not_pad")["input_features"][0]
        torch.testing.assert_close(frames(own_length, wave_S), torch.from_numpy(wanted), atol=TOLERANCE, rtol=0)


def test_tokens_of_whisper_stand_at_their_seconds() -> None:
    tokens = WhisperFrames()((synthetic()[0], RATE))
    assert len(tokens) == 1500
    torch.testing.assert_close(tokens.position_NA[:, 0], torch.arange(1500) * 0.02)
    assert len(WhisperFrames(pad_seconds=None)((np.ones(321, np.float32) / 2, RATE))) == 2


def test_stem_of_whisper_on_values_of_two_lengths() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(d_model=48, encoder_layers=1, encoder_attention_heads=2, num_mel_bins=80)
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    tokenizer = WhisperFrames(pad_seconds=None)
    values = [tokenizer((wave_S, RATE)) for wave_S in synthetic()]
    assert len({len(tokens) for tokens in values}) == 4
    stem = tokenizer.embed(48)
    for mine, his in ((stem.first, theirs.conv1), (stem.second, theirs.conv2)):
        mine.load_state_dict(his.state_dict())
    with torch.no_grad():
        for chosen in (values, values[::-1], values[:1], [values[2], values[2], values[0]]):
            packed = stem(torch.cat([tokens.content for tokens in chosen]), Places.of(chosen, tokenizer.step))
            wanted = []
            for tokens in chosen:
                mel = tokens.content.reshape(-1, 80).T[None]
                hidden = F.gelu(theirs.conv2(F.gelu(theirs.conv1(mel))))
                wanted.append(hidden[0].T)
            assert torch.cat(wanted).std() > 0.01
            torch.testing.assert_close(packed, torch.cat(wanted), atol=TOLERANCE, rtol=0)


def test_a_value_does_not_hear_its_neighbours() -> None:
    tokenizer = WhisperFrames(pad_seconds=None)
    a, b, c = (tokenizer((wave_S, RATE)) for wave_S in synthetic()[:3])
    stem = tokenizer.embed(16)

    def of(*values: Any) -> Tensor:
        return stem(torch.cat([tokens.content for tokens in values]), Places.of(values, tokenizer.step))

    together = of(a, b, c)
    torch.testing.assert_close(together[len(a) : len(a) + len(b)], of(b), atol=1e-6, rtol=0)
    together[len(a) : len(a) + len(b)].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in stem.parameters())


@pytest.mark.parametrize(
    ("tokenizer", "samples", "message"),
    [
        (
            WhisperFrames(),
            480001,
            r"ndarray .* has 30.0001 s or more, and at most 30 s are read at once; split it into pieces",
        ),
        (WhisperFrames(pad_seconds=1.0), 3 * RATE, "at most 1 s are read at once"),
        (WhisperFrames(pad_seconds=None), 65536 * 320 + 1, "at most 1310.72 s are read at once"),
        (SpectrogramPatches(), 162960, "has 10.185 s or more, and at most 10.1849 s are read at once"),
        (SpectrogramPatches(), 399, "has 399 samples at 16000 Hz, less than one frame of 400"),
    ],
)
def test_sounds_that_do_not_fit_are_refused(tokenizer: Any, samples: int, message: str) -> None:
    with pytest.raises(MediaError, match=rf"^{type(tokenizer).__name__}.encode: .*{message}"):
        tokenizer((np.full(samples, 0.25, np.float32), RATE))


def test_sounds_that_just_fit() -> None:
    assert len(WhisperFrames()((np.full(480000, 0.25, np.float32), RATE))) == 1500
    assert len(SpectrogramPatches()((np.full(162959, 0.25, np.float32), RATE))) == 1212


# The Audio Spectrogram Transformer


def extractor(**settings: Any) -> Any:
    return pytest.importorskip("transformers").ASTFeatureExtractor(**settings)


@pytest.mark.parametrize("real", [False, True])
def test_patches_of_the_spectrogram_transformer(real: bool) -> None:
    theirs, mine = extractor(), SpectrogramPatches(cut=True)
    conv = torch.nn.Conv2d(1, 7, 16, 10)
    waves = recordings("esc10_folds1-3.zip", 6) + recordings("ljspeech.zip", 3) if real else synthetic()
    waves.append(np.tile(waves[0], 1 + 12 * RATE // len(waves[0])))  # longer than what is read
    for wave_S in waves:
        values = torch.as_tensor(theirs(wave_S, sampling_rate=RATE)["input_values"][0])
        assert values.shape == (1024, 128)
        torch.testing.assert_close(mine.spectrogram((wave_S, RATE)), values[:1016], atol=TOLERANCE, rtol=0)
        wanted = conv(values[None, None].transpose(2, 3)).flatten(2).transpose(1, 2)[0]
        got = content(mine, wave_S) @ conv.weight.flatten(1).T + conv.bias
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


def test_patch_embeddings_of_their_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_length=300)
    theirs = transformers.ASTModel(config).eval().embeddings.patch_embeddings
    mine = SpectrogramPatches(frames=300)
    wave_S = synthetic()[3]
    values = torch.as_tensor(extractor(max_length=300)(wave_S, sampling_rate=RATE)["input_values"][0])
    linear = mine.embed(32)
    linear.load_state_dict({"weight": theirs.projection.weight.flatten(1), "bias": theirs.projection.bias})
    torch.testing.assert_close(linear(content(mine, wave_S)), theirs(values[None])[0], atol=TOLERANCE, rtol=0)


def test_places_of_patches() -> None:
    tokens = SpectrogramPatches()((synthetic()[0], RATE))
    assert SpectrogramPatches().grid == (12, 101)
    assert len(tokens) == 12 * 101
    place = tokens.position_NA.reshape(12, 101, 3)
    torch.testing.assert_close(place[:, :, 0], (torch.arange(101) * 0.1).expand(12, 101))
    torch.testing.assert_close(place[:, :, 1], torch.arange(12.0)[:, None].expand(12, 101))
    assert not place[:, :, 2].any()
    assert Places.of([tokens], SpectrogramPatches().step).extents == ((101, 12, 1),)
    assert SpectrogramPatches().token_names(tokens)[102] == "at 0.1 s, row 1"


# Both


SOUNDS = [(0.5 * wave_S[:9000], RATE) for wave_S in synthetic()]
CHECKED: list[tuple[Any, Any]] = [
    (tokenizer, check)
    for tokenizer in (
        WhisperFrames(mels=16, pad_seconds=None),
        WhisperFrames(mels=16, pad_seconds=0.6),
        SpectrogramPatches(frames=64, mels=40),
    )
    for check in tokenizer_checks(tokenizer, SOUNDS)
]


@pytest.mark.parametrize(("tokenizer", "check"), CHECKED, ids=[f"{type(t).__name__}-{c}" for t, c in CHECKED])
def test_promises(tokenizer: Any, check: Any) -> None:
    check()


@pytest.mark.parametrize(
    "tokenizer", [WhisperFrames(mels=128, pad_seconds=None), SpectrogramPatches(stride=12, cut=True)]
)
def test_through_a_checkpoint(tokenizer: Any) -> None:
    assert rebuild(json.loads(json.dumps(declaration(tokenizer)))) == tokenizer


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (WhisperFrames, {"mels": 0}, "mels=0 must be at least 1"),
        (WhisperFrames, {"pad_seconds": 0.03}, "pad_seconds=0.03 is not a multiple of 0.02"),
        (WhisperFrames, {"pad_seconds": 0.0}, "pad_seconds=0.0 is not"),
        (SpectrogramPatches, {"stride": 0}, "stride=0 must be at least 1"),
        (SpectrogramPatches, {"patch": 129}, "patch=129 and .* no larger than"),
        (SpectrogramPatches, {"std": 0.0}, "std=0.0 must be more than 0"),
    ],
)
def test_wrong_settings(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{kind.__name__}: .*{message}"):
        kind(**settings)


def test_the_cost_of_the_stem_is_that_of_its_convolutions() -> None:
    from multimodal.count.flops import embed_cost

    cost = embed_cost(WhisperFrames(mels=80), 48, half=False)
    wanted = 2 * 3 * (2 * 80 * 48 + 48 * 48)  # FLOPs a token: two steps of the first convolution and one of the second
    assert cost.known
    assert wanted <= cost.forward < 1.05 * wanted

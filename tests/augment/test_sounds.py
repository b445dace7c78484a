"""Augmentations of sounds and of their tokens, beside spectra and counts."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import multimodal as mm
from multimodal import augment as A
from multimodal.media import read_as_recorded
from multimodal.tokenizer import AfterEncoding
from multimodal_tokenizers import AudioFrames, ImagePatches, SpectrogramPatches, TextBytes, WhisperFrames
from tests.augment.draws import Largest

RATE = 8000
EVERY = (
    A.Speed(0.8, 1.2),
    A.Tempo(0.8, 1.2),
    A.Pitch(0.8, 1.2),
    A.Gain(),
    A.Noise(),
    A.Pause(),
    A.TimeShift(),
    A.RandomPiece(),
    A.Equaliser(),
    A.Gaps(2, 0.1),
)


def tone(hertz: float, seconds: float = 1.0) -> tuple[torch.Tensor, int]:
    return torch.sin(2 * math.pi * hertz * torch.arange(int(RATE * seconds)) / RATE) * 0.3, RATE


def peak_hz(sound: tuple[torch.Tensor, int]) -> float:
    spectrum = np.abs(np.fft.rfft(sound[0].numpy() * np.hanning(len(sound[0]))))
    return float(spectrum.argmax()) * sound[1] / len(sound[0])


def largest(augmentation: A.Augmentation, value, random: float = 0.0):
    return augmentation(value, Largest(random))  # type: ignore[arg-type]


@pytest.mark.parametrize("augmentation", EVERY, ids=lambda a: type(a).__name__)
def test_numbers_come_from_the_generator_alone(augmentation: A.Augmentation):
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    found, rate = augmentation(tone(440, 0.2), np.random.default_rng(3))
    assert rate == RATE
    assert found.dtype == torch.float32
    assert found.dim() == 1
    assert len(found)
    assert torch.isfinite(found).all()
    assert np.random.get_state()[1].tolist() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    torch.manual_seed(99)
    assert torch.equal(augmentation(tone(440, 0.2), np.random.default_rng(3))[0], found)
    others = [augmentation(tone(440, 0.2), np.random.default_rng(seed))[0] for seed in range(10)]
    assert any(other.shape != found.shape or not torch.equal(other, found) for other in others)
    for short in (torch.zeros(1), torch.zeros(50)):  # nothing divides by 0, and no window is longer than the sound
        assert torch.isfinite(augmentation((short, RATE), np.random.default_rng(0))[0]).all()
    assert augmentation(None) is None


@pytest.mark.parametrize(
    ("augmentation", "length", "hertz"),
    [
        (A.Speed(1.25, 1.25), 1 / 1.25, 1.25),
        (A.Speed(0.8, 0.8), 1 / 0.8, 0.8),
        (A.Tempo(1.25, 1.25), 1 / 1.25, 1.0),
        (A.Tempo(0.8, 0.8), 1 / 0.8, 1.0),
        (A.Pitch(1.25, 1.25), 1.0, 1.25),
        (A.Pitch(0.8, 0.8), 1.0, 0.8),
    ],
)
def test_duration_and_pitch_change_by_their_factor(augmentation: A.Augmentation, length: float, hertz: float):
    found = augmentation(tone(500))
    assert abs(len(found[0]) / RATE - length) < 0.002
    assert abs(peak_hz(found) / 500 - hertz) < 0.005
    assert 0.5 < float(found[0].std() / tone(500)[0].std()) < 1.3


def test_noise_is_so_many_decibels_below_the_sound():
    value = tone(440)
    noise_S = A.Noise(20, 20)(value)[0] - value[0]
    assert abs(20 * math.log10(float(value[0].std() / noise_S.std())) - 20) < 0.3


def test_gain_pauses_gaps_pieces_and_shifts():
    wave_S, _ = value = tone(440)
    assert torch.allclose(largest(A.Gain(-6, 20), value)[0], wave_S * 10)
    paused = largest(A.Pause(0.1, 0.25), value)[0]
    assert len(paused) == RATE + 800 + 2000
    assert torch.equal(paused[800:-2000], wave_S)
    assert not paused[:800].any()
    assert not paused[-2000:].any()
    assert torch.equal(largest(A.TimeShift(0.25), value)[0], torch.cat([wave_S[-2000:], wave_S[:-2000]]))
    assert torch.equal(largest(A.RandomPiece(0.5, 0.75), value)[0], wave_S[2000:])
    copied = wave_S.clone()
    gaps = A.Gaps(1, 0.1)(value, np.random.default_rng(1))[0]
    assert torch.equal(wave_S, copied)  # the sample itself is not changed
    zero = (gaps == 0).nonzero()[:, 0]
    assert 1 < len(zero) <= 803


def test_an_equaliser_changes_tones_and_no_phases():
    wave_S = torch.randn(8192, generator=torch.Generator().manual_seed(0)) * 0.1
    found = A.Equaliser(6.0)((wave_S, RATE), np.random.default_rng(0))[0]
    ratio = np.fft.rfft(found.numpy().astype(np.float64)) / np.fft.rfft(wave_S.numpy().astype(np.float64))
    assert np.abs(ratio.imag).max() < 1e-3 * np.abs(ratio.real).max()
    gain_db = 20 * np.log10(ratio.real[1:-1])
    assert 2 < gain_db.std() < 12
    assert np.abs(np.diff(gain_db)).max() < 1  # smooth
    assert torch.allclose(largest(A.Equaliser(20.0), (wave_S, RATE))[0], wave_S * 10, atol=1e-5)


def test_whatever_is_a_sound_is_read_at_its_own_rate(tmp_path: Path):
    stereo = np.stack([tone(440)[0].numpy(), tone(300)[0].numpy()], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 11025, subtype="FLOAT")
    for value in (tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes(), (stereo, 11025), (stereo.T, 11025)):
        wave_S, rate = A.Gain(0, 0)(value)
        assert rate == 11025
        assert np.allclose(wave_S.numpy(), stereo.mean(1), atol=1e-6)
    assert read_as_recorded((stereo, 11025), who="test")[1] == 11025
    with pytest.raises(mm.MediaError, match="test: the sound has 8000 samples"):
        read_as_recorded((stereo[:, 0], RATE), who="test", max_seconds=0.5)


AUDIO = AudioFrames(rate_hz=RATE, mels=40, stack=3)


def test_spec_augment_replaces_bands_and_spans_by_the_mean():
    tokens = AUDIO((torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.1, RATE))
    frames_NF = tokens.content.reshape(-1, 40)
    seen = []
    for seed in range(40):
        found = A.SpecAugment(1, 0.25, 1, 0.2).change_tokens(tokens, AUDIO, np.random.default_rng(seed))
        assert torch.equal(found.position_NA, tokens.position_NA)
        found_NF = found.content.reshape(-1, 40)
        masked_NF = found_NF != frames_NF
        assert (found_NF[masked_NF] - frames_NF.mean()).abs().max() < 1e-5 if masked_NF.any() else True
        bands, spans = masked_NF.all(0), masked_NF.all(1)
        assert torch.equal(masked_NF, bands[None] | spans[:, None])  # whole bands and whole spans
        seen.append((int(bands.sum()), int(spans.sum())))
    assert max(bands for bands, _ in seen) in (9, 10)
    assert len(frames_NF) * 0.15 < max(spans for _, spans in seen) <= len(frames_NF) * 0.2
    assert min(seen)[0] == 0
    same = A.SpecAugment(0, 0.2, 0, 0.2).change_tokens(tokens, AUDIO, np.random.default_rng(0))
    assert torch.equal(same.content, tokens.content)


@pytest.mark.parametrize("tokenizer", [AUDIO, AudioFrames(mels=80), WhisperFrames(pad_seconds=None)])
def test_warped_frequencies_are_those_of_a_higher_tone(tokenizer):
    for factor in (0.8, 1.25):
        for hertz in (600, 1500, 2400):
            tokens = tokenizer(tone(hertz))
            warped = A.FrequencyWarp(factor, factor).change_tokens(tokens, tokenizer, np.random.default_rng(0))
            bands = [
                x.content.reshape(-1, tokenizer.mels)[5:-5].mean(0).argmax() for x in (warped, tokenizer(tone(hertz * factor)))
            ]  # fmt: skip
            assert abs(int(bands[0]) - int(bands[1])) <= 1, (factor, hertz, bands)
    tokens = tokenizer(tone(500))
    same = A.FrequencyWarp(1, 1).change_tokens(tokens, tokenizer, np.random.default_rng(0))
    assert (same.content - tokens.content).abs().max() < 1e-3


def test_dropped_tokens_are_gone_and_the_others_stay_in_place():
    tokens = AUDIO(tone(440))
    found = A.TokenDropout(0.25).change_tokens(tokens, AUDIO, np.random.default_rng(0))
    assert len(found) == len(tokens) - round(len(tokens) * 0.25)
    rows = {tuple(place): content for place, content in zip(tokens.position_NA.tolist(), tokens.content, strict=True)}
    for place, content in zip(found.position_NA.tolist(), found.content, strict=True):
        assert torch.equal(rows[tuple(place)], content)
    assert found.position_NA[:, 0].diff().min() > 0  # in order
    assert len(A.TokenDropout(1.0).change_tokens(tokens, AUDIO, np.random.default_rng(0))) == 1
    written = TextBytes()("seven")
    assert len(A.TokenDropout(0.4).change_tokens(written, TextBytes(), np.random.default_rng(0))) == 3


def test_tokens_change_where_a_sample_is_encoded():
    model = mm.Model(
        {"audio": AUDIO, "text": TextBytes()}, mm.Core(width=16, depth=1, heads=2), ["audio -> text"]
    ).packer
    value = A.TokenDropout(0.5)(tone(440), np.random.default_rng(0))
    assert isinstance(value, AfterEncoding)
    streams = [model([("audio -> text", {"audio": value, "text": "a"})]) for _ in range(2)]
    assert torch.equal(streams[0].content["audio"], streams[1].content["audio"])
    whole = model([("audio -> text", {"audio": tone(440), "text": "a"})]).content["audio"]
    assert len(streams[0].content["audio"]) == len(whole) - round(len(whole) / 2)
    assert torch.equal(AUDIO(tone(440)).content, whole)  # encode itself stays as it is
    assert A.SpecAugment()(None) is None
    often = A.Sometimes(A.TokenDropout(0.5), 1.0)(tone(440), np.random.default_rng(0))
    assert len(often.encoded(AUDIO, AUDIO(tone(440)))) == len(streams[0].content["audio"])


@pytest.mark.parametrize("augmentation", [A.SpecAugment(), A.FrequencyWarp()])
@pytest.mark.parametrize(
    ("tokenizer", "value"),
    [
        (ImagePatches(patch=4), torch.rand(3, 8, 8)),
        (TextBytes(), "seven"),
        (SpectrogramPatches(frames=64), tone(440, 0.5)),
    ],
)
def test_other_tokens_have_no_spectrogram(augmentation: A.TokenAugmentation, tokenizer, value):
    with pytest.raises(
        mm.ConfigError, match=f"the tokens of {type(tokenizer).__name__} are no log-mel frames; it works on"
    ):
        augmentation.change_tokens(tokenizer(value), tokenizer, np.random.default_rng(0))


def test_words_are_left_out():
    draw = np.random.default_rng(0)
    text = "one two three four five six seven eight nine ten"
    found = [A.WordDropout(0.3)(text, draw) for _ in range(300)]
    words = text.split()
    for one in found:
        left = iter(words)
        assert all(word in left for word in one.split())  # in the same order
    assert abs(np.mean([len(one.split()) for one in found]) - 7) < 0.4
    assert len(A.WordDropout(1.0)(text, draw).split()) == 1
    assert A.WordDropout(0.0)("two  words\n", draw) == "two  words\n"
    assert A.WordDropout(1.0)("one", draw) == "one"
    assert A.WordDropout(1.0)("", draw) == ""


def test_typing_errors_stay_near_the_text():
    draw = np.random.default_rng(0)
    text = "the quick brown fox jumps over the lazy dog"
    for _ in range(50):
        found = A.TypingErrors(0.1)(text, draw)
        assert set(found) <= set(text)
        assert abs(len(found) - len(text)) <= 12
    assert A.TypingErrors(0.0)(text, draw) == text
    assert A.TypingErrors(1.0)("a", draw) in ("a", "aa")
    assert A.TypingErrors(1.0)("", draw) == ""
    assert len(A.TypingErrors(1.0)("🎈é" * 5, draw)) > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: A.Speed(0.0, 1.0), r"Speed: factors=\(0.0, 1.0\) must be a pair \(least, largest\) of numbers from 0.25 to 4"),
        (lambda: A.Speed(1.2, 0.9), "factors="),
        (lambda: A.Noise(40, 10), "Noise: decibels="),
        (lambda: A.Pause(-1.0), "before_s=-1.0 must be a number from 0 to 60"),
        (lambda: A.Gaps(0), "number=0 must be"),
        (lambda: A.SpecAugment(bands=-1), "bands=-1 must be a whole number, 0 or more"),
        (lambda: A.SpecAugment(widest=2.0), "widest=2.0 must be a number from 0 to 1"),
        (lambda: A.FrequencyWarp(float("inf"), 1.0), "factors="),
        (lambda: A.WordDropout(-0.1), "share=-0.1"),
        (lambda: A.TokenDropout("a"), "share='a'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(make, words: str):
    with pytest.raises(mm.ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("augmentation", "value", "words"),
    [
        (A.Noise(), torch.rand(3, 8, 8), r"wanted a file or a pair \(wave, rate_hz\), not Tensor"),
        (A.Noise(), (torch.zeros(0), RATE), "has no samples"),
        (A.Noise(), (torch.full((5,), float("nan")), RATE), "NaN|finite"),
        (A.WordDropout(), 7, "wanted a text, not int 7"),
        (A.TypingErrors(), b"bytes", "wanted a text, not bytes"),
    ],
)
def test_values_that_cannot_be_changed_are_refused(augmentation: A.Augmentation, value, words: str):
    with pytest.raises(mm.MediaError, match=words):
        augmentation(value)

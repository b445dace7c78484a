"""Faults 9, 14, 62, 80 and 81 of sounds: what is read, against SciPy, NumPy or a formula; what is refused before it is decoded."""

import io
import json
import logging
import struct
import sys
import tracemalloc
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from multimodal.declare import declaration, rebuild
from multimodal.media import read_sound
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import AudioFrames

soundfile = pytest.importorskip("soundfile")
signal = pytest.importorskip("scipy.signal")
wavfile = pytest.importorskip("scipy.io.wavfile")

RATE = 16000  # Hz
RANDOM = np.random.default_rng(0)


def sound(value: object, rate_hz: int = RATE, **settings: object) -> np.ndarray:
    return read_sound(value, rate_hz=rate_hz, who="Test", **settings).numpy()  # type: ignore[arg-type]


def sound_file(wave: np.ndarray, kind: str = "WAV", code: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=code)
    return file.getvalue()


@pytest.fixture
def wave() -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 4) / RATE)).astype(np.float32)


# 9 and 81: ranges, axes, phases


def test_fault_09_floats_in_the_range_of_whole_numbers_are_refused(wave: np.ndarray, tmp_path: Path):
    whole = wave * 32767
    cases = [(whole, RATE), {"array": whole.astype(np.float64), "sampling_rate": RATE}, (torch.from_numpy(whole), RATE)]
    cases += [(np.round(wave * 9), RATE), sound_file(whole, code="FLOAT"), (np.full(99, 17.5, np.float32), RATE)]
    for value in cases:
        with pytest.raises(
            MediaError, match=r"runs from .* to .*, but floats are wanted in -1\.\.1; .* divided by 32768, or"
        ):
            sound(value)
    np.testing.assert_array_equal(sound((whole.astype(np.int16), RATE)), whole.astype(np.int16) / np.float32(32768))
    np.testing.assert_array_equal(sound((wave * 3, RATE)), wave * 3)  # mixtures and decoders go over 1
    with pytest.raises(MediaError, match="runs from"):
        AudioFrames()((RANDOM.uniform(-20_000, 20_000, 9999), RATE))


def test_fault_09a_samples_and_channels_are_distinguished_or_refused(wave: np.ndarray):
    stereo = np.stack([wave, wave[::-1]])
    for array in (stereo, stereo.T, torch.from_numpy(stereo), torch.from_numpy(stereo.T.copy())):
        np.testing.assert_allclose(sound((array, RATE)), stereo.mean(0), atol=1e-7)
        np.testing.assert_allclose(sound({"array": array, "sampling_rate": RATE}), stereo.mean(0), atol=1e-7)
    for shape in ((12, 2), (2, 12), (16, 16)):
        with pytest.raises(
            MediaError, match=r"which of its axes are channels is ambiguous.* average the channels first"
        ):
            sound((np.zeros(shape, np.float32), RATE))
    assert sound((np.zeros((1, 12)), RATE)).shape == sound((np.zeros((12, 1)), RATE)).shape == (12,)
    with pytest.raises(MediaError, match="at most 16 channels"):
        sound((np.zeros((17, 17)), RATE))


def test_fault_09b_shards_write_samples_by_channels_as_they_are_meant(wave: np.ndarray):
    from multimodal.data.codecs import decoded, encoded

    stereo = (np.stack([wave, wave[::-1]]) * 32767).astype(np.int16)
    for array in (stereo, stereo.T):
        extension, data = encoded((array, RATE))
        rate, written = wavfile.read(io.BytesIO(data))
        assert rate == RATE
        np.testing.assert_array_equal(written, stereo.T)
        np.testing.assert_allclose(sound(decoded(extension, data, "x.wav")), stereo.mean(0) / 32768, atol=1e-4)
    with pytest.raises(MediaError, match="is ambiguous"):
        encoded((np.zeros((12, 2), np.int16), RATE))


def test_fault_09c_channels_that_cancel_are_announced(
    wave: np.ndarray, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    from multimodal.media.sources import warned

    warned.clear()
    path = tmp_path / "turned.wav"
    path.write_bytes(sound_file(np.stack([wave, -0.98 * wave], 1)))
    with caplog.at_level(logging.WARNING, logger="multimodal"):
        for _ in range(2):
            sound(path)
        sound((np.stack([wave, -wave]), RATE))
        for good in (
            np.stack([wave, wave]),
            np.stack([wave, 0 * wave]),
            RANDOM.uniform(-1, 1, (2, 4000)),
            np.zeros((2, 99)),
        ):
            sound((good, RATE))
    assert [record.message.split(" cancel each other")[0] for record in caplog.records] == [
        f"Test: the 2 channels of '{path}'",
        "Test: the 2 channels of the sound",
    ]


# 9: loudness and resampling; what 0.1 saved


@pytest.mark.parametrize("decibels", [6, 20, 40, 60])
def test_fault_09d_loudness_does_not_matter_with_clip(decibels: int):
    time_s = np.arange(2 * RATE) / RATE
    wave = 0.3 * np.sin(2 * np.pi * 300 * time_s) * (np.sin(2 * np.pi * 3 * time_s) > 0)
    wave = (wave + 0.02 * RANDOM.standard_normal(len(wave)) * np.exp(-time_s)).astype(np.float32)
    loud, quiet = (AudioFrames()((wave * np.float32(gain), RATE)).content for gain in (1, 10 ** (-decibels / 20)))
    torch.testing.assert_close(loud, quiet, atol=1e-3, rtol=0)  # of a spread of 1
    assert AudioFrames()((np.zeros(RATE, np.float32), RATE)).content.abs().max() < 0.01


def test_fault_09e_a_configuration_of_the_first_version_keeps_its_features(wave: np.ndarray):
    new = declaration(AudioFrames(rate_hz=8000, mels=8))
    assert rebuild(json.loads(json.dumps(new))) == AudioFrames(rate_hz=8000, mels=8)
    saved = json.loads(
        '{"type": "multimodal_tokenizers.audio:AudioFrames", "config": {"rate_hz": 8000, "mels": 8, "hop_ms": 10.0, '
        '"window_ms": 25.0, "stack": 4, "normalise": "clip", "causal": false}}'
    )
    old = rebuild(saved)
    assert old == AudioFrames(rate_hz=8000, mels=8, version=1)
    assert rebuild(json.loads(json.dumps(declaration(old)))) == old
    from torchaudio.functional import resample

    tokens = old((wave * 0.01, RATE))
    wave_S = resample(torch.from_numpy(wave * 0.01), RATE, 8000)  # torchaudio's default, as 0.1 had it
    log_NF = (old._mel(torch.nn.functional.pad(wave_S, (0, 999))).T[: len(wave_S) // 80] + 1e-6).log()
    wanted_NF = (log_NF - log_NF.mean()) / (log_NF.std(correction=0) + 1e-3)
    torch.testing.assert_close(tokens.content.reshape(-1, 8)[: len(wanted_NF)], wanted_NF, atol=2e-3, rtol=0)
    assert (tokens.content - AudioFrames(rate_hz=8000, mels=8)((wave * 0.01, RATE)).content).abs().max() > 0.1
    assert AudioFrames.from_config({"rate_hz": 8000}).version == 2  # written by hand
    with pytest.raises(ConfigError, match=r"version=3 of the features must be 1 or 2"):
        AudioFrames(version=3)


def level(wave: np.ndarray) -> float:
    """Power in dB of a sine's, edges aside."""
    middle = wave[len(wave) // 4 : -len(wave) // 4].astype(np.float64)
    return float(10 * np.log10(2 * np.mean(middle**2) + 1e-20))


@pytest.mark.parametrize(
    ("rate", "hz"), [(44100, 8200), (44100, 8500), (44100, 9000), (44100, 12000), (48000, 9000), (22050, 9000)]
)
def test_fault_09f_what_lies_above_half_the_rate_is_gone(rate: int, hz: int):
    tone = np.sin(2 * np.pi * hz * np.arange(rate) / rate).astype(np.float32)
    common = np.gcd(rate, RATE)
    scipys = signal.resample_poly(tone, RATE // common, rate // common)
    assert level(sound((tone, rate))) < min(level(scipys), -75)


@pytest.mark.parametrize(
    ("rate", "hz"), [(44100, 7000), (44100, 7500), (48000, 7500), (22050, 7500), (8000, 3500), (8000, 3750)]
)
def test_fault_09g_what_lies_below_half_the_rate_stays_and_has_no_image(rate: int, hz: int):
    tone, wanted = (np.sin(2 * np.pi * hz * np.arange(r) / r).astype(np.float32) for r in (rate, RATE))
    got = sound((tone, rate))
    assert level(got) > -0.2
    assert level(got - wanted) < -35  # also none of its images above 4 kHz


# 62 and 80: lengths before decoding


def wav_header(samples: int, rate: int, channels: int = 1) -> bytes:
    size = samples * channels * 2
    body = struct.pack(
        "<4sIHHIIHH4sI", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16, b"data", size
    )
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVE" + body


@pytest.fixture(scope="module")
def silence() -> bytes:
    """Half an hour of silence at 48 kHz in a few kilobytes of FLAC, whose header is then made to say 26 hours at 16 kHz."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 48000, 8, format="FLAC") as out:
        for _ in range(30):
            out.write(np.zeros((48000, 8), np.int16))
    return file.getvalue()


def test_fault_62_a_bomb_is_refused_by_its_header(silence: bytes, monkeypatch: pytest.MonkeyPatch):
    data = bytearray(silence)
    assert data[:4] == b"fLaC"
    low = int.from_bytes(data[18:26], "big") & ~(2**36 - 1)
    data[18:26] = (low | 48000 * 3600 * 26).to_bytes(8, "big")
    read = []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, *_, **__: read.append(1))
    for value in (bytes(data), io.BytesIO(bytes(data))):
        with pytest.raises(
            MediaError, match=r"has 4492800000 samples at 48000 Hz in 8 channels, 93600 s, more than max_seconds=3600"
        ):
            sound(value)
    with pytest.raises(
        MediaError, match=r"30 s, more than max_seconds=10 allows; cut it into pieces, or raise max_seconds"
    ):
        AudioFrames(max_seconds=10)(silence)
    assert not read


def test_fault_62a_memory_stays_that_of_what_is_asked_for(silence: bytes, tmp_path: Path):
    tracemalloc.start()
    try:
        got = sound(silence, 8000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.shape == (30 * 8000,)
    assert peak < 25_000_000  # bytes, of the 46 million that all channels take
    # and files are still what other readers say
    stereo = RANDOM.uniform(-0.9, 0.9, (3001, 2)).astype(np.float32)
    path = tmp_path / "x.wav"
    for code, scale in (
        ("PCM_U8", 2**7),
        ("PCM_16", 2**15),
        ("PCM_24", 2**31),
        ("PCM_32", 2**31),
        ("FLOAT", 1),
        ("DOUBLE", 1),
    ):
        soundfile.write(path, stereo, RATE, subtype=code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of a chunk that it skips
            _, other = wavfile.read(path)
        other = (other.astype(np.float64) - (128 if code == "PCM_U8" else 0)) / scale
        np.testing.assert_allclose(sound(path), other.mean(1), atol=1e-6)


def test_fault_62b_a_flac_whose_header_does_not_know_its_length_is_read_and_bounded(wave: np.ndarray):
    data = bytearray(sound_file(wave, "FLAC"))
    data[18:26] = (int.from_bytes(data[18:26], "big") & ~(2**36 - 1)).to_bytes(8, "big")
    np.testing.assert_allclose(sound(bytes(data)), wave, atol=1 / 32768)
    with pytest.raises(MediaError, match=r"4000 samples at 16000 Hz in 1 channels, 0 s, more than max_seconds=0\.1"):
        sound(bytes(data), max_seconds=0.1)


def test_fault_80b_a_rate_of_1_hz_makes_no_sound_of_hours(tmp_path: Path):
    data = wav_header(40_000, 1) + bytes(80_000)
    with pytest.raises(
        MediaError, match=r"has 40000 samples at 1 Hz in 1 channels, 40000 s, more than max_seconds=3600"
    ):
        sound(data)
    with pytest.raises(MediaError, match="more than max_seconds=3600"):
        sound((np.zeros(40_000, np.int16), 1))
    from multimodal.media import sound_blocks

    largest = 0
    for count, (block_S, total) in enumerate(sound_blocks((np.zeros(40_000, np.int16), 1), rate_hz=1000, who="Test")):
        assert total == 40_000_000
        largest = max(largest, len(block_S))
        if count == 3:
            break
    assert largest <= 2**24
    assert sound((np.zeros(100, np.int16), 1), 1000).shape == (100_000,)


def test_fault_62c_a_longer_sound_is_read_where_that_is_asked_for():
    wave = RANDOM.integers(-999, 999, 4000 * 10, dtype=np.int16)
    with pytest.raises(MediaError, match="more than max_seconds=3"):
        AudioFrames(rate_hz=4000, mels=8, max_seconds=3)((wave, 4000))
    assert len(AudioFrames(rate_hz=4000, mels=8)((wave, 4000))) == 250
    with pytest.raises(ConfigError, match=r"max_seconds=0 must be more than 0"):
        AudioFrames(max_seconds=0)


# 14: other formats, decoders


def compressed(wave: np.ndarray, container: str, codec: str, rate: int = RATE) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "kind"),
    [
        ("ipod", "aac", "MP4"),
        ("mp4", "aac", "MP4"),
        ("adts", "aac", "AAC"),
        ("webm", "libopus", "WebM"),
        ("mov", "alac", "MP4"),
    ],
)
def test_fault_14c_sounds_of_telephones_and_browsers_are_read_where_av_is_installed(
    container: str, codec: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rate = 48000
    clear = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)
    try:
        data = compressed(clear, container, codec, rate)
    except Exception as error:
        pytest.skip(f"this build of FFmpeg writes no {codec}: {error}")
    path = tmp_path / "recorded"
    path.write_bytes(data)
    got = sound(path, rate)
    assert abs(len(got) - len(clear)) < 3000
    spectrum = np.abs(np.fft.rfft(got[4000:-4000] * np.hanning(len(got) - 8000)))
    assert abs(np.argmax(spectrum) * rate / (len(got) - 8000) - 440) < 2
    assert abs(got[4000:-4000].std() - 0.5 / np.sqrt(2)) < 0.02
    np.testing.assert_array_equal(sound(data, rate), got)
    with pytest.raises(MediaError, match=r"more than max_seconds=0\.5"):
        sound(data, rate, max_seconds=0.5)
    with pytest.raises(MediaError, match=r"as sound|cut short"):
        sound(data[: len(data) // 3], rate) if kind != "AAC" else sound(data[:40], rate)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        MediaError, match=rf"is {kind}, which the package av reads: pip install 'multimodal-stream\[media\]'"
    ):
        sound(path)


def test_fault_14d_what_a_file_is_instead_of_a_sound():
    for data, name in (
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(90), "is WMA, which the package av|as sound"),
        (b"#!AMR\n" + bytes(90), "is AMR, which the package av|as sound|no samples"),
        (b"<!DOCTYPE html><html>404", "it is an HTML page, perhaps what a server answered"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "it is a picture"),
        (b"", "it is empty"),
    ):
        with pytest.raises(MediaError, match=name) as raised:
            sound(data)
        assert len(str(raised.value)) < 300


def fake_decoder(wave: np.ndarray, rate: int = RATE, seconds: float | None = None) -> types.SimpleNamespace:
    """What torchcodec's AudioDecoder offers, as the data sets of Hugging Face hand it out."""
    samples = types.SimpleNamespace(data=torch.from_numpy(wave[None] if wave.ndim == 1 else wave), sample_rate=rate)
    metadata = types.SimpleNamespace(
        sample_rate=rate, num_channels=len(samples.data), duration_seconds_from_header=seconds
    )
    return types.SimpleNamespace(metadata=metadata, get_all_samples=lambda: samples)


def test_fault_14e_decoders_of_data_sets_are_sounds(wave: np.ndarray):
    np.testing.assert_array_equal(sound(fake_decoder(wave)), wave)
    np.testing.assert_array_equal(sound(fake_decoder(wave).get_all_samples()), wave)
    np.testing.assert_allclose(sound(fake_decoder(np.stack([wave, wave[::-1]]))), (wave + wave[::-1]) / 2, atol=1e-6)
    bomb = fake_decoder(wave, seconds=1e5)
    bomb.get_all_samples = lambda: pytest.fail("decoded")
    with pytest.raises(MediaError, match="100000 s, more than max_seconds=3600"):
        sound(bomb)


@pytest.mark.slow
def test_fault_14f_the_decoders_of_torchcodec_themselves(wave: np.ndarray, tmp_path: Path):
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    soundfile.write(tmp_path / "x.wav", wave, RATE, subtype="FLOAT")
    try:
        decoder = decoders.AudioDecoder(str(tmp_path / "x.wav"))
    except RuntimeError as error:
        pytest.skip(f"torchcodec finds no FFmpeg: {error}")
    np.testing.assert_array_equal(sound(decoder), wave)

"""Pictures and sound in: every kind that is read, against Pillow, NumPy or a formula; every kind that is refused, by message."""

import io
import logging
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from multimodal.media import read_image, read_sound
from multimodal.media.sources import paths_refused, warned
from multimodal.shapes import MediaError
from multimodal_tokenizers import AudioFrames

soundfile = pytest.importorskip("soundfile")  # GPU machines may lack it, and run the tests marked cuda alone

RATE = 16000  # Hz


def image(value: object, channels: int = 3, max_pixels: int = 2**24) -> np.ndarray:
    return read_image(value, channels=channels, max_pixels=max_pixels, who="Test").numpy()


def sound(value: object, rate_hz: int = RATE) -> np.ndarray:
    return read_sound(value, rate_hz=rate_hz, who="Test").numpy()


def file_of(picture: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def sound_file(wave: np.ndarray, kind: str = "WAV", code: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=code)
    return file.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    """(Y, X, C) uint8, neither square nor symmetric."""
    return np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)


@pytest.fixture
def wave() -> np.ndarray:
    time = np.arange(RATE // 4) / RATE
    return (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def planes(array: np.ndarray) -> np.ndarray:
    """(Y, X, C) uint8 as (C, Y, X) in 0..1."""
    return array.transpose(2, 0, 1).astype(np.float32) / 255


# Pictures that are read


def test_array_tensor_picture_bytes_path_and_open_file_are_the_same(pixels: np.ndarray, tmp_path: Path) -> None:
    rgb = pixels[:, :, :3]
    path = tmp_path / "bild ä.png"
    path.write_bytes(file_of(Image.fromarray(rgb)))
    wanted = planes(rgb)
    for value in (
        rgb,
        torch.from_numpy(rgb).permute(2, 0, 1),
        Image.fromarray(rgb),
        path,
        str(path),
        path.read_bytes(),
    ):
        np.testing.assert_array_equal(image(value), wanted)
    with path.open("rb") as file:
        np.testing.assert_array_equal(image(file), wanted)
        np.testing.assert_array_equal(image(file), wanted, err_msg="the same open file, read again")
        assert not file.closed
    np.testing.assert_array_equal(image(memoryview(path.read_bytes())), wanted)
    path.unlink()  # on Windows this fails if the file was left open


def test_grey_array_and_tensor_are_the_same(pixels: np.ndarray) -> None:
    grey = pixels[:, :, 0]
    wanted = grey[None] / np.float32(255)
    for value in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None], Image.fromarray(grey)):
        np.testing.assert_array_equal(image(value, 1), wanted)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float16", "float32", ">f4", "float64", "bool"])
def test_number_types(dtype: str) -> None:
    unit = np.array([[0, 1, 1], [1, 0, 1]])
    top = {"uint8": 255, "uint16": 65535, ">u2": 65535}.get(dtype, 1)
    np.testing.assert_array_equal(image((unit * top).astype(dtype), 1), unit[None])


def test_strided_and_read_only_arrays(pixels: np.ndarray) -> None:
    """PyTorch warns about read-only arrays and refuses negative strides; warnings are errors here."""
    locked = np.frombuffer(pixels[:, :, :3].tobytes(), np.uint8).reshape(12, 20, 3)
    assert not locked.flags.writeable
    np.testing.assert_array_equal(image(locked), planes(locked))
    np.testing.assert_array_equal(image(pixels[::-1, ::-2, 2::-1]), planes(pixels[::-1, ::-2, 2::-1]))


def test_input_is_left_alone() -> None:
    array = np.full((2, 2), 0.5, np.float32)
    read_image(array, channels=3, max_pixels=99, who="Test")
    np.testing.assert_array_equal(array, 0.5)


def test_one_pixel() -> None:
    np.testing.assert_array_equal(image(Image.new("RGB", (1, 1), (255, 0, 51))), planes(np.array([[[255, 0, 51]]])))


def test_16_bit_png_is_not_clipped() -> None:
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    value = image(file_of(Image.fromarray(deep)), 1)
    np.testing.assert_allclose(value[0], deep / 65535, atol=1e-6)
    assert abs(value.mean() - 0.5) < 1e-3


def test_16_bit_pgm() -> None:
    deep = np.array([[0, 1000, 65535]], ">u2")
    np.testing.assert_allclose(image(b"P5 3 1 65535\n" + deep.tobytes(), 1)[0], deep / 65535, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_without_transparency(mode: str, pixels: np.ndarray) -> None:
    picture = Image.fromarray(pixels[:, :, :3]).convert(mode)
    np.testing.assert_allclose(image(picture), planes(np.asarray(picture.convert("RGB"))), atol=1e-6)


@pytest.mark.parametrize("source", ["RGBA", "LA", "PA", "P", "P file", "L file", "RGB file"])
def test_see_through_pixels_lie_on_white(source: str, pixels: np.ndarray) -> None:
    if source == "RGBA":
        picture = Image.fromarray(pixels)
    elif source == "LA":
        picture = Image.fromarray(pixels).convert("LA")
    elif source == "PA":
        picture = Image.fromarray(pixels[:, :, :3]).quantize(16)
        picture.putalpha(Image.fromarray(pixels[:, :, 3]))
        assert picture.mode == "PA"
    else:  # one colour is declared to be seen through
        picture = Image.fromarray(pixels[:, :, 0] // 64).convert("RGB" if source == "RGB file" else "L")
        through: object = 2
        if source.startswith("P"):
            picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
            assert picture.mode == "P"
        elif source == "RGB file":
            through = (2, 2, 2)
        if source == "P":
            picture.info["transparency"] = 2
        else:
            picture = Image.open(io.BytesIO(file_of(picture, transparency=through)))
            assert "transparency" in picture.info
    layer = picture.convert("RGBA")
    alpha = np.asarray(layer)[:, :, 3]
    assert alpha.min() < 128 < alpha.max()
    wanted = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), layer).convert("RGB")
    np.testing.assert_allclose(image(picture), planes(np.asarray(wanted)), atol=1.01 / 255)


def test_channels_as_pillow_converts_them(pixels: np.ndarray) -> None:
    rgb, grey = Image.fromarray(pixels[:, :, :3]), Image.fromarray(pixels[:, :, 0])
    np.testing.assert_allclose(image(rgb, 1)[0], np.asarray(rgb.convert("L")) / 255, atol=1.01 / 255)
    for picture in (rgb, grey):
        for channels, mode in ((3, "RGB"), (4, "RGBA")):
            np.testing.assert_allclose(image(picture, channels), planes(np.asarray(picture.convert(mode))), atol=1e-6)
    np.testing.assert_array_equal(image(Image.fromarray(pixels), 4), planes(pixels))
    on_white = Image.alpha_composite(Image.new("RGBA", (20, 12), "white"), Image.fromarray(pixels)).convert("L")
    np.testing.assert_allclose(image(pixels, 1)[0], np.asarray(on_white) / 255, atol=2.01 / 255)


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied(kind: str, orientation: int, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(pixels[:, :, :3]), kind, exif=exif)
    np.testing.assert_array_equal(image(data), planes(TURNS[orientation](pixels[:, :, :3])))


# Pictures that are refused


def header_of_png(width: int, height: int) -> bytes:
    """A grey PNG of that size with next to no data behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_a_huge_picture_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_000)).save(path)
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    tracemalloc.start()
    try:
        with pytest.raises(
            MediaError, match=r"Test: '.*huge.png' is 10000x10000 pixels \(100 million\), more than max_p"
        ):
            image(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not decoded
    assert peak < 2_000_000  # bytes, of the hundred million that its pixels take
    path.unlink()


def test_the_limit_itself() -> None:
    assert image(np.zeros((4, 5)), max_pixels=20).shape == (3, 4, 5)
    for value in (np.zeros((4, 5)), torch.zeros(4, 5), Image.new("L", (5, 4)), file_of(Image.new("L", (5, 4)))):
        with pytest.raises(
            MediaError, match=r"4x5 pixels \(0 million\), more than max_pixels=19; shrink it first or raise"
        ):
            image(value, max_pixels=19)


def test_pillows_own_bomb_limits_do_not_leak_out() -> None:
    with pytest.raises(MediaError, match=r"is 10000x9500 pixels"):  # Pillow would warn
        image(header_of_png(9500, 10_000))
    with pytest.raises(MediaError, match=r"cannot read .* bytes as a picture: Image size .* exceeds limit"):
        image(header_of_png(50_000, 50_000))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^Test: there is no file '.*none\.png'$"):
        image(tmp_path / "none.png")
    with pytest.raises(MediaError, match=r"^Test: there is no file '.*' \(it is a folder\)$"):
        image(str(tmp_path))
    with pytest.raises(MediaError, match=r"^Test: there is no file '.*' \(it is a folder\)$"):
        sound(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_cut_short(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(MediaError, match=r"^Test: cannot read '.*cut\..*' as a picture: ."):
        image(path)
    path.unlink()


@pytest.mark.parametrize("junk", [b"", b"\0", b"junk" * 99, b"P5 4x 4 255\n" + bytes(99), header_of_png(8, 80)])
def test_junk(junk: bytes) -> None:
    with pytest.raises(MediaError, match=rf"^Test: cannot read {len(junk)} bytes as a picture: ."):
        image(junk)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "PPM", "TIFF"])
def test_damage_anywhere_is_read_or_refused_but_never_fails_otherwise(kind: str) -> None:
    noise = np.random.default_rng(0)
    data = file_of(Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)), kind)
    refused = []
    for _ in range(60):
        damaged = bytearray(data)
        for at in noise.integers(0, min(len(data), 300), 6):
            damaged[at] = noise.integers(256)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *_, **__: None)  # Pillow's remarks are not what is tested
                image(bytes(damaged), max_pixels=2**16)
        except MediaError as error:
            refused.append(str(error).startswith("Test: "))
    assert refused
    assert all(refused)


NOT_PICTURES = [
    (np.full((2, 2), np.nan), r"ndarray \(2, 2\) float64 has pixels that are not finite \(NaN or infinity\)"),
    (np.array([[0, np.inf]]), "not finite"),
    (torch.tensor([[0, -torch.inf]]), "not finite"),
    (np.array([[0.0, 255.0]]), r"runs from 0 to 255; floats are wanted in 0\.\.1, so divide by the largest value"),
    (np.array([[-1.0, 1.0]]), r"runs from -1 to 1; floats are wanted in 0\.\.1"),
    (
        np.zeros((2, 2), np.int32),
        r"ndarray \(2, 2\) int32 has no known range; give uint8 \(0\.\.255\), uint16 .* or floats",
    ),
    (np.zeros((2, 2), np.int64), "has no known range"),
    (np.zeros((2, 2), np.complex64), "has no known range"),
    (torch.zeros(2, 2, dtype=torch.int16), "has no known range"),
    (Image.fromarray(np.zeros((2, 2), np.int32)), r"int32 has no known range"),
    (Image.fromarray(np.full((2, 2), 200, np.float32)), r"runs from 200 to 200"),
    (np.zeros(5), r"ndarray \(5,\) float64 is no picture; wanted an array \(Y, X\) or \(Y, X, C\), or a tensor"),
    (np.zeros((1, 5, 5, 3)), "is no picture"),
    (np.zeros((3, 5, 5)), "is no picture"),
    (torch.zeros(5, 5, 3), "is no picture"),
    (np.zeros((5, 5, 2)), r"with C of 1, 3 or 4"),
    (np.zeros((0, 5, 3)), "is no picture"),
    (np.zeros((0, 0)), "is no picture"),
    (np.array([["a", "b"]]), "does not hold numbers"),
    (np.array([[None]]), "does not hold numbers"),
    (None, "wanted a file, a PIL image, an array or a tensor, not NoneType None"),
    (7, "not int 7"),
    ([[0.0]], r"not list \(list \(float 0.0\)\)"),
]


@pytest.mark.parametrize(("value", "message"), NOT_PICTURES, ids=range(len(NOT_PICTURES)))
def test_not_a_picture(value: object, message: str) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        image(value)
    assert str(raised.value).startswith("Test: ")


# Sounds that are read


def test_path_bytes_open_file_pair_and_mapping_are_the_same(wave: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "klang ä.wav"
    path.write_bytes(sound_file(wave, code="FLOAT"))
    for value in (
        path,
        str(path),
        path.read_bytes(),
        (wave, RATE),
        [torch.from_numpy(wave), float(RATE)],
        (wave.astype(np.float64), np.int64(RATE)),
        {"array": wave, "sampling_rate": RATE, "path": None},
        (wave[None], RATE),
    ):
        np.testing.assert_array_equal(sound(value), wave)
    with path.open("rb") as file:
        np.testing.assert_array_equal(sound(file), wave)
        np.testing.assert_array_equal(sound(file), wave, err_msg="the same open file, read again")
    path.unlink()


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC"])
def test_kinds_of_file_without_loss(kind: str, wave: np.ndarray) -> None:
    np.testing.assert_allclose(sound(sound_file(wave, kind, "PCM_16")), wave, atol=1 / 32768)


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_kinds_of_file_with_loss(kind: str, wave: np.ndarray) -> None:
    got = sound(sound_file(wave, kind))
    assert got.shape == wave.shape
    assert np.corrcoef(got, wave)[0, 1] > 0.98


def test_mp3_that_libsndfile_reads_from_a_path_only(
    wave: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """libsndfile 1.2.2 refuses MP3 from memory at times, whatever it holds; other errors make no copy."""
    path, plain, tried = tmp_path / "sound.mp3", sound_file(wave), []
    path.write_bytes(sound_file(wave, "MP3"))
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))

    class Refusing(soundfile.SoundFile):
        def __init__(self, file: object, *args: object, **settings: object) -> None:
            tried.append(type(file))
            if not isinstance(file, Path):
                raise soundfile.LibsndfileError(149, f"Error opening {file!r}: ")
            super().__init__(file, *args, **settings)

        def __del__(self) -> None:  # one that was refused has nothing to close
            pass

    wanted = sound(path)
    monkeypatch.setattr(soundfile, "SoundFile", Refusing)
    tag = b"ID3\4\0\0\0\0\0\x10" + bytes(16)
    for data in (path.read_bytes(), tag + path.read_bytes()):
        np.testing.assert_allclose(sound(data), wanted, atol=1e-6)
    with path.open("rb") as file:
        np.testing.assert_array_equal(sound(file), wanted)
        np.testing.assert_array_equal(sound(file), wanted, err_msg="the same open file, read again")
    for data, times in ((b"ID3" + bytes(99), 2), (plain, 1)):
        tried.clear()
        with pytest.raises(MediaError, match=rf"cannot read {len(data)} bytes as sound: Error"):
            sound(data)
        assert len(tried) == times
    assert not list((tmp_path / "copies").iterdir())


@pytest.mark.parametrize(
    ("dtype", "zero", "scale"), [("int8", 0, 2**7), ("uint8", 128, 2**7), ("int16", 0, 2**15), ("int32", 0, 2**31)]
)
def test_integers_of_every_width(dtype: str, zero: int, scale: int, wave: np.ndarray) -> None:
    steps = np.round(wave.astype(np.float64) * scale) + zero
    np.testing.assert_allclose(sound((steps.astype(dtype), RATE)), wave, atol=0.6 / scale + 1e-6)
    edge = np.array([np.iinfo(dtype).min, zero, np.iinfo(dtype).max], dtype)
    np.testing.assert_allclose(sound((edge, RATE)), [-1, 0, 1 - 1 / scale], atol=1e-7)


def test_channels_are_averaged(wave: np.ndarray) -> None:
    left, right = wave, wave[::-1].copy()
    for value in ((np.stack([left, right]), RATE), sound_file(np.stack([left, right], 1), code="FLOAT")):
        np.testing.assert_allclose(sound(value), (left + right) / 2, atol=1e-6)
    np.testing.assert_allclose(sound((np.stack([left, right]).astype(">f4"), RATE)), (left + right) / 2, atol=1e-6)


def test_read_only_wave(wave: np.ndarray) -> None:
    np.testing.assert_array_equal(sound((np.frombuffer(wave.tobytes(), np.float32), RATE)), wave)


def test_a_streamed_header_promises_nothing(wave: np.ndarray) -> None:
    data = bytearray(sound_file(wave, code="PCM_16"))
    assert data[36:40] == b"data"
    for size in (0xFFFFFFFF, 0x7FFFF000):  # what ffmpeg and sox write into a pipe
        data[40:44] = struct.pack("<I", size)
        assert sound(bytes(data)).shape == wave.shape


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_sine(rate: int) -> None:
    """A sine below both limits is the same sine at any rate, edges aside."""
    at_rate, wanted = (np.sin(2 * np.pi * 1000 * np.arange(r) / r).astype(np.float32) for r in (rate, RATE))
    got = sound((at_rate, rate))
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got[500:-500], wanted[500:-500], atol=0.01)


def test_resampling_is_logged_once(wave: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    warned.clear()
    with caplog.at_level(logging.WARNING, logger="multimodal"):
        for _ in range(2):
            sound((wave, 8000))
        sound((wave, RATE))
    assert [record.message for record in caplog.records] == ["Test: resampling 8000 Hz to 16000 Hz"]
    with caplog.at_level(logging.WARNING, logger="multimodal"):
        sound((wave, 48000))
    assert caplog.records[-1].message == "Test: resampling 48000 Hz to 16000 Hz"


# Sounds that are refused


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC", "MP3"])
@pytest.mark.parametrize("missing", [2, 1000, 0.5])
def test_sound_cut_short(kind: str, missing: float, tmp_path: Path) -> None:
    """libsndfile itself is silent about most of these."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    data = sound_file(noise, kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: -int(missing * len(data)) if missing < 1 else -int(missing)])
    with pytest.raises(
        MediaError,
        match=r"'.*cut\.bin' (holds \d+ (bytes|samples) of the \d+ that its header promises; it was cut short|as sound)",
    ):
        sound(path)
    path.unlink()


def test_wav_cut_short_says_by_how_much(wave: np.ndarray) -> None:
    data = sound_file(wave, code="PCM_16")  # 44 bytes of header, 2 a sample
    with pytest.raises(
        MediaError, match=f"holds 1000 bytes of the {2 * len(wave)} that its header promises; it was cut sh"
    ):
        sound(data[:1044])
    with pytest.raises(MediaError, match=f"holds 0 bytes of the {2 * len(wave)} that its header promises"):
        sound(data[:44])


@pytest.mark.parametrize("junk", [b"", b"RIFF", b"RIFF\x24\0\0\0WAVEfmt ", b"junk" * 99])
def test_junk_sound(junk: bytes, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=rf"^Test: cannot read {len(junk)} bytes as sound: ."):
        sound(junk)
    (tmp_path / "junk.wav").write_bytes(junk)
    with pytest.raises(MediaError, match=r"^Test: cannot read '.*junk\.wav' as sound: ."):
        sound(tmp_path / "junk.wav")


def test_corrupt_wav_header(wave: np.ndarray) -> None:
    data = bytearray(sound_file(wave, code="PCM_16"))
    data[20:22] = struct.pack("<H", 0x1234)  # an unknown codec
    with pytest.raises(MediaError, match=r"cannot read .* as sound"):
        sound(bytes(data))


@pytest.mark.parametrize(
    "value",
    [(np.zeros(0, np.float32), RATE), (np.zeros((2, 0)), RATE), (np.zeros((0, 5)), RATE), sound_file(np.zeros(0))],
)
def test_sound_of_no_length(value: object) -> None:
    with pytest.raises(MediaError, match=r"^Test: the sound has no samples$"):
        sound(value)


@pytest.mark.parametrize("rate", [0, -1, 0.5, 16000.5, "16k", True, None, float("nan"), float("inf"), 10**9, np.True_])
def test_wrong_rates(rate: object, wave: np.ndarray) -> None:
    for value in ((wave, rate), {"array": wave, "sampling_rate": rate}):
        with pytest.raises(MediaError, match=r"^Test: the rate .* is not a whole number of samples a second \(Hz\)"):
            sound(value)


def test_rates_that_would_take_gigabytes_are_refused(wave: np.ndarray) -> None:
    with pytest.raises(
        MediaError, match="16001 Hz and 16000 Hz have only 1 as a common divisor, which takes too large a f"
    ):
        sound((wave, 16001))


NOT_SOUNDS = [
    (
        np.zeros(9),
        r"wanted a file or a pair \(wave, rate_hz\), not ndarray \(9,\) float64; an array alone does not say its rate",
    ),
    (torch.zeros(9), r"not Tensor \(9,\) torch.float32; an array alone"),
    (None, "not NoneType None"),
    ({"array": np.zeros(9)}, "wanted a file or a pair"),
    ((RATE, np.zeros(9)), r"the wave is int 16000; wanted an array or a tensor, \(S,\) or \(channels, S\)"),
    (([0.0, 0.1, 0.2], RATE), r"the wave is list \(float 0.0, float 0.1, float 0.2\); wanted an array"),
    (
        (np.zeros((9, 1, 1)), RATE),
        r"the wave is ndarray \(9, 1, 1\) float64; wanted \(S,\) or \(channels, S\) with at most 16",
    ),
    ((np.zeros((RATE, 20)), RATE), "at most 16 channels"),
    ((np.float64(0), RATE), "the wave is float64"),
    ((np.array(0.0), RATE), r"the wave is ndarray \(\) float64; wanted"),
    ((np.array([0.0, np.nan]), RATE), r"the sound has samples that are not finite \(NaN or infinity\)"),
    ((np.array([0.0, -np.inf]), RATE), "not finite"),
    (
        (np.zeros(9, np.int64), RATE),
        r"ndarray \(9,\) int64, which has no known range; give int16, int32 or floats in -1..1",
    ),
    ((np.zeros(9, np.uint16), RATE), "has no known range"),
    ((np.zeros(9, bool), RATE), "has no known range"),
    ((np.zeros(9, np.complex64), RATE), "has no known range"),
    ((np.array(["a"]), RATE), "does not hold numbers"),
]


@pytest.mark.parametrize(("value", "message"), NOT_SOUNDS, ids=range(len(NOT_SOUNDS)))
def test_not_a_sound(value: object, message: str) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        sound(value)
    assert str(raised.value).startswith("Test: ")


# The spectrogram


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear up to 1000 Hz (15 mel), then 27 mel for every factor of 6.4."""
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def corners(audio: AudioFrames) -> np.ndarray:
    """Left corner, peaks, and right corner of the triangular bands, in Hz."""
    return mel_to_hz(np.linspace(0, hz_to_mel(np.array(audio.rate_hz / 2)), audio.mels + 2))


def log_mel(wave: np.ndarray, audio: AudioFrames) -> np.ndarray:
    """The log-mel spectrogram (frames, mels) from its definition, in double precision."""
    hop, window = round(audio.rate_hz * audio.hop_ms / 1000), round(audio.rate_hz * audio.window_ms / 1000)
    size = 1 << (window - 1).bit_length()
    taper = np.zeros(size)
    left = (size - window) // 2
    taper[left : left + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(wave), hop)
    padded = np.concatenate([wave.astype(np.float64), np.zeros(size)])
    power = np.stack([np.abs(np.fft.rfft(padded[s : s + size] * taper)) ** 2 for s in starts])
    edge, hz = corners(audio), np.arange(size // 2 + 1) * audio.rate_hz / size
    bands = []
    for low, peak, high in zip(edge, edge[1:], edge[2:], strict=False):
        triangle = np.minimum((hz - low) / (peak - low), (high - hz) / (high - peak)).clip(0)
        bands.append(triangle * 2 / (high - low))
    mel = power @ np.array(bands).T
    if audio.normalise == "clip" and audio.version == 2:  # the floor is a share of the loudest
        return np.log(mel / max(mel.max(), 1e-30) + 1e-7)
    return np.log(mel + 1e-6)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 399, 400, 512, 513, 5000])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("normalise", ["fixed", "clip"])
def test_spectrogram_is_its_definition(samples: int, normalise: str, version: int) -> None:
    audio = AudioFrames(normalise=normalise, version=version)  # type: ignore[arg-type]
    wave = np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)
    wanted = log_mel(wave, audio)
    wanted = (wanted + 6) / 4 if normalise == "fixed" else (wanted - wanted.mean()) / (wanted.std() + 1e-3)
    np.testing.assert_allclose(audio.spectrogram(torch.from_numpy(wave)).numpy(), wanted, atol=2e-3)


@pytest.mark.parametrize("hz", [300.0, 1000.0, 2500.0, 6000.0])
def test_a_sine_lights_the_band_of_its_pitch(hz: float) -> None:
    audio = AudioFrames()
    wave = torch.sin(2 * torch.pi * hz * torch.arange(RATE) / RATE)
    peaks = corners(audio)[1:-1]
    loudest = audio.spectrogram(wave)[20].argmax()
    assert loudest == np.abs(hz_to_mel(peaks) - hz_to_mel(np.array(hz))).argmin()


@settings(max_examples=8, deadline=None)
@given(duration_s=st.floats(0.05, 30), stack=st.integers(1, 5), hop_ms=st.sampled_from([8.0, 10.0, 12.5]))
def test_number_and_places_of_tokens(duration_s: float, stack: int, hop_ms: float) -> None:
    audio = AudioFrames(rate_hz=8000, mels=8, stack=stack, hop_ms=hop_ms)
    samples = round(8000 * duration_s)
    tokens = audio((np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32), 8000))
    hop = round(8 * hop_ms)
    assert len(tokens) == -(-samples // (hop * stack))
    starts_s = np.arange(len(tokens)) * stack * hop / 8000
    np.testing.assert_allclose(tokens.position_NA[:, 0], starts_s, rtol=1e-6)
    assert not tokens.position_NA[:, 1:].any()


def test_places_are_true_seconds_when_the_hop_is_no_whole_number_of_samples() -> None:
    """10 ms are 220.5 samples at 22050 Hz: places count the samples that are really hopped over."""
    audio = AudioFrames(rate_hz=22050, stack=1)
    last = audio((np.ones(220 * 1001, np.float32), 22050)).position_NA[-1, 0]
    assert float(last) == pytest.approx(220 * 1000 / 22050, rel=1e-6)
    assert audio.step[0] == pytest.approx(220 / 22050)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_another_rate_lies_on_the_same_places(rate: int) -> None:
    audio = AudioFrames()

    def chirp(at_hz: int) -> np.ndarray:
        time = np.arange(2 * at_hz) / at_hz
        return (0.5 * np.sin(2 * np.pi * (200 + 600 * time) * time)).astype(np.float32)

    one, other = audio((chirp(RATE), RATE)), audio((chirp(rate), rate))
    torch.testing.assert_close(one.position_NA, other.position_NA, rtol=0, atol=0)
    below = corners(audio)[2:] < 3500  # both rates carry these bands
    low = [tokens.content.unflatten(1, (audio.stack, audio.mels))[:-1, :, below].flatten() for tokens in (one, other)]
    assert torch.corrcoef(torch.stack(low))[0, 1] > 0.97


def test_loudness_does_not_matter_with_clip() -> None:
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    quiet, loud = (AudioFrames().encode((wave * gain, RATE)).content for gain in (0.25, 1.0))
    torch.testing.assert_close(quiet, loud, atol=1e-2, rtol=0)
    quiet, loud = (AudioFrames(normalise="fixed").encode((wave * gain, RATE)).content for gain in (0.25, 1.0))
    torch.testing.assert_close(loud - quiet, torch.full_like(loud, 2 * np.log(4) / 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 100, 399])
@pytest.mark.parametrize("normalise", ["clip", "fixed"])
def test_clips_shorter_than_a_window(samples: int, normalise: str) -> None:
    tokens = AudioFrames(normalise=normalise)((np.full(samples, 0.1, np.float32), RATE))  # type: ignore[arg-type]
    assert len(tokens) == 1
    assert tokens.content.isfinite().all()


def test_silence() -> None:
    assert AudioFrames()((np.zeros(RATE, np.float32), RATE)).content.abs().max() < 0.01


def test_within_a_context_no_file_is_opened_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(Image.new("L", (2, 2))))
    soundfile.write(tmp_path / "a.wav", np.zeros(9, np.float32), RATE)
    for read, path in ((image, tmp_path / "a.png"), (sound, tmp_path / "a.wav")):
        wanted = read(path)
        with paths_refused():
            for named in (path, str(path), {"path": str(path), "bytes": None}):
                with pytest.raises(MediaError, match="no file is opened by its name"):
                    read(named)
            np.testing.assert_array_equal(read(path.read_bytes()), wanted)
        np.testing.assert_array_equal(read(str(path)), wanted)

"""Faults 4, 8, 12, 13, 14, 62, 80 and 81 of pictures: what is read, against Pillow, NumPy or a formula, and what is refused."""

import base64
import binascii
import io
import logging
import struct
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, ImageFile

from multimodal.media import read_image, read_sound
from multimodal.shapes import MediaError
from multimodal.tokenizer import describe
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
RANDOM = np.random.default_rng(0)


def image(value: object, channels: int = 3, max_pixels: int = 2**24) -> np.ndarray:
    return read_image(value, channels=channels, max_pixels=max_pixels, who="Test").numpy()


def file_of(picture: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


COLOUR = {1: 0, 3: 2, 2: 4, 4: 6}  # PNG's colour type by number of channels


def png(
    array: np.ndarray,
    *,
    bits: int = 16,
    through: bytes = b"",
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """A PNG made by hand of (Y, X, C); grey of fewer than 8 bits has a width that fills its bytes."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, down, right in passes for row in array[y::down, x::right] if row.size]
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    elif bits == 8:
        packed = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        packed = [np.packbits((row.reshape(-1, 1) >> np.arange(bits)[::-1]) & 1).tobytes() for row in rows]
    size = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, COLOUR[array.shape[2]], 0, 0, int(interlaced))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    transparent = chunk(b"tRNS", through) if through else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + before + transparent + data + after + chunk(b"IEND", b"")


def tiff(
    array: np.ndarray, *, order: str = "<", compression: int = 1, predictor: int = 1, planar: int = 1, extra: int | None = None,
    rows: int = 5, tile: int | None = None, tags: dict[int, int] | None = None,
) -> bytes:  # fmt: skip
    """A TIFF of 16 bits made by hand of (Y, X, C), in strips of `rows` or in square tiles."""
    height, width, count = array.shape
    planes = [array] if planar == 1 else [array[:, :, i : i + 1] for i in range(count)]
    parts = []
    for plane in planes:
        step_y, step_x = (tile, tile) if tile else (rows, width)
        for y in range(0, height, step_y):
            for x in range(0, width, step_x):
                part = plane[y : y + step_y, x : x + step_x]
                if tile:
                    part = np.pad(part, ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)))
                if predictor == 2:
                    part = np.diff(part, axis=1, prepend=np.zeros_like(part[:, :1]))
                raw = part.astype(order + "u2").tobytes()
                parts.append(zlib.compress(raw) if compression == 8 else raw)
    fields: dict[int, list[int]] = {256: [width], 257: [height], 258: [16] * count, 259: [compression], 277: [count]}
    fields |= {262: [2 if count > 2 else 1], 284: [planar], 317: [predictor]}
    fields |= {338: [extra]} if extra is not None else {}
    fields |= {322: [tile], 323: [tile]} if tile else {278: [rows]}
    fields |= {tag: [value] for tag, value in (tags or {}).items()}
    offsets, sizes = (324, 325) if tile else (273, 279)
    fields |= {offsets: [0] * len(parts), sizes: [len(part) for part in parts]}
    table = 8 + 2 + 12 * len(fields) + 4
    start = table + sum(4 * len(values) for values in fields.values() if len(values) > 1)
    fields[offsets] = [start + sum(map(len, parts[:i])) for i in range(len(parts))]
    directory, outside = struct.pack(order + "H", len(fields)), b""
    for tag, values in sorted(fields.items()):
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(values) > 1:
            outside += packed
            packed = struct.pack(order + "L", table + len(outside) - len(packed))
        directory += struct.pack(order + "HHL", tag, 4, len(values)) + packed
    head = struct.pack(order + "2sHL", b"II" if order == "<" else b"MM", 42, 8)
    return head + directory + bytes(4) + outside + b"".join(parts)


# 4: only what is decoded in the process


def test_fault_04_no_picture_starts_another_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    started = []

    def ghostscript(*_args: object, **_settings: object) -> object:
        started.append(1)
        return Image.new("RGB", (10, 10)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "cat.png"
    path.write_bytes(EPS)
    for value in (path, EPS, io.BytesIO(EPS), b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS):
        with pytest.raises(MediaError, match=r"cannot read .* as a picture: it is EPS or PostScript.*save it as PNG"):
            image(value)
    with pytest.raises(MediaError, match=r"the PIL image is EPS and not decoded yet.*call its load\(\) first"):
        image(Image.open(io.BytesIO(EPS)))
    assert not started
    trusted = Image.open(io.BytesIO(EPS))
    trusted.load()  # what the user has decoded is read
    assert started == [1]
    assert image(trusted).shape == (3, 10, 10)


def test_fault_04a_shards_do_not_draw_eps_either(monkeypatch: pytest.MonkeyPatch):
    from multimodal.data.codecs import encoded

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    with pytest.raises(MediaError, match="is EPS and not decoded yet"):
        encoded(Image.open(io.BytesIO(EPS)))
    assert not started


def test_fault_04b_formats_of_photographs_are_read_and_others_never_reach_their_decoder(
    monkeypatch: pytest.MonkeyPatch,
):
    rgb = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for kind in ("BMP", "PNG", "TIFF", "PPM", "TGA", "PCX", "SGI", "ICNS", "ICO", "DIB"):
        picture = Image.fromarray(rgb)
        got = image(file_of(picture.resize((16, 16)) if kind in ("ICO", "ICNS") else picture, kind))
        if kind not in ("ICO", "ICNS"):
            np.testing.assert_array_equal(got, rgb.transpose(2, 0, 1).astype(np.float32) / 255)
    opened = []
    Image.init()
    for kind in ("SPIDER", "MSP"):
        factory, accept = Image.OPEN[kind]
        monkeypatch.setitem(
            Image.OPEN,
            kind,
            (lambda *a, k=kind, f=factory: opened.append(k) or f(*a), accept),  # type: ignore[func-returns-value]
        )
    for kind in ("SPIDER", "MSP"):
        data = file_of(Image.new({"SPIDER": "F", "MSP": "1"}[kind], (8, 8)), kind)
        with pytest.raises(MediaError, match="it is no picture of a format that is read here"):
            image(data)
    assert not opened


# 8: frames, orientation, 16 bits


def frames_of(kind: str) -> bytes:
    colours = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return file_of(
        colours[0], kind, save_all=True, append_images=colours[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_fault_08_frames_after_the_first_are_announced(kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    from multimodal.media import sources

    sources.warned.clear()
    path = tmp_path / "moving.bin"
    path.write_bytes(frames_of(kind))
    with caplog.at_level(logging.WARNING, logger="multimodal"):
        first = image(path)
        image(path)
        image(file_of(Image.new("RGB", (8, 8))))
    wanted = f"Test: '{path}' holds 3 frames; only the first is read, as of every {kind} file with several"
    assert [record.message for record in caplog.records] == [wanted]
    np.testing.assert_allclose(first[:, 4, 4], [1, 0, 0], atol=0.02)


def test_fault_08a_an_icon_of_several_sizes_says_which_is_read(caplog: pytest.LogCaptureFixture):
    from multimodal.media import sources

    sources.warned.clear()
    data = file_of(Image.new("RGB", (64, 64), "red"), "ICO", sizes=[(16, 16), (64, 64)])
    with caplog.at_level(logging.WARNING, logger="multimodal"):
        assert image(data).shape == (3, 64, 64)
    assert [record.message for record in caplog.records] == [
        f"Test: {len(data)} bytes holds 2 pictures; only the largest is read, as of every ICO file with several"
    ]


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation={}/></rdf:RDF></x:xmpmeta>'
PACKETS = (XMP.format('"6"'), XMP.format("'6'"), "<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>")


def profile(name: str, data: bytes) -> bytes:
    """ImageMagick's text for a block of metadata, as a chunk of a PNG."""
    digits = binascii.hexlify(data).decode()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    text = f"\n{name}\n{len(data):8d}\n{lines}\n".encode()
    return chunk(b"zTXt", b"Raw profile type " + name.encode() + b"\0\0" + zlib.compress(text))


def turned_files(rgb: np.ndarray) -> dict[str, bytes]:
    picture = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    files = {}
    for i, packet in enumerate(PACKETS):
        text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet.encode())
        files[f"png xmp {i}"] = png(rgb, bits=8, before=text)
        files[f"webp xmp {i}"] = file_of(picture, "WEBP", lossless=True, xmp=packet.encode())
        files[f"tiff xmp {i}"] = file_of(picture, "TIFF", tiffinfo={700: packet.encode()})
    files["png raw exif"] = png(rgb, bits=8, before=profile("exif", block))
    files["png raw APP1 exif"] = png(rgb, bits=8, before=profile("APP1", block))
    files["png raw xmp"] = png(rgb, bits=8, before=profile("xmp", PACKETS[0].encode()))
    files["png raw APP1 xmp"] = png(
        rgb, bits=8, before=profile("APP1", b"http://ns.adobe.com/xap/1.0/\0" + PACKETS[0].encode())
    )
    files["png exif behind the pixels"] = png(rgb, bits=8, after=chunk(b"eXIf", block[6:]))
    files["png xmp, 16 bits"] = png(
        rgb.astype(np.uint16) * 257, before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + PACKETS[0].encode())
    )
    files["tiff, 16 bits"] = tiff(rgb.astype(np.uint16) * 257, tags={274: 6})
    return files


def test_fault_08b_orientation_in_xmp_and_in_raw_profiles_is_applied():
    rgb = RANDOM.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    wanted = np.rot90(rgb, -1).transpose(2, 0, 1).astype(np.float32) / 255
    wrong = [name for name, data in turned_files(rgb).items() if not np.array_equal(image(data), wanted)]
    assert wrong == []
    for i, packet in enumerate(PACKETS):  # JPEG keeps XMP in a block of its own
        data = file_of(
            Image.fromarray(np.kron(rgb, np.ones((8, 8, 1), np.uint8))), "JPEG", quality=95, xmp=packet.encode()
        )
        assert image(data).shape == (3, 160, 96), i


def test_fault_08c_exif_that_says_upright_wins_over_xmp_and_damaged_metadata_loses_no_picture():
    rgb = RANDOM.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 1
    both = file_of(Image.fromarray(rgb), "WEBP", lossless=True, exif=exif, xmp=PACKETS[0].encode())
    assert image(both).shape == (3, 12, 20)
    assert image(png(rgb, bits=8, before=profile("exif", b"Exif\0\0junk"))).shape == (3, 12, 20)
    bad = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n    9\nzz not hex")
    assert image(png(rgb, bits=8, before=bad)).shape == (3, 12, 20)
    turned = image(png(rgb, bits=8, before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format('"6"').encode())))
    assert turned.shape == (3, 20, 12)


def test_fault_08d_png_of_16_bits_is_exact():
    for channels in (1, 2, 3, 4):
        deep = RANDOM.integers(0, 65536, (13, 9, channels)).astype(np.uint16)
        unit = deep.transpose(2, 0, 1).astype(np.float32) / 65535
        wanted = unit if channels > 2 else np.concatenate([unit[:1]] * 3 + ([unit[1:]] if channels == 2 else []))
        out = 4 if channels in (2, 4) else 3
        for interlaced in (False, True):
            np.testing.assert_array_equal(image(png(deep, interlaced=interlaced), out), wanted)
        lazy = Image.open(io.BytesIO(png(deep)))  # opened by the user, not decoded yet
        np.testing.assert_array_equal(image(lazy, out), wanted)
        lazy.load()  # and still whole for the user
        np.testing.assert_array_equal(
            np.asarray(lazy.convert("L")), np.asarray(Image.open(io.BytesIO(png(deep))).convert("L"))
        )
        with pytest.raises(MediaError, match="as a picture"):
            image(png(deep)[:-60])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["strips", "deflate", "differences", "tiles", "tiles of differences", "planes"])
def test_fault_08e_tiff_of_16_bits_is_exact(order: str, form: str):
    settings: dict[str, dict] = {
        "strips": {},
        "deflate": {"compression": 8},
        "differences": {"compression": 8, "predictor": 2},
        "tiles": {"tile": 16},
        "tiles of differences": {"tile": 16, "compression": 8, "predictor": 2},
        "planes": {"planar": 2},
    }
    for channels in (3, 4):
        if form == "planes" and channels == 4:
            continue
        deep = RANDOM.integers(0, 65536, (21, 37, channels)).astype(np.uint16)
        extra = 2 if channels == 4 else None
        data = tiff(deep, order=order, extra=extra, **settings[form])
        got = image(data, channels)
        np.testing.assert_array_equal(got, deep.transpose(2, 0, 1).astype(np.float32) / 65535)


def test_fault_08f_16_bits_of_pnm_and_levels_of_grey_tiff():
    deep = RANDOM.integers(0, 1024, (5, 7, 3)).astype(">u2")
    got = image(b"P6 7 5 1023\n" + deep.tobytes())
    np.testing.assert_allclose(got, deep.transpose(2, 0, 1) / 1023, atol=1e-6)
    grey = RANDOM.integers(0, 65536, (5, 7, 1)).astype(np.uint16)
    white_is_zero = image(tiff(grey, tags={262: 0}), 1)
    np.testing.assert_allclose(white_is_zero[0], 1 - grey[:, :, 0] / 65535, atol=1e-6)


# 12: data: URLs, base64, and messages that stay short


def test_fault_12_a_data_url_is_a_value():
    rgb = RANDOM.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(rgb))
    code = base64.b64encode(data).decode()
    wanted = image(data)
    lines = "\n".join(code[i : i + 76] for i in range(0, len(code), 76))
    for url in (
        "data:image/png;base64," + code,
        "data:;base64," + code,
        "DATA:image/png;charset=utf-8;BASE64," + lines,
        "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
        "data:image/png," + "".join(f"%{byte:02X}" for byte in data),
        {"bytes": None, "path": "data:image/png;base64," + code},
    ):
        np.testing.assert_array_equal(image(url), wanted)
    from tests.media.test_media import sound_file

    wave = (0.5 * np.sin(np.arange(800) / 9)).astype(np.float32)
    url = "data:audio/wav;base64," + base64.b64encode(sound_file(wave, code="FLOAT")).decode()
    np.testing.assert_array_equal(read_sound(url, rate_hz=16000, who="Test"), wave)


LONG = "".join(chr(97 + i % 26) for i in range(1_900_000))


SHORTENED: list[tuple[object, str]] = [
    (
        base64.b64encode(bytes(range(256)) * 5000).decode(),
        r"characters look like base64, so give 'data:image/png;base64",
    ),
    ("data:image/png;base64," + "A" * 10**6 + "!", r"a data: URL of 1000023 characters is not base64"),
    ("data:image/png;base64" + "A" * 10**6, r"is a data: URL without a comma"),
    (
        "data:image/png;base64," + base64.b64encode(b"junk" * 10**5).decode(),
        r"a data: URL of \d+ characters as a picture",
    ),
    (
        "https://example.org/cat.png?x=" + "y" * 10**5,
        r"'https://example.org/cat.png\?x=.* is a URL.* download it first",
    ),
    ("s3://bucket/" + "y" * 10**5, r"'s3://bucket/y.* is a URL"),
    ("file:///pictures/cat.png", r"'file:///pictures/cat.png' is a URL of a local file; give its path"),
    ("no such folder/" + "é" * 10**5, r"there is no file 'no such folder/"),
    ("nul\0" + "y" * 10**5, r"there is no file 'nul"),
    ([LONG, LONG], r"not list \(str 'abc"),
    ([[[[[LONG] * 3] * 3] * 3] * 3] * 3, r"wanted a file, a PIL image"),
    ({"a": LONG, LONG: 1}, r"not dict \{"),
    ({"bytes": None, "path": None}, "both 'bytes' and 'path' are None"),
    (io.StringIO("text"), "is open as text; open it as bytes"),
]


def test_fault_12a_no_message_shows_a_whole_value():
    for i, (value, message) in enumerate(SHORTENED):
        for read in (image, lambda v: read_sound(v, rate_hz=16000, who="Test")):
            with pytest.raises(MediaError, match=message if read is image else r"^Test: .") as raised:
                read(value)
            assert len(str(raised.value)) < 400, i


def test_fault_12b_every_kind_shows_values_shortened():
    import multimodal as mm

    model = mm.Model(
        {"image": ImagePatches(patch=4), "text": TextBytes(), "label": Labels(("a", "b" * 5000))},
        mm.Core.tiny(),
        ["image -> label"],
    )
    calls = [
        lambda: Labels(("a", "b")).encode(LONG),
        lambda: Labels(("a", LONG)).encode("c"),
        lambda: Labels(("a", "b"), several=True).encode(LONG),
        lambda: Labels((LONG, LONG)),
        lambda: TextBytes()([LONG]),
        lambda: TextBytes()(LONG + "\ud800"),
        lambda: TextBytes()(LONG),
        lambda: ImagePatches()(LONG),
        lambda: model.packer.check_task(LONG),
        lambda: model.predict("image -> label", {LONG: 1}),
        lambda: model.predict("image -> label", image=LONG),
    ]
    for i, call in enumerate(calls):
        began = time.process_time()
        with pytest.raises(ValueError, match=r".") as raised:
            call()
        assert len(str(raised.value)) < 900, i
        assert time.process_time() - began < 2, i


def test_fault_12c_describe_is_quick_and_short_for_anything():
    class Loud:
        def __repr__(self) -> str:
            raise RuntimeError

    endless: list = []
    endless.append(endless)
    for value in (
        Loud(),
        endless,
        list(range(10**6)),
        dict.fromkeys(range(10**6)),
        10**4000,
        LONG,
        LONG.encode(),
        (LONG,) * 3,
    ):
        began = time.process_time()
        assert len(describe(value)) <= 200
        assert time.process_time() - began < 0.5


# 13: sides


def test_fault_13_a_narrow_side_keeps_one_patch_and_messages_speak_of_what_was_given():
    narrow = np.zeros((120, 8000, 3), np.uint8)
    tokens = ImagePatches(max_side=512, patch=16)(narrow)
    assert tokens.position_NA.amax(0).tolist() == [0, 0, 31]
    assert len(ImagePatches(max_side=512, patch=16)(narrow.transpose(1, 0, 2))) == 32
    with pytest.raises(MediaError, match=r"image is 8x8000 pixels, smaller than one patch=16"):
        ImagePatches(max_side=512, patch=16)(narrow[:8])
    with pytest.raises(
        MediaError, match=r"image is 313x8000 pixels \(20x512 after max_side=512\), which patch=16 does not"
    ):
        ImagePatches(max_side=512, patch=16, edge="error")(np.zeros((313, 8000, 3), np.uint8))


# 14: HEIC, decoders of videos, foreign files


def test_fault_14_heic_is_read_where_its_package_is_installed(monkeypatch: pytest.MonkeyPatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    rgb = np.kron(RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(rgb)).save(file, quality=95)
    got = image(file.getvalue())
    assert np.abs(got - rgb.transpose(2, 0, 1) / 255).mean() < 0.02
    with pytest.raises(MediaError, match=r"is 64x96 pixels .* more than max_pixels=100"):
        image(file.getvalue(), max_pixels=100)
    with pytest.raises(MediaError, match="as a picture"):
        image(file.getvalue()[:-500])
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(
        MediaError, match=r"is HEIC, which the package pillow-heif reads: pip install 'multimodal-stream\[media\]'"
    ):
        image(file.getvalue())


def test_fault_14a_avif_is_read_and_files_of_other_kinds_are_called_by_their_names():
    rgb = np.kron(RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    Image.init()
    if "AVIF" in Image.SAVE:
        # with all of its colours: halved ones are further away for some of the random pictures
        data = file_of(Image.fromarray(rgb), "AVIF", quality=95, subsampling="4:4:4")
        assert np.abs(image(data) - rgb.transpose(2, 0, 1) / 255).mean() < 0.02
    for data, name in (
        (b"\0\0\0\x18ftypmp42" + bytes(50), "it is MP4"),
        (b"\x1a\x45\xdf\xa3" + bytes(50), "it is WebM"),
        (b"%PDF-1.7" + bytes(50), "it is a PDF document; save its pages as PNG"),
        (b"<?xml version='1.0'?><svg/>", "it is SVG"),
        (b"\n<!DOCTYPE html><html>", "it is an HTML page, perhaps what a server answered"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "it is empty"),
    ):
        with pytest.raises(MediaError, match=rf"^Test: cannot read {len(data)} bytes as a picture: .*{name}"):
            image(data)


def test_fault_14b_a_decoder_of_a_video_gives_its_first_frame_and_says_so(caplog: pytest.LogCaptureFixture):
    from multimodal.media import sources

    sources.warned.clear()
    frames = torch.from_numpy(RANDOM.integers(0, 256, (5, 3, 8, 12), dtype=np.uint8))
    metadata = types.SimpleNamespace(width=12, height=8, num_frames=5)
    video = types.SimpleNamespace(metadata=metadata, get_frame_at=lambda i: types.SimpleNamespace(data=frames[i]))
    with caplog.at_level(logging.WARNING, logger="multimodal"):
        np.testing.assert_array_equal(image(video), frames[0] / 255)
    assert "a video of 5 frames; only the first is read" in caplog.text
    metadata.width = 10**5
    with pytest.raises(MediaError, match="is 8x100000 pixels"):
        image(video, max_pixels=1000)
    with pytest.raises(MediaError, match="a decoder of a video is no sound"):
        read_sound(video, rate_hz=16000, who="Test")


# 80: sizes before decoding


def icon(inside: bytes, kind: str) -> bytes:
    if kind == "ICO":
        return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside
    return b"icns" + struct.pack(">L", len(inside) + 16) + b"ic07" + struct.pack(">L", len(inside) + 8) + inside


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_fault_80_an_icon_is_not_decoded_before_it_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch):
    huge = file_of(Image.new("1", (9000, 9000)))
    assert len(huge) < 200_000
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    with pytest.raises(MediaError, match=r"bytes is 9000x9000 pixels \(81 million\), more than max_pixels=16777216"):
        image(icon(huge, kind))
    assert not decoded
    small = file_of(Image.new("RGB", (128, 128), "red"))
    assert image(icon(small, kind)).shape == (3, 128, 128)


def test_fault_80a_a_tile_larger_than_its_picture_is_not_decoded():
    deep = np.zeros((16, 16, 1), np.uint16)
    data = tiff(deep, tile=16, compression=8)
    at = data.index(struct.pack("<HHLL", 322, 4, 1, 16))
    bomb = data[:at] + struct.pack("<HHLLHHLL", 322, 4, 1, 30_000, 323, 4, 1, 30_000) + data[at + 24 :]
    with pytest.raises(MediaError, match=r"a tile of \d+ bytes is 30000x30000 pixels"):
        image(bomb, 1)
    np.testing.assert_array_equal(image(data, 1), 0)


# 81: transparency


def test_fault_81_the_grey_that_is_seen_through_lies_on_white():
    for bits in (1, 2, 4, 8, 16):
        levels = RANDOM.integers(0, min(2**bits, 5), (6, 8, 1)).astype(np.uint16)
        levels[0, :2, 0] = 0, 1
        data = png(levels, bits=bits, through=struct.pack(">H", 1))
        unit, seen = levels[:, :, 0] / (2**bits - 1), levels[:, :, 0] != 1
        got = image(data, 4)
        np.testing.assert_array_equal(got[3], seen.astype(np.float32), err_msg=f"{bits} bits")
        np.testing.assert_allclose(got[0], unit, atol=1e-6)
        np.testing.assert_allclose(image(data, 1)[0], np.where(seen, unit, 1), atol=1e-6)
    # what Pillow has always converted rightly
    rgb = RANDOM.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    through = file_of(Image.fromarray(rgb).quantize(8), transparency=bytes([0, 128, 255]))
    wanted = np.asarray(Image.open(io.BytesIO(through)).convert("RGBA")).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(image(through, 4), wanted)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    smooth = Image.fromarray(np.kron(rgb[:3, :4] // 2 + 60, np.ones((4, 4, 1), np.uint8)))
    for kind, picture in (
        ("TIFF", smooth.convert("CMYK")),
        ("JPEG", smooth.convert("CMYK")),
        ("TIFF", smooth.convert("YCbCr")),
        ("TIFF", ImageCms.applyTransform(smooth, to_lab)),
    ):
        data = file_of(picture, kind)
        try:
            wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1) / np.float32(255)
        except OSError:  # Pillow 12.3 does not read the YCbCr TIFF that it wrote, and we say so
            assert picture.mode == "YCbCr"
            with pytest.raises(MediaError):
                image(data, 3)
            continue
        np.testing.assert_array_equal(image(data), wanted)


def test_fault_81a_the_colour_of_16_bits_that_is_seen_through():
    deep = RANDOM.integers(0, 65536, (6, 8, 3)).astype(np.uint16)
    deep[2, 3], deep[4, 5] = (256, 2, 3), (257, 2, 3)  # the same in 8 bits
    got = image(png(deep, through=struct.pack(">HHH", 256, 2, 3)), 4)
    assert np.argwhere(got[3] == 0).tolist() == [[2, 3]]
    np.testing.assert_array_equal(got[:3], deep.transpose(2, 0, 1).astype(np.float32) / 65535)


def test_fault_04c_the_allow_list_names_no_decoder_outside_the_process():
    from multimodal.media import pictures

    assert not {"EPS", "WMF", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC"} & set(pictures.FORMATS)

"""Clips as tubes: conformance, the same numbers as a convolution, times at other rates and of files, and what is refused."""

import fractions
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.check.values import plausible_values
from multimodal.heads import FlowMatching
from multimodal.media import read_video
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import ImagePatches, Labels, VideoTubes

READ = VideoTubes(patch=4, frames=2, fps=10.0, channels=3)
WRITTEN = VideoTubes(patch=2, frames=3, fps=25.0, channels=1, position="rotary", size=(6, 4, 2))
KINDS = [READ, WRITTEN]
GREY = VideoTubes(patch=2, frames=2, fps=10.0, channels=1)


def clip(frames=6, rows=8, columns=12, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, rows, columns, channels), dtype=np.uint8)


def numbered(frames: int) -> np.ndarray:
    """Grey frames, of which the n-th has the level 8 n everywhere."""
    return np.broadcast_to(8 * np.arange(frames, dtype=np.uint8)[:, None, None], (frames, 16, 16)).copy()


def seen(value, fps: float) -> list[int]:
    """The numbers of the frames that are read of `numbered` ones."""
    frames = read_video(value, fps=fps, channels=1, max_pixels=2**20, who="test")
    return (frames.mean((1, 2, 3)) * 255 / 8).round().int().tolist()


def file_of(frames: np.ndarray, rate: int, ending: str, codec: str, pixels: str) -> bytes:
    """The frames (N, Y, X) as a file."""
    av = pytest.importorskip("av")
    data = io.BytesIO()
    with av.open(data, "w", format=ending) as out:
        track = out.add_stream(codec, rate=rate)
        track.height, track.width, track.pix_fmt = frames.shape[1], frames.shape[2], pixels
        track.time_base = fractions.Fraction(1, rate)
        for frame in frames:
            out.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format=pixels)))
        out.mux(track.encode(None))
    return data.getvalue()


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, tubes in enumerate(KINDS)
        for check in tokenizer_checks(tubes, tubes.examples())
    ],
)
def test_conformance(check):
    check()


@pytest.mark.parametrize("tubes", KINDS)
def test_examples_are_values(tubes):
    assert len(plausible_values(tubes)) == 3


def test_a_linear_layer_of_tubes_is_a_convolution():
    """Compared with torch's convolution, whose kernel and stride are a tube."""
    video = torch.from_numpy(clip()).permute(0, 3, 1, 2) / 255
    tokens = READ(video)
    conv = nn.Conv3d(3, 5, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    wanted = conv((video.transpose(0, 1) - 0.5) / 0.5)  # (5, times, rows, columns)
    # a tube has its frames first, then channels
    weight = conv.weight.transpose(1, 2).flatten(1)
    rows = tokens.content[:, : READ.pixel_features] @ weight.T + conv.bias
    places = (tokens.position_NA / torch.tensor(READ.step)).round().long()
    assert len(tokens) == 3 * 2 * 3
    for row, (time, y, x) in zip(rows, places.tolist(), strict=True):
        torch.testing.assert_close(row, wanted[:, time, y, x], atol=1e-5, rtol=0)


def test_tubes_of_one_frame_are_the_patches_of_a_picture():
    picture = clip(frames=1)
    tubes, patches = VideoTubes(patch=4, frames=1)(picture), ImagePatches(patch=4)(picture[0])
    assert torch.equal(tubes.content[:, :48], patches.content[:, :48])
    assert torch.equal(tubes.position_NA, patches.position_NA)


def test_places_are_seconds_rows_and_columns():
    tokens = READ(clip(frames=4, rows=4, columns=8))
    assert tokens.position_NA.tolist() == [[t, 0, x] for t in (0, pytest.approx(0.2)) for x in (0, 1)]
    assert READ.token_names(tokens)[-1] == "0.2 s, row 0, column 1"


def test_ends_repeat_to_a_whole_tube():
    value = clip(frames=3, rows=5, columns=6, channels=1)
    whole = np.pad(value, ((0, 1), (0, 1), (0, 0), (0, 0)), mode="edge")
    assert torch.equal(GREY(value).content, GREY(whole).content)


@pytest.mark.parametrize(
    "same",
    [
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
        lambda x: x / 255,
        list,
        lambda x: [Image.fromarray(frame) for frame in x],
        lambda x: (x, 10.0),
        lambda x: (list(x), 10),
    ],
)
def test_the_same_clip_in_another_form(same):
    value = clip()
    torch.testing.assert_close(READ(same(value)).content, READ(value).content, atol=1e-6, rtol=0)


def test_frames_at_another_rate_are_those_that_are_seen_then():
    """Compared with the frame whose time has come last, found by numpy."""
    for rate, fps, count in ((30, 8, 31), (25, 10, 25), (24, 30, 12), (10, 10, 7), (29.97, 5, 20), (8, 2, 1)):
        shown = np.arange(0, count / rate - 0.002, 1 / fps)
        wanted = np.searchsorted(np.arange(count) / rate - 0.002, shown, side="right") - 1
        assert seen((numbered(count), rate), fps) == wanted.tolist(), (rate, fps)


@pytest.mark.parametrize(
    ("ending", "codec", "pixels"), [("matroska", "ffv1", "gray"), ("mp4", "mpeg4", "yuv420p"), ("avi", "ffv1", "gray")]
)
def test_a_file_has_the_frames_that_were_written(ending, codec, pixels):
    data = file_of(numbered(12), 10, ending, codec, pixels)
    assert seen(data, 10.0) == list(range(12))
    assert seen(data, 5.0) == list(range(0, 12, 2))
    assert seen(data, 20.0) == [i // 2 for i in range(24)]


def test_a_lossless_file_has_the_same_tokens(tmp_path):
    frames = clip(frames=6, channels=1)[..., 0]
    (tmp_path / "clip.mkv").write_bytes(file_of(frames, 10, "matroska", "ffv1", "gray"))
    wanted = GREY(frames)
    for value in (str(tmp_path / "clip.mkv"), tmp_path / "clip.mkv", (tmp_path / "clip.mkv").read_bytes()):
        found = GREY(value)
        torch.testing.assert_close(found.content, wanted.content, atol=2e-2, rtol=0)  # through RGB and back to grey
        assert torch.equal(found.position_NA, wanted.position_NA)


def test_a_clip_of_a_turned_telephone_is_upright():
    """The header says: turn by a quarter, clockwise. So what is bright at the top belongs to the right."""
    frames = np.zeros((4, 16, 32), np.uint8)
    frames[:, :8] = 240
    data = file_of(frames, 10, "mp4", "mpeg4", "yuv420p")
    one, minus = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    upright = b"".join([one, zero, zero, zero, one, zero, zero, zero, last])
    turned = b"".join([zero, one, zero, minus, zero, zero, zero, zero, last])
    track = data.index(b"tkhd")
    at = data.index(upright, track)
    found = read_video(data[:at] + turned + data[at + 36 :], fps=10.0, channels=1, max_pixels=2**20, who="test")
    assert found.shape == (4, 1, 32, 16)
    assert found[..., 9:].min() > 0.8
    assert found[..., :7].max() < 0.2


class Decoder:
    """What torchcodec's VideoDecoder offers."""

    class metadata:
        num_frames, average_fps = 12, 20.0

    def get_frame_at(self, i):
        return torch.from_numpy(numbered(12)[i])[None]


def test_a_decoder_of_torchcodec_is_read():
    assert seen(Decoder(), 10.0) == list(range(0, 12, 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no such file.mp4", "there is no file 'no such file.mp4'"),
        (b"RIFF....WAVE", "cannot read 12 bytes as a video: it is no MP4, WebM, AVI or GIF"),
        (b"", "0 bytes as a video: it is empty"),
        (b"\0\0\0\x18ftypmp42" + bytes(60), "cannot read 72 bytes as a video"),
        (clip()[0, :, :, 0], r"wanted a file, an array \(frames, Y, X, C\), .* not ndarray \(8, 12\) uint8"),
        (clip().transpose(0, 3, 1, 2), r"frame 0: ndarray \(3, 8, 12\) uint8 is no picture"),
        ([clip()[0], clip(rows=4)[0]], "frame 1 is 4x12 pixels, the first 8x12; bring all to one size"),
        (clip()[:0], "has no frames; to leave a field out, give None"),
        ([], "has no frames"),
        ((clip(), 0.0), "0 frames per second; wanted more than 0"),
        (clip(rows=3), "frames of 3x12 pixels are smaller than one patch=4"),
        (
            np.zeros((2**14, 64, 64), np.uint8),
            r"more than 8192 frames .* more than max_pixels=33554432; cut or shrink it",
        ),
        (7, "not int 7"),
    ],
)
def test_bad_values_are_refused_by_name(value, message):
    with pytest.raises(MediaError, match=f"^VideoTubes.encode.*{message}"):
        READ(value)


def test_a_sound_is_no_clip():
    av = pytest.importorskip("av")
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as out:
        track = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(track.encode(frame))
        out.mux(track.encode(None))
    with pytest.raises(MediaError, match="is MP4 without a video track"):
        READ(data.getvalue())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 0}, "patch=0 must be a whole number, 1 or more"),
        ({"channels": 2}, "channels=2 must be 1, 3 or 4"),
        ({"fps": 0.0}, "fps=0.0 and std=0.5 must be more than 0"),
        ({"position": "learned"}, "position='learned' 'sincos' or 'rotary'"),
        ({"size": (3, 16, 16)}, r"size=\(3, 16, 16\) must be frames, .* multiples of \(2, 16, 16\)"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=f"^VideoTubes: .*{message}"):
        VideoTubes(**settings)


def test_only_clips_of_a_known_size_are_written():
    with pytest.raises(ConfigError, match=r"give it size=\(frames, rows, columns\)"):
        READ.places(1)
    with pytest.raises(ConfigError, match=r"places\(5\), but a clip of size=\(6, 4, 2\) has 4 tubes"):
        WRITTEN.places(5)


def test_alone_packed_and_cached_are_the_same(lively):
    tasks = ["read -> label", mm.Task("label -> written", FlowMatching(width=16, depth=1, steps=2))]
    tokenizers = {"read": READ, "written": WRITTEN, "label": Labels(("yes", "no"))}
    result = verify(lively(mm.Model(tokenizers, mm.Core(width=32, depth=2, heads=2), tasks)))
    assert result.passed, str(result)
    assert {row.check for row in result.rows} >= {"packed", "gradient", "cached"}


def dots(count: int, seed: int) -> list[dict]:
    """A bar of three pixels that moves left or right through noise, and comes back on the other side; and its last frame alone."""
    draw, samples = np.random.default_rng(seed), []
    for i in range(count):
        frames = draw.uniform(0, 0.3, (4, 8, 8)).astype(np.float32)
        row, column = draw.integers(6), draw.integers(8)
        for t in range(4):
            frames[t, row : row + 3, (column + (t if i % 2 else -t)) % 8] = 1
        samples.append({"clip": frames, "frame": frames[-1:], "label": ("left", "right")[i % 2]})
    return samples


def test_only_several_frames_tell_where_something_moves():
    """One frame is of the same distribution both ways: without the others the same model is at chance."""
    train, test, right = dots(256, 0), dots(128, 1), {}
    for field in ("clip", "frame"):
        task = f"{field} -> label"
        kinds = {field: VideoTubes(patch=4, frames=2, fps=10.0, channels=1), "label": Labels(("left", "right"))}
        model = mm.Model(kinds, mm.Core(width=32, depth=1, heads=2), [task])
        mm.fit(model, {task: train}, steps=60, batch=32, lr=5e-3, device="cpu", precision="float32", quiet=True)
        right[field] = mm.evaluate(model, task, test)["exact"]
    assert right["clip"] > 0.9
    assert right["frame"] < 0.65

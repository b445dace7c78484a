"""What an attack on clips, clouds and lists found: files that are cut short, covers, alpha, hours of one frame, heights."""

import fractions
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.media import read_video, videos
from multimodal_tokenizers import Ids, Joint, Labels, Points, Sequence, TextBytes, VideoTubes

av = pytest.importorskip("av")
NUMBERED = np.broadcast_to(8 * np.arange(12, dtype=np.uint8)[:, None, None], (12, 16, 16)).copy()


def made(ending: str, codec: str, pixels: str, frames: Any = NUMBERED, form: str = "gray", **settings: Any) -> bytes:
    """Frames as a file, at 10 a second or at the times `at`, in tenths of a second."""
    data = io.BytesIO()
    with av.open(data, "w", format=ending) as out:
        out.metadata.update(settings.get("metadata", {}))
        track = out.add_stream(codec, rate=10)
        track.height, track.width, track.pix_fmt = frames.shape[1], frames.shape[2], pixels
        track.time_base = fractions.Fraction(1, 10)
        for i, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format=form).reformat(format=pixels)
            image.pts, image.time_base = settings.get("at", range(len(frames)))[i], fractions.Fraction(1, 10)
            out.mux(track.encode(image))
        out.mux(track.encode(None))
    return data.getvalue()


def seen(value: Any, fps: float = 10.0, channels: int = 1, max_pixels: int = 2**20) -> torch.Tensor:
    return read_video(value, fps=fps, channels=channels, max_pixels=max_pixels, who="test")


@pytest.mark.parametrize(
    ("ending", "codec", "pixels"), [("matroska", "ffv1", "gray"), ("mp4", "mpeg4", "yuv420p"), ("avi", "ffv1", "gray")]
)
def test_a_file_that_is_cut_short_is_no_shorter_clip(ending, codec, pixels, tmp_path):
    """FFmpeg gives the frames that are there, as if they were all."""
    whole = made(ending, codec, pixels)
    assert len(seen(whole)) == 12
    for share in (0.95, 0.7, 0.4):
        (tmp_path / "clip").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(mm.MediaError, match=r"clip' as a video: this .* file is cut short; get it again"):
            seen(tmp_path / "clip")


def test_a_title_in_another_encoding_is_no_fault_of_a_clip():
    data = made("avi", "ffv1", "gray", metadata={"title": "Zwoelf"}).replace(b"Zwoelf", b"Zw\xf6lf.")
    assert torch.equal(seen(data), seen(made("avi", "ffv1", "gray")))


def test_the_cover_of_a_sound_is_no_clip():
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as out:
        sound, cover = out.add_stream("aac", rate=16000), out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        wave.rate = 16000
        image = av.VideoFrame.from_ndarray(np.full((16, 16), 128, np.uint8), format="gray").reformat(format="yuvj420p")
        for track, frame in ((sound, wave), (cover, image)):
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    with pytest.raises(mm.MediaError, match="is MP4 without a video track"):
        seen(data.getvalue())


def test_transparent_pixels_of_a_clip_are_white_as_those_of_a_picture():
    frames = np.zeros((2, 16, 16, 4), np.uint8)
    frames[:, :8, :, 3] = 255
    data = made("matroska", "ffv1", "bgra", frames, "rgba")
    assert seen(data)[0, 0, [0, 15], 0].tolist() == [0.0, 1.0]
    torch.testing.assert_close(seen(data, channels=4), torch.from_numpy(frames).permute(0, 3, 1, 2) / 255)


def test_frames_without_times_follow_one_another():
    frames = [SimpleNamespace(time=None, number=i) for i in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videos, "_pixels", lambda frame: frame.number)
        assert list(videos._at_rate(iter(frames), 10.0, 5.0)) == list(range(0, 12, 2))
        assert list(videos._at_rate(iter(frames), 10.0, 20.0)) == [i // 2 for i in range(24)]


def test_hours_of_one_frame_are_decoded_once_and_refused_in_time(monkeypatch):
    asked = []
    reads = videos.read_image
    monkeypatch.setattr(videos, "read_image", lambda *args, **named: asked.append(1) or reads(*args, **named))
    assert len(seen(made("matroska", "ffv1", "gray", NUMBERED[:2], at=[0, 1000]))) == 1001
    assert len(seen((NUMBERED[:2], 0.01))) == 2000
    for value in (
        made("matroska", "ffv1", "gray", NUMBERED[:2], at=[0, 10**9]),
        (NUMBERED[:2], 1e-9),
        (NUMBERED[:2, :1, :1], 1e-9),
    ):
        with pytest.raises(mm.MediaError, match=r"the clip has more than 4096 frames .* more than max_pixels=1048576"):
            seen(value)
    assert len(asked) == 7


def test_frames_larger_than_the_header_says_are_refused():
    data = made("avi", "mpeg4", "yuv420p", np.zeros((2, 512, 512), np.uint8))
    size = (512).to_bytes(4, "little")
    small = data.replace(size + size, (16).to_bytes(4, "little") * 2)
    assert small != data
    with pytest.raises(mm.MediaError):
        seen(small, max_pixels=2**12)


def ply(names: str, rows: list[str], count: int | None = None) -> bytes:
    head = ["ply", "format ascii 1.0", f"element vertex {len(rows) if count is None else count}"]
    return "\n".join([*head, *(f"property double {name}" for name in names.split()), "end_header", *rows, ""]).encode()


def test_a_height_is_no_feature_and_a_feature_is_no_height():
    pytest.importorskip("plyfile")
    plane, space = Points((0.0, 0.0), 1.0, (0.0,), (1.0,)), Points((0.0, 0.0, 0.0), 1.0)
    with pytest.raises(mm.MediaError, match="are in space, with z, and these lie in a plane"):
        plane(ply("x y z", ["1 2 3"]))
    with pytest.raises(mm.MediaError, match="have x, y, heat; wanted x, y and z first"):
        space(ply("x y heat", ["1 2 3"]))
    wanted = plane(np.array([[1.0, 2.0, 3.0]])).content
    for data in (ply("x y heat", ["1 2 3"]), ply("x y z heat", ["1 2 0 3"])):
        assert torch.equal(plane(data).content, wanted)
    assert Points.of([ply("x y z heat", ["1 2 0 3", "2 3 0 4"])], dims=2).mean == (3.5,)


@pytest.mark.parametrize("count", [2, 10**6, 10**13, 2**63, -1])
def test_a_header_that_promises_more_points_than_there_are_is_refused(count):
    pytest.importorskip("plyfile")
    binary = ply("x y", [], count).replace(b"ascii", b"binary_little_endian") + np.zeros(2).tobytes()
    for data in (ply("x y", ["1 2"], count), binary):
        with pytest.raises(mm.MediaError, match=r"Points.encode: cannot read .* bytes as points: "):
            Points((0.0, 0.0), 1.0)(data)


def test_keys_are_no_list_of_classes_and_sets_have_no_order():
    labels = Labels(("cat", "dog", "97"), several=True)
    for wrong in ({"cat": 0, "dog": 1}, b"a"):
        with pytest.raises(mm.MediaError, match="several=True wants a list of names"):
            labels(wrong)
        with pytest.raises(mm.ConfigError, match="several=True wants lists of names"):
            Labels.from_data([wrong], several=True)
        with pytest.raises(mm.ConfigError, match="wanted the labels of all samples"):
            Labels.from_data(wrong)
    assert labels({"cat", "dog"}).content.tolist() == [[1, 1, 0]]  # in any order the same
    assert Labels.from_data(["9" * 5000, "1"]).names == ("1", "9" * 5000)
    texts = Sequence(of=TextBytes())
    pd = pytest.importorskip("pandas")
    for wrong in ({"a", "b"}, pd.DataFrame({"a": ["x"]})):
        with pytest.raises(mm.MediaError, match=r"Sequence.encode: wanted a list of values"):
            texts(wrong)
    assert len(texts({"a": 1, "b": 2}.keys())) == len(texts(["a", "b"])) == len(texts(pd.Series(["a", "b"])))


def test_ids_that_float32_cannot_tell_apart_are_no_content_of_a_joint_token():
    with pytest.raises(mm.ConfigError, match=r"Joint: a has 16777217 ids"):
        Joint(a=Ids(2**24 + 1))
    joint = Joint(a=Ids(2**24))
    assert joint.decode(joint({"a": [2**24 - 1]})) == {"a": [2**24 - 1]}


def test_a_clip_of_a_small_rate_takes_no_memory_to_refuse():
    with pytest.raises(mm.MediaError, match="more than max_pixels"):
        VideoTubes(patch=2, channels=1, max_pixels=2**12)((np.zeros((2, 2, 2), np.uint8), 1e-12))

"""Classes of pixels: conformance, patches by hand, maps in files, the grid of the picture, torch's loss, digits that are found."""

import base64
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import multimodal as mm
from multimodal.check import check_task, tokenizer_checks, verify
from multimodal.cli.commands import main
from multimodal.heads import EachRow
from multimodal.media import read_map
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal_tokenizers import ImagePatches, Labels, Segments, TextBytes
from multimodal_tokenizers.fit import Fit
from tests.serve.conftest import data_url, serving

NAMES = ("sky", "sea", "sand")
GREY = ImagePatches(patch=4, channels=1)
MAP = Segments(NAMES, GREY)
TASK = "image -> map"
CHECKED = [
    MAP,
    Segments(("a", "b"), ImagePatches(patch=2, size=(4, 6))),
    Segments(NAMES, replace(GREY, fit=Fit((8, 8)))),
]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, kind in enumerate(CHECKED)
        for check in tokenizer_checks(kind, kind.examples())
        if i == 0 or str(check) not in ("fresh_process", "worker_process", "trains")
    ],
)
def test_every_check_passes(check):
    check()


def numbers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A map of random classes, a few of them not known."""
    return np.random.default_rng(seed).integers(-1, len(NAMES), (rows, columns))


def pictures(*shapes: tuple[int, int]) -> list[dict[str, Any]]:
    """Samples of random pictures with random maps."""
    draw = np.random.default_rng(1)
    return [
        {"image": draw.random(shape, dtype=np.float32), "map": numbers(*shape, seed=i)}
        for i, shape in enumerate(shapes)
    ]


def model_of(kind: Segments = MAP, **more: Any) -> mm.Model:
    kinds = {"image": kind.image, "map": kind, **more}
    return mm.Model(kinds, mm.Core(width=32, depth=1, heads=2), [mm.Task(TASK, EachRow(of="image"))])


# tokens


def test_a_token_has_the_classes_of_the_pixels_of_its_patch():
    kind = Segments(("a", "b"), ImagePatches(patch=2, channels=1))
    tokens = kind([[0, 1, 1, 1], [-1, 1, 0, 255]])
    assert tokens.content.tolist() == [[1, 0, 0, 1, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0, 0, 0]]
    assert tokens.position_NA.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert kind.one_hot == 2
    assert kind.decode(tokens).tolist() == [[0, 1, 1, 1], [-1, 1, 0, -1]]
    assert kind.token_names(tokens) == ["row 0, column 0", "row 0, column 1"]


@pytest.mark.parametrize(
    "same", [np.array, torch.tensor, lambda x: np.array(x, np.float32), lambda x: np.array(x).astype(np.uint8), list]
)
def test_a_map_may_have_any_type_of_whole_numbers(same):
    rows = numbers(4, 8).tolist()
    assert torch.equal(MAP(same(rows)).content, MAP(np.array(rows)).content)


def test_names_are_numbers_too():
    value = numbers(4, 8)
    named = [[{-1: None, 0: "sky", 1: "sea", 2: "sand"}[n] for n in row] for row in value.tolist()]
    assert np.array_equal(MAP.decode(MAP(named)), value)
    assert MAP.decode(MAP(np.array([["sea"] * 4] * 4))).tolist() == [[1] * 4] * 4


# files


def test_a_file_has_a_colour_for_each_class_and_255_for_what_is_not_known(tmp_path):
    value = numbers(8, 4)
    path = MAP.write(value, tmp_path / "map")
    assert path.name == "map.png"
    image = Image.open(path)
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), np.where(value < 0, 255, value))
    colours = np.asarray(image.convert("RGB"))
    wanted = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), -1: (224, 224, 192)}  # of Pascal VOC
    assert all(tuple(colour) == wanted[n] for n, colour in zip(value.ravel(), colours.reshape(-1, 3), strict=True))
    shown = MAP.picture(MAP(value))
    assert shown is not None
    assert np.array_equal((shown * 255).round().numpy(), colours)
    for again in (path, str(path), path.read_bytes(), image, data_url(path.read_bytes())):
        assert np.array_equal(MAP.decode(MAP(again)), value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_numbers_of_pixels_are_read_as_they_are(mode, tmp_path):
    value = numbers(4, 8).clip(0, 1 if mode == "1" else None)
    array = value.astype({"1": bool, "I;16": np.uint16, "I": np.int32}.get(mode, np.uint8))
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([7, 7, 7] * 256)  # all of one colour
    assert image.mode == mode
    path = tmp_path / ("m.tiff" if mode == "I" else "m.png")
    more: dict[str, Any] = {"bits": 2} if mode == "P" else {}
    image.save(path, **more)
    assert np.array_equal(read_map(path, max_pixels=99, who="x"), value)
    assert np.array_equal(read_map(image, max_pixels=99, who="x"), value)


def test_grey_of_few_bits_is_not_scaled(tmp_path):
    """Pillow shows levels 0 to 3 of a 2-bit grey PNG as 0, 85, 170, 255."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = [[0, 1, 2, 3], [3, 2, 1, 0]]
    packed = b"".join(bytes([0, a << 6 | b << 4 | c << 2 | d]) for a, b, c, d in rows)
    header = struct.pack(">IIBBBBB", 4, 2, 2, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    assert read_map(data, max_pixels=99, who="x").tolist() == rows


def test_a_map_is_turned_as_its_file_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    value = numbers(4, 8).clip(0)
    Image.fromarray(value.astype(np.uint8)).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(read_map(tmp_path / "m.png", max_pixels=99, who="x"), np.rot90(value, -1))


# the grid of the picture


@pytest.mark.parametrize(
    ("settings", "shape", "known"),
    [
        ({}, (9, 14), (9 * 14) / (12 * 16)),
        ({"edge": "cut"}, (11, 14), 1),
        ({"max_side": 24}, (40, 30), (24 * 18) / (24 * 20)),
        ({"fit": Fit((16, 24))}, (40, 30), 1),
        ({"fit": Fit(shortest=16, crop=(12, 16))}, (40, 30), 1),
        ({"fit": Fit(shortest=16, crop=(12, 16), by="pillow", corner="even")}, (31, 47), 1),
        ({"fit": Fit((20, 20), longest=32)}, (40, 30), 1),
        ({"edge": "cut", "fit": Fit(crop=(13, 18))}, (20, 30), 1),
    ],
    ids=str,
)
def test_each_pixel_lies_where_the_picture_has_it(settings, shape, known):
    """A picture is white where its map says sea: after the resizing of both, white and sea are in the same places."""
    image = replace(GREY, mean=0.0, std=1.0, position="rotary", **settings)
    kind = Segments(NAMES, image)
    y, x = np.mgrid[: shape[0], : shape[1]]
    sea = (y > 0.3 * shape[0]) & (x > 0.6 * shape[1] - 0.3 * y)
    seen, said = image(sea.astype(np.float32)), kind(sea.astype(int))
    assert torch.equal(seen.position_NA, said.position_NA)
    number = said.content.unflatten(1, (-1, 3)).argmax(-1)
    some = said.content.unflatten(1, (-1, 3)).any(-1)
    clear = some & ((seen.content < 0.2) | (seen.content > 0.8))  # at the shore grey pixels may be either
    assert clear.double().mean() > 0.5
    assert set(number[clear].tolist()) == {0, 1}
    assert torch.equal(number[clear], (seen.content > 0.5).long()[clear])
    assert some.double().mean().item() == pytest.approx(known)


# learning


def test_the_loss_is_the_cross_entropy_of_the_known_pixels(lively):
    model, samples = lively(model_of()), pictures((8, 12), (4, 4), (8, 8))
    samples[0]["map"][:4, 4:8] = -1  # a whole patch
    stream = model.pack(TASK, samples)
    wanted, count = 0.0, 0
    for sample in samples:
        asked = model.pack(TASK, [sample], answers=False)
        rows, columns = (n // 4 for n in sample["map"].shape)
        logits = rearrange(model.logits(asked)[TASK], "(y x) (p q c) -> 1 c (y p) (x q)", y=rows, x=columns, p=4, q=4)
        target = torch.from_numpy(sample["map"])[None]
        wanted += float(F.cross_entropy(logits, target, ignore_index=-1, reduction="sum").detach()) / 16
        count += rows * columns
    assert model.losses(stream)[TASK].item() == pytest.approx(wanted, rel=1e-5)
    assert stream.readings[TASK].count == count - 1  # the patch of which nothing is known is not read


def test_what_is_not_known_has_no_gradient(lively):
    model, (sample,) = lively(model_of()), pictures((8, 8))
    logits = model.logits(model.pack(TASK, [sample], answers=False))[TASK].detach().requires_grad_()
    target = model.pack(TASK, [sample]).readings[TASK].target
    head = EachRow(of="image")
    head.loss(logits, [4], target, [4]).backward()
    assert logits.grad is not None
    learned = logits.grad.unflatten(1, (16, 3)).any(-1)
    known = rearrange(torch.from_numpy(sample["map"] >= 0), "(y p) (x q) -> (y x) (p q)", p=4, q=4)
    assert torch.equal(learned, known)
    assert 0 < known.sum() < 64


def test_packed_is_alone_and_samples_have_no_gradient_by_others(lively):
    text = {"text": TextBytes(), "label": Labels(NAMES)}
    kinds = {"image": GREY, "map": MAP, **text}
    tasks = [mm.Task(TASK, EachRow(of="image")), mm.Task("text image -> map", EachRow(of="image")), "image -> label"]
    model = lively(mm.Model(kinds, mm.Core(width=32, depth=2, heads=2), tasks))
    samples = pictures((8, 12), (4, 4), (10, 7))
    given = {TASK: samples, tasks[1].pattern: [{**sample, "text": "ab"} for sample in samples]}
    for found in (verify(model, given), verify(model)):
        assert found.passed, str(found)
        assert {row.check for row in found.rows} >= {"packed", "gradient"}
    # behind a text the answer still lies where the picture does
    for sample in samples:
        said = model.predict(tasks[1].pattern, text="a text", image=sample["image"]).value
        assert said.shape == tuple(-(-n // 4) * 4 for n in sample["map"].shape)
    assert not check_task(tasks[0], kinds, pictures(*[(8, 8), (4, 8)] * 4)).failed


def by_hand(model: mm.Model, sample: dict[str, Any]) -> np.ndarray:
    """The classes of the largest logits."""
    rows, columns = (-(-n // 4) for n in sample["map"].shape)
    with torch.inference_mode():
        logits = model.logits(model.pack(TASK, [sample], answers=False))[TASK]
    return rearrange(
        logits, "(y x) (p q c) -> (y p) (x q) c", y=rows, x=columns, p=4, q=4
    ).argmax(-1).numpy()  # fmt: skip


def test_pictures_of_any_size_get_maps_of_their_size(lively, tmp_path):
    model, samples = lively(model_of()), pictures((8, 12), (4, 4), (12, 8), (9, 5))
    answers = model.predict(TASK, samples)
    for sample, answer in zip(samples, answers, strict=True):
        assert np.array_equal(answer.value, by_hand(model, sample))
        assert 0 <= answer.confidence <= 1
    model.save(tmp_path / "model")
    again = mm.Model.load(tmp_path / "model").predict(TASK, samples)
    assert all(np.array_equal(a.value, b.value) for a, b in zip(again, answers, strict=True))


def test_measures_count_known_pixels(lively):
    model, samples = lively(model_of()), pictures((8, 12), (4, 4), (12, 8), (9, 5))
    right = known = 0
    for sample in samples:
        said = by_hand(model, sample)[: sample["map"].shape[0], : sample["map"].shape[1]]
        right += (said == sample["map"]).sum()
        known += (sample["map"] >= 0).sum()
    found = mm.evaluate(model, TASK, samples, batch=3)
    assert found["rows"] == pytest.approx(right / known)
    assert found["exact"] == 0
    samples[1]["map"] = by_hand(model, samples[1])
    samples[1]["map"][0, :2] = -1
    assert mm.evaluate(model, TASK, samples)["exact"] == 1 / 4


def test_several_questions_at_once_are_groups_too(lively):
    """A kind of one's own: of each letter whether it is a vowel, and which third of the alphabet it is in."""

    @dataclass(frozen=True)
    class Facts(mm.Tokenizer):
        feature_size, one_hot = 6, 3

        def encode(self, value: list[tuple[int | None, int | None]]) -> mm.Tokens:
            content = torch.zeros(len(value), 6)
            for i, facts in enumerate(value):
                for group, fact in enumerate(facts):
                    if fact is not None:
                        content[i, 3 * group + fact] = 1
            return mm.Tokens(content, self.places(len(value)))

        def decode(self, tokens: mm.Tokens) -> list[tuple[int, ...]]:
            assert tokens.position_NA[:, 0].tolist() == list(range(len(tokens)))
            return [tuple(row.argmax(-1).tolist()) for row in tokens.content.unflatten(1, (2, 3))]

    task = "hint:text text -> facts"
    kinds = {"text": TextBytes(), "facts": Facts()}
    model = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [mm.Task(task, EachRow(of="text"))])
    words = ["ox", "bay", "zoo", "elk"]
    samples = [{"hint": "??", "text": w, "facts": [(int(c in "aeiou"), (ord(c) - 97) // 9) for c in w]} for w in words]
    samples[0]["facts"][0] = (None, 1)
    samples[1]["facts"][1] = (None, None)
    mm.fit(model, {task: samples}, steps=60, batch=4, lr=2e-2, quiet=True)
    assert mm.evaluate(model, task, samples) == {"loss": pytest.approx(0, abs=0.1), "exact": 1, "rows": 1}
    assert model.predict(task, hint="?", text="zoo").value == [(0, 2), (1, 1), (1, 1)]


def canvases(count: int, seed: int) -> list[dict[str, Any]]:
    """Noisy pictures with two of scikit-learn's digits 0, 1 and 4, and what shows none of them: a digit whose quarters are mixed.

    Ink is of its digit's class, what is not inked, or mixed, is background; faint ink is not known.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    part = slice(0, 900) if seed == 0 else slice(900, None)
    inks, targets = digits.images[part] / 16, digits.target[part]
    draw, found = np.random.default_rng(seed), []
    cells = [(y, x) for y in (0, 8) for x in (0, 8)]
    for _ in range(count):
        image, said = draw.normal(0, 0.1, (16, 16)), np.zeros((16, 16), int)
        for i, cell in enumerate(draw.permutation(4)[:3]):
            at = tuple(slice(n, n + 8) for n in cells[cell])
            number = draw.choice([0, 1, 4])
            ink = inks[draw.choice(np.flatnonzero(targets == number))]
            if i == 2:
                ink = ink[::-1].T.reshape(2, 4, 2, 4)[::-1, :, ::-1].reshape(8, 8)
            image[at] += ink
            said[at] = np.where(ink > 0.4, 1 + [0, 1, 4].index(number), np.where(ink > 0.1, -1, 0)) if i < 2 else 0
        found.append({"image": image.clip(0, 1).astype(np.float32), "map": said})
    return found


def test_digits_are_found_better_than_by_the_pixels_around():
    from sklearn.ensemble import RandomForestClassifier

    train, test = canvases(200, 0), canvases(40, 1)
    image = ImagePatches(patch=4, channels=1)
    kinds = {"image": image, "map": Segments(("background", "0", "1", "4"), image)}
    model = mm.Model(kinds, mm.Core(width=48, depth=2, heads=4), [mm.Task(TASK, EachRow(of="image"))])
    mm.fit(model, {TASK: train}, steps=130, batch=16, lr=6e-3, quiet=True, device="cpu", precision="float32")
    ours = mm.evaluate(model, TASK, test)["rows"]

    def around(samples: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        windows = [
            np.lib.stride_tricks.sliding_window_view(np.pad(one["image"], 3), (7, 7)).reshape(256, 49)
            for one in samples
        ]
        x, y = np.concatenate(windows), np.concatenate([one["map"].ravel() for one in samples])
        return x[y >= 0], y[y >= 0]

    (x, y), (test_x, test_y) = around(train), around(test)
    some = np.random.default_rng(0).permutation(len(x))[:5000]
    forest = RandomForestClassifier(15, random_state=0).fit(x[some], y[some])
    theirs, background = forest.score(test_x, test_y), (test_y == 0).mean()
    assert ours > theirs > background, (ours, theirs, background)


# showing answers


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """A model, a picture, and its answer."""
    folder = tmp_path_factory.mktemp("shown")
    torch.manual_seed(0)
    model = model_of().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    model.save(folder / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12)).astype(np.uint8)).save(folder / "a.png")
    value = model.predict(TASK, image=folder / "a.png").value
    assert len(np.unique(value)) == 3
    return folder / "model", folder / "a.png", value


def test_the_command_line_writes_a_map_as_a_picture(shown, tmp_path, capsys):
    model, picture, value = shown
    assert main(["predict", str(model), "--image", str(picture), "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.png")
    assert str(path) in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(path)), value)
    assert main(["predict", str(model), "--image", str(picture), "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert np.array_equal(np.asarray(Image.open(found["file"])), value)
    assert main(["look", str(model), "--image", str(picture), "--out", str(tmp_path / "look")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "look" / "answer.png")), value)
    assert main(["verify", str(model), "--image", str(picture)]) == 0


def test_the_service_answers_with_a_map_as_a_picture(shown):
    folder, picture, value = shown
    with serving(lambda: mm.Model.load(folder)) as client:
        fields = {"image": data_url(picture.read_bytes())}
        (answer,) = client.post(f"/v1/tasks/{TASK}", json={"fields": fields}).json()["answers"]
        kind, _, data = answer["value"].partition(";base64,")
        assert kind == "data:image/png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), value)
        (task,) = client.get("/v1/tasks").json()["data"]
        assert task["writes"] == "picture"
        assert client.post(f"/v1/tasks/{TASK}/look", json={"fields": fields}).status_code == 200


# what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((4, 4, 3), int), "is no map; wanted an array or a tensor"),
        (np.full((4, 4), 3), "class numbers from 3 to 3, and there are 3 classes, from 0 on"),
        (np.full((4, 4), -2), "class numbers from -2 to -2"),
        (np.full((4, 4), 0.5), "numbers that are not whole"),
        (np.full((4, 4), np.nan), "numbers that are not whole"),
        ([[0] * 4, [0] * 3], "wanted rows of equal lengths"),
        ([["seas"] * 4] * 4, "'seas' is not one of the 3 classes: sky, sea, sand; did you mean 'sea'"),
        ([["sea", 2.5, None, object()]] * 4, "is not one of the 3 classes"),
        (np.zeros((3, 9), int), "map is 3x9 pixels, smaller than one patch=4"),
        (np.zeros((5000, 5000), int), "more than max_pixels"),
        ("no.png", "no.png"),
        (Image.new("RGB", (4, 4)), r"has colours \(RGB\), and a map has one number for each pixel; save it as a PNG"),
        ({"map": 1}, "wanted a file, a PIL image, an array or a tensor, not dict"),
    ],
)
def test_bad_values_are_refused_by_name(value, message):
    with pytest.raises(MediaError, match=f"^Segments.encode.*{message}"):
        MAP(value)


def test_a_jpeg_is_no_map(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "m.jpg")
    with pytest.raises(MediaError, match=r"Segments.encode: .*is a JPEG, which changes the numbers of pixels; save"):
        MAP(tmp_path / "m.jpg")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": "sky"}, "names='sky' is not a list of names"),
        ({"names": ()}, "must be 1 to 255 different names"),
        ({"names": ("a", "a")}, "must be 1 to 255 different names"),
        ({"names": tuple(map(str, range(256)))}, "must be 1 to 255 different names"),
        ({"image": 4}, "image=4 is no ImagePatches; give the one of the pictures"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=f"^Segments: .*{message}"):
        Segments(**{"names": NAMES, "image": GREY, **settings})


def test_maps_of_other_pictures_are_refused():
    model, (sample,) = model_of(), pictures((8, 12))
    with pytest.raises(
        StreamError, match=r"'map' lies in 3 rows and 2 columns of tokens, but .* in 2 and 3; it may be turned"
    ):
        model.pack(TASK, [{**sample, "map": sample["map"].T}])
    with pytest.raises(StreamError, match="the answer has 4 tokens, but 'image' has 6 rows to answer in"):
        model.pack(TASK, [{**sample, "map": sample["map"][:, :8]}])
    with pytest.raises(StreamError, match="nothing of field 'map' is known; leave this sample out"):
        model.pack(TASK, [{**sample, "map": np.full((8, 12), 255)}])
    whole = Segments(NAMES, replace(GREY, edge="error"))
    with pytest.raises(MediaError, match=r"Segments.encode: map is 9x12 pixels, which patch=4 does not divide"):
        whole(numbers(9, 12))


def test_features_that_are_no_groups_are_refused():
    model, (sample,) = model_of(), pictures((4, 4))
    for content in (torch.full((1, 48), 0.5), torch.ones(1, 48)):
        with pytest.raises(StreamError, match="declares one_hot=3, but gave a group of features that is not a 1 among"):
            model.pack(TASK, [{**sample, "map": mm.Tokens(content, torch.zeros(1, 3))}])

"""Clouds of points: conformance, numbers by hand, files, no order, and what is refused."""

import io
import math

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.check.values import plausible_values
from multimodal.heads import FlowMatching
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Labels, Points
from multimodal_tokenizers.placed import PlacedLinear

PLANE = Points((1.0, -2.0), 3.0)
SPACE = Points((0.0, 10.0, 5.0), 2.0, mean=(100.0,), std=(20.0,), spacing=0.25, count=6)
KINDS = [PLANE, SPACE]
CORE = mm.Core(width=32, depth=2, heads=2)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, points in enumerate(KINDS)
        for check in tokenizer_checks(points, points.examples())
    ],
)
def test_conformance(check):
    if "file_holds_value" in str(check):
        pytest.importorskip("plyfile")
    check()


@pytest.mark.parametrize("points", KINDS)
def test_examples_are_values(points):
    assert len(plausible_values(points)) == 4


def test_a_token_is_a_point_at_its_place():
    tokens = SPACE(np.array([[2.0, 8.0, 5.0, 140.0]]))
    assert tokens.content.tolist() == [[2.0, 1.0, -1.0, 0.0]]  # its feature, then x, y, z
    assert tokens.position_NA.tolist() == [[0.0, -2.0, 2.0, 0.0]]  # time, y, x, z from the middle
    assert SPACE.axes == Points.SPACE == ("time", "row", "column", "depth")
    assert SPACE.step == (1.0, 0.25, 0.25, 0.25)
    assert SPACE.token_names(tokens) == ["2, 8, 5"]
    assert PLANE.axes == ("time", "row", "column")


def test_middle_size_and_features_are_scaled_as_numpy_says():
    draw = np.random.default_rng(0)
    clouds = [draw.normal((3, -1, 50), (2, 2, 9), (n, 3)) for n in (5, 8)]
    points = Points.of(clouds, dims=2)
    rows = np.concatenate(clouds)
    assert points.centre == pytest.approx(rows[:, :2].mean(0))
    assert points.size == pytest.approx(np.sqrt(rows[:, :2].var(0).mean()))
    assert (points.mean, points.std) == (pytest.approx(rows[:, 2:].mean(0)), pytest.approx(rows[:, 2:].std(0)))
    assert Points.of(clouds).axes == Points.SPACE  # all three columns are coordinates


def test_no_answer_depends_on_the_order_of_points(lively):
    model = lively(
        mm.Model({"points": SPACE, "label": Labels(("a", "b"))}, CORE.replace(axes=Points.SPACE), ["points -> label"])
    )
    cloud = SPACE.examples()[0]
    with torch.inference_mode():
        first, turned, other = (
            model.logits(model.pack("points -> label", [{"points": x}], answers=False))["points -> label"]
            for x in (cloud, cloud[::-1].copy(), cloud + 1)
        )
    torch.testing.assert_close(first, turned, atol=1e-5, rtol=0)
    assert (first - other).abs().max() > 1e-3


def test_places_are_added_as_sines_and_cosines():
    """By hand; of a width of 10, two places get 8, a sine and a cosine of two frequencies each."""
    embed = PlacedLinear(3, 2, 10, scale=4.0)
    content = torch.tensor([[0.5, 1.5, -0.25]])
    added = (embed(content) - embed.linear(content))[0].tolist()
    x, y = 4 * 1.5, 4 * -0.25
    wanted = [f(z) for places in (x, y) for f in (math.sin, math.cos) for z in (places, places / 10)]
    assert added == pytest.approx([*wanted, 0, 0], abs=1e-6)
    with pytest.raises(ConfigError, match="width=3 is less than 4, a sine and a cosine for each of 2 axes"):
        PlacedLinear(3, 2, 3)


@pytest.mark.parametrize("same", [torch.tensor, lambda x: x.astype(np.float32), lambda x: torch.tensor(x).bfloat16()])
def test_the_same_numbers_in_another_form(same):
    cloud = np.array([[1.0, 2.0], [0.5, -4.0]])
    assert torch.equal(PLANE(same(cloud)).content, PLANE(cloud).content)


@pytest.mark.parametrize("points", KINDS)
@pytest.mark.parametrize("text", [False, True])
def test_a_ply_file_has_the_points_that_were_written(points, text, tmp_path):
    plyfile = pytest.importorskip("plyfile")
    cloud = points.examples()[0]
    path = points.write(cloud, tmp_path / "cloud")
    found = plyfile.PlyData.read(str(path))
    assert path.name == "cloud.ply"
    assert found["vertex"]["x"].tolist() == cloud[:, 0].tolist()
    if text:
        found.text, path = True, tmp_path / "text.ply"
        found.write(str(path))
    for value in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert torch.equal(points(value).content, points(cloud).content)


@pytest.mark.parametrize(
    ("points", "value", "message"),
    [
        (PLANE, [[1.0, 2.0]], r"wanted an array or tensor \(points, 2\) of numbers, not list"),
        (PLANE, np.zeros((2, 5)), r"not ndarray \(2, 5\) float64; turn it round"),
        (SPACE, np.zeros((6, 3)), r"wanted an array or tensor \(points, 4\) of numbers, not ndarray \(6, 3\)"),
        (PLANE, np.zeros((0, 2)), "has no points; to leave a field out, give None"),
        (PLANE, np.array([[1.0, np.nan]]), "has a number that is not finite"),
        (PLANE, np.array([[1e300, 0.0]]), "not finite"),
        (PLANE, np.zeros((3, 2), bool), "bool"),
        (PLANE, "no such.ply", "there is no file 'no such.ply'"),
        (PLANE, b"solid cube", "10 bytes is no .ply file; of other files give the array of points"),
    ],
)
def test_bad_values_are_refused_by_name(points, value, message):
    with pytest.raises(MediaError, match=f"^Points.encode: .*{message}"):
        points(value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ply\nformat ascii 1.0\nend_header\n", "cannot read 32 bytes as points"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nend_header\n1 2\n",
            "cannot read",
        ),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float a\nproperty float b\nend_header\n1 2\n",
            "have a, b; wanted x",
        ),
    ],
)
def test_bad_ply_files_are_refused_by_name(data, message):
    pytest.importorskip("plyfile")
    with pytest.raises(MediaError, match=f"^Points.encode: .*{message}"):
        PLANE(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Points((0.0,), 1.0), r"centre=\(0.0,\) must have 2 numbers or 3"),
        (lambda: Points((0.0, 0.0), 1.0, (1.0,)), r"mean \(1\) as many as std \(0\)"),
        (lambda: Points((0.0, 0.0), 0.0), "size=0.0, .* must be more than 0"),
        (lambda: Points((0.0, 0.0), 1.0, spacing=-1.0), "spacing=-1.0 .* must be more than 0"),
        (lambda: Points((0.0, np.inf), 1.0), "must be finite"),
        (lambda: Points.of([]), "there are no clouds"),
        (lambda: Points.of([np.ones((3, 2)), np.ones((3, 3))]), r"the clouds have \[2, 3\] columns"),
        (lambda: Points.of([np.ones((3, 4))]), "dims=4 of 4 columns; points have 2 or 3 coordinates"),
        (lambda: Points.of([np.ones((3, 2))]), "all points have the same coordinates"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=f"^Points.*{message}"):
        make()


def test_alone_packed_and_cached_are_the_same(lively):
    tasks = ["plane -> label", "space -> label", mm.Task("label -> space", FlowMatching(width=16, depth=1, steps=2))]
    tokenizers = {"plane": PLANE, "space": SPACE, "label": Labels(("yes", "no"))}
    result = verify(lively(mm.Model(tokenizers, CORE.replace(axes=Points.SPACE), tasks)))
    assert result.passed, str(result)
    assert {row.check for row in result.rows} >= {"packed", "gradient", "cached"}


def test_shapes_of_clouds_are_learned_from_their_places():
    """Rings and discs have the same middle and size; a logistic regression of mean and deviation, the baseline, is at chance."""
    from sklearn.linear_model import LogisticRegression

    def clouds(count: int, seed: int) -> list[dict]:
        draw, samples = np.random.default_rng(seed), []
        for i in range(count):
            angle, distance = draw.uniform(0, 2 * np.pi, 24), np.sqrt(draw.uniform(0, 2, 24))
            distance = np.ones(24) if i % 2 else distance
            cloud = np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)
            cloud -= cloud.mean(0)
            cloud /= np.sqrt((cloud**2).mean())
            samples.append({"points": cloud + draw.normal(0, 0.02, cloud.shape), "label": ("disc", "ring")[i % 2]})
        return samples

    train, test = clouds(128, 0), clouds(96, 1)
    points = Points.of([sample["points"] for sample in train])
    model = mm.Model(
        {"points": points, "label": Labels(("disc", "ring"))}, mm.Core(width=32, depth=1, heads=2), ["points -> label"]
    )
    mm.fit(
        model, {"points -> label": train}, steps=40, batch=32, lr=5e-3, device="cpu", precision="float32", quiet=True
    )
    assert mm.evaluate(model, "points -> label", test)["exact"] > 0.9

    def moments(samples):
        return [[*s["points"].mean(0), *s["points"].std(0)] for s in samples], [s["label"] for s in samples]

    assert LogisticRegression().fit(*moments(train)).score(*moments(test)) < 0.7

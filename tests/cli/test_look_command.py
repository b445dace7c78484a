"""`multimodal look`: files, a table of heads, and errors that say what to do."""

import json

import numpy as np
import pytest
from PIL import Image

import multimodal as mm
from multimodal.cli import main
from multimodal.layers import MLP, Recurrent
from multimodal.look import xray
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

CORE = mm.Core(width=16, depth=2, heads=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    tokenizers = {"image": ImagePatches(patch=2, channels=1), "label": Labels(("a", "b")), "text": TextBytes()}
    mm.Model(tokenizers, CORE, ["image -> label", "image -> text"]).save(folder / "model")
    np.save(folder / "seven.npy", np.random.default_rng(0).random((4, 6), dtype=np.float32))
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["look", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_it_writes_a_picture_and_a_page_and_prints_the_heads(checkpoint, tmp_path, capsys):
    arguments = (
        checkpoint,
        "--image",
        checkpoint / "seven.npy",
        "--task",
        "image -> label",
        "--out",
        tmp_path / "looks",
    )
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("image -> label  → ")
    assert lines[2].split() == ["layer", "head", "effective", "evidence", "prior", "variance", "score", "variance"]
    rows = [line.split() for line in lines[3:7]]
    assert [row[:4] for row in rows] == [["block", str(b), "self", str(h)] for b in (1, 2) for h in range(2)]
    assert all(1 <= float(row[4]) <= 7 for row in rows)  # of six patches and the start
    assert lines[8:] == [f"picture  {tmp_path / 'looks' / 'xray.png'}", f"page     {tmp_path / 'looks' / 'xray.html'}"]
    assert (tmp_path / "looks" / "xray.png").read_bytes().startswith(b"\x89PNG")
    assert "</html>" in (tmp_path / "looks" / "xray.html").read_text(encoding="utf-8")
    run(capsys, *arguments)  # nothing is overwritten
    assert (tmp_path / "looks" / "xray-2.png").is_file()
    assert (tmp_path / "looks" / "xray-2.html").is_file()


def test_a_given_answer_is_looked_at_as_json(checkpoint, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        *(checkpoint, "--image", checkpoint / "seven.npy", "--task", "image->text"),
        *("--answer", "xyz", "--json", "--out", tmp_path),
    )
    assert code == 0
    found = json.loads(out)
    assert found["task"] == "image -> text"
    assert len(found["heads"]) == 4
    assert found["files"] == [str(tmp_path / "xray.png"), str(tmp_path / "xray.html")]
    assert "xyz" in (tmp_path / "xray.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "IT"], "several tasks read image; choose one with --task"),
        (["--img", "IT"], "no task reads just img; did you mean 'image'?"),
        (["--image", "IT", "--task", "image -> labels"], "there is no task 'image -> labels'"),
        (["--task", "image -> label"], "reads --image; give it"),
        (["--image", "IT", "--words", "w", "--task", "image -> label"], "--words: task 'image -> label' reads --image"),
        (["--image", "IT", "--task", "image -> label", "--answer", "a"], "answered at once by Classify"),
        (["--image", "nowhere.png", "--task", "image -> label"], "--image: "),
    ],
)
def test_errors(checkpoint, tmp_path, capsys, arguments, message):
    arguments = [str(checkpoint / "seven.npy") if a == "IT" else a for a in arguments]
    code, _, err = run(capsys, checkpoint, *arguments, "--out", tmp_path)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_attention(tmp_path, capsys):
    core = CORE.replace(block=(Recurrent(), MLP()))
    mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, core, ["text -> label"]).save(tmp_path / "model")
    code, _, err = run(capsys, tmp_path, "--text", "some", "--out", tmp_path / "o")
    assert code == 2
    assert "no layer of this model attends" in err


def test_a_long_table_is_cut_and_says_so(tmp_path, capsys):
    core = mm.Core(width=16, depth=7, heads=4)
    mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, core, ["text -> label"]).save(tmp_path / "model")
    code, out, _ = run(capsys, tmp_path / "model", "--text", "some", "--out", tmp_path / "o")
    assert code == 0
    lines = out.splitlines()
    assert sum(line.startswith("block 7") for line in lines) == 4
    assert "8 more heads are on the page" in lines
    # the heads of the picture, the sharpest of which may be in any block
    model = mm.Model.load(tmp_path / "model")
    drawn = xray(model, "text -> label", {"text": "some"}).chosen_heads()
    shown = [(" ".join(words[:3]), int(words[3])) for line in lines if (words := line.split())[:1] == ["block"]]
    assert shown == [(name, head) for name, heads in drawn.items() for head in heads]
    assert len(shown) == 20


def known_rows(folder, count: int):
    """A table of pictures, as JSON lines."""
    draw = np.random.default_rng(1)
    path = folder / "known.jsonl"
    rows = [{"image": draw.random((4, 6)).round(3).tolist(), "label": "a"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_mixture_view_says_what_is_unusual(checkpoint, tmp_path, capsys):
    draw, known = np.random.default_rng(1), tmp_path / "known"
    for i in range(90):
        (known / "ab"[i // 45]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (4, 6), dtype=np.uint8)).save(known / "ab"[i // 45] / f"{i}.png")
    np.save(tmp_path / "far.npy", np.ones((4, 6), np.float32))
    common = ("--task", "image -> label", "--out", tmp_path / "o", "--mixture", known)
    code, out, err = run(capsys, checkpoint, "--image", checkpoint / "seven.npy", *common)
    assert (code, err) == (0, "")
    assert "layer         head  components  effective  evidence z  percentile  largest responsibilities" in out
    assert "of 90 known samples" in out
    far = ("--image", tmp_path / "far.npy", "--json", "--samples", "60", "--alpha", "0.1")
    code, out, _ = run(capsys, checkpoint, *far, *common)
    assert code == 0
    found = json.loads(out)["mixture"]
    assert (found["known"], found["alpha"], found["unusual"]) == (60, 0.1, True)
    assert found["distance"] > found["threshold"]
    assert found["p"] == pytest.approx(1 / 31)
    assert len(found["heads"]) == 4
    assert sum(share for _, share in found["heads"][0]["largest"]) <= 1 + 1e-9
    assert found["droppable"] == {}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (19, [], "19 samples say too little of what is usual"),
        (30, ["--samples", "5"], "take 20 samples or more"),
        (30, ["--alpha", "1.5"], "an alpha between 0 and 1"),
        (30, ["--alpha", "nan"], "an alpha between 0 and 1"),
        (30, ["--fields", "picture=image"], "and no image; give columns other names, as in --fields image=column"),
    ],
)
def test_errors_of_the_mixture_view(checkpoint, tmp_path, capsys, rows, arguments, message):
    known = known_rows(tmp_path, rows)
    picture = ("--image", checkpoint / "seven.npy", "--task", "image -> label", "--out", tmp_path / "o")
    code, _, err = run(capsys, checkpoint, *picture, "--mixture", known, *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "o").exists()


def test_options_of_the_mixture_view_need_it(checkpoint, tmp_path, capsys):
    code, _, err = run(capsys, checkpoint, "--image", checkpoint / "seven.npy", "--alpha", "0.1", "--out", tmp_path)
    assert code == 2
    assert "give them with --mixture DATA" in err

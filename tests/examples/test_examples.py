"""The examples in a reduced form, run as users run them; what they promise at full length is measured in benchmarks/."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MULTIMODAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def run(program, tmp_path) -> Callable[..., str]:
    """run("x.py", ...): a program of examples/ in a process of its own, in an empty folder."""
    return lambda name, *arguments: program(f"examples/{name}", *arguments, cwd=tmp_path)


def needs(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"no {name} in the folder of MULTIMODAL_DATA")
    return DATA / name


@pytest.mark.slow
def test_digits_learn_and_leave_pictures(tmp_path, run):
    out = run("train_image_classifier.py", "--steps", "150")
    accuracy = float(out.split("test accuracy ")[1].split("%")[0])
    assert accuracy > 60, out  # chance is 10
    assert "multimodal predict" in out
    folder = tmp_path / "runs" / "digits"
    for name in ("curves.png", "answers.png", "one_test_picture.png"):
        with Image.open(folder / name) as picture:
            assert picture.size[0] >= 8
    assert {p.name for p in (folder / "model").iterdir()} >= {"config.json", "weights.safetensors"}


def test_a_folder_of_photographs_of_many_shapes(tmp_path, run):
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            shape = (*random.integers(20, 70, 2), 3)
            pixels = np.clip(random.normal(level, 30, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    out = run("train_image_classifier.py", "--data", "folder", "photos", "--steps", "12", "--folder", "run")
    assert "on 4 pictures" in out


def test_a_folder_without_classes_is_refused_by_name(tmp_path, run):
    (tmp_path / "photos").mkdir()
    with pytest.raises(AssertionError, match=r"error: --data folder: .*photos.* must hold a sub-folder"):
        run("train_image_classifier.py", "--data", "folder", "photos")


@pytest.mark.slow
def test_clothing_photographs_train_at_their_own_size(tmp_path, run):
    sizes = set()
    with zipfile.ZipFile(needs("clothing.zip")) as archive:
        rows = [json.loads(line) for line in archive.read("manifest.jsonl").decode("utf8").split("\n") if line]
        for row in [r for r in rows if r["split"] == "train"][::50] + [r for r in rows if r["split"] != "train"][::30]:
            part = tmp_path / "photos" / ("train" if row["split"] == "train" else "val") / row["label"]
            part.mkdir(parents=True, exist_ok=True)
            data = archive.read(row["file"])
            sizes.add(Image.open(io.BytesIO(data)).size)
            (part / Path(row["file"]).name).write_bytes(data)
    assert len(sizes) > 5
    out = run("train_image_classifier.py", "--data", "folder", "photos", "--steps", "4", "--folder", "run")
    assert "on 12 pictures" in out


@pytest.mark.slow
def test_the_cifar_reader_takes_the_validation_list(tmp_path, run):
    needs("cifar10_train.npz")
    out = run("train_image_classifier.py", "--data", "cifar10", "--root", str(DATA), "--steps", "1", "--check", "40")
    assert "on 40 pictures" in out


@pytest.mark.slow
def test_cross_modal_demo_runs_to_its_table(tmp_path, run):
    soundfile.write(tmp_path / "mine.wav", np.zeros(8000, np.float32), 16_000)
    out = run("cross_modal_demo.py", "--steps", "4", "--workers", "0", "--mine", "mine.wav")
    assert "mine.wav: " in out
    assert "with the first test picture" in out
    for row in ("unseen pictures", "unseen synthetic voices", "sums", "picture left out", "sound left out"):
        assert row in out
    assert (tmp_path / "runs" / "cross_modal" / "answers.png").is_file()


@pytest.mark.training
def test_cross_modal_demo_on_real_voices_with_a_speaker_held_out(tmp_path, run):
    path = needs("fsdd.zip")
    out = run(
        "cross_modal_demo.py",
        "--audio",
        "fsdd",
        str(path),
        "--hold-out",
        "theo",
        "--steps",
        "2",
        "--workers",
        "0",
    )
    assert "all clips of theo, never heard" in out


def test_the_recipe_trains_and_answers_on_the_command_line(tmp_path, monkeypatch, capsys):
    from multimodal.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "examples" / "recipe.py"), "--set", "steps=3", "--set", "batch=10"]) == 0
    assert main(["generate", "runs/recipe", "--text", "three plus four", "--max-tokens", "4"]) == 0
    assert "model " in capsys.readouterr().out


@pytest.mark.slow
def test_one_model_does_four_jobs(tmp_path, run):
    out = run("one_model_four_jobs.py", "--steps", "60", "--count", "20", "--share", "6", "--workers", "0")
    for name in ("image -> label", "audio -> heard:text", "audio -> text", "photo -> caption:text", "nearest picture"):
        assert f"{name}" in out
    label = float(out.split("image -> label")[1].split("%")[0])
    assert label > 15, out  # chance is 10; what it promises at full length is measured in benchmarks/
    folder = tmp_path / "runs" / "four_jobs"
    with Image.open(folder / "drawings.png") as picture:
        assert picture.size[0] >= 80
    assert (folder / "seven.wav").stat().st_size > 1000

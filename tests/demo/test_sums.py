"""The demo: its data are whole, its sums are right, nothing that is held out is learned, and its command trains once."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.demo import (
    ADD,
    DIGITS,
    HEAR,
    RATE_HZ,
    SEE,
    DigitSamples,
    scanned_digits,
    spoken_words,
    sums_job,
    sums_model,
)
from multimodal.demo.sums import NUMBERS, Sheets
from multimodal.shapes import ConfigError
from tests.serve.conftest import EXTRA

ROOT = Path(__file__).resolve().parents[2]


def test_the_voices_say_every_digit_and_those_of_the_test_nothing_in_training():
    train, test = spoken_words()
    assert {clip.speaker for clip in train} & {clip.speaker for clip in test} == set()
    for clips in (train, test):
        said = {(clip.speaker, clip.word) for clip in clips}
        assert len(said) == len(clips)
        assert all({(speaker, word) for word in DIGITS} <= said for speaker in {clip.speaker for clip in clips})
        assert all(0.2 * RATE_HZ <= len(clip.wave_S) <= RATE_HZ and clip.wave_S.abs().max() > 0.1 for clip in clips)


def test_the_scans_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    scans, digits = scanned_digits()
    bunch = load_digits()
    assert np.abs(scans / 255 * 16 - bunch.images).max() < 0.1
    assert digits == bunch.target.tolist()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'multimodal-stream\[demo\]'"):
        scanned_digits()


def test_samples_add_what_is_seen_and_heard():
    pictures = [{"image": digit, "label": str(digit)} for digit in range(10)] * 20
    clips = [clip for clip in spoken_words()[0] if clip.word in DIGITS][:30]
    samples = DigitSamples(pictures, clips)
    by_wave = {clip.wave_S.data_ptr(): clip.word for clip in clips}
    sums = set()
    for i in range(len(samples)):
        sample = samples[i]
        wave_S, rate = sample["audio"]
        seen, heard, total = re.fullmatch(r"(\w+) plus (\w+) is (\w+)", sample["text"]).groups()
        assert (seen, heard, rate) == (DIGITS[sample["image"]], by_wave[wave_S.data_ptr()], RATE_HZ)
        assert NUMBERS.index(total) == DIGITS.index(seen) + DIGITS.index(heard)
        sums.add(total)
    assert len(sums) > 12
    assert [samples[i]["text"] for i in range(20)] == [DigitSamples(pictures, clips)[i]["text"] for i in range(20)]
    assert [samples[i]["text"] for i in range(20)] != [
        DigitSamples(pictures, clips, seed=1)[i]["text"] for i in range(20)
    ]
    assert (DigitSamples(pictures, None)[7]["text"], DigitSamples(None, clips)[3]["text"]) == ("seven", clips[3].word)


def test_a_moved_scan_is_another_each_time_and_of_the_same_digit():
    scans, digits = scanned_digits()
    sheet, moved = Sheets(scans, digits), Sheets(scans, digits, moved=True)
    plain = np.asarray(sheet[0]["image"])
    assert plain.shape == (16, 16)
    np.testing.assert_allclose(plain.reshape(8, 2, 8, 2).mean((1, 3)), scans[0], atol=40)  # twice the size
    others = [np.asarray(moved[0]["image"]) for _ in range(5)]
    assert len({other.tobytes() for other in others}) == 5
    assert moved[0]["label"] == sheet[0]["label"] == str(digits[0])


def test_nothing_that_is_held_out_is_learned():
    job = sums_job(1)
    held = job.evaluation[ADD]
    scans, _ = scanned_digits()
    for task in (ADD, SEE):
        learned = job.data[task].pictures
        assert len(learned) + len(held.pictures) == len(scans)
        assert {scan.tobytes() for scan in learned.scans} & {scan.tobytes() for scan in held.pictures.scans} == set()
        assert [str(digit) for digit in learned.digits] == [learned[i]["label"] for i in range(len(learned))]
    for task in (ADD, HEAR):
        speakers = {clip.speaker for clip in job.data[task].clips}
        assert speakers & {clip.speaker for clip in held.clips} == set()
        assert {clip.word for clip in job.data[task].clips} == set(DIGITS)
    assert set(job.data) == set(job.model.tasks)


def test_a_picture_of_any_size_is_read_at_one():
    model = sums_model()

    def slope(size: int) -> Image.Image:
        """Dark at the left, light at the right."""
        level = (np.arange(size) + 0.5) / size * 255
        return Image.fromarray(np.uint8(np.tile(level, (size, 1))))

    read = [model.packer.tokenizers["image"](slope(size)).content for size in (16, 224)]
    torch.testing.assert_close(read[0], read[1], atol=0.15, rtol=0)
    assert read[0].max() - read[0].min() > 2


@pytest.mark.slow
def test_the_command_trains_once_and_serves(tmp_path, monkeypatch, capsys):
    httpx = pytest.importorskip("httpx", reason=EXTRA)
    pytest.importorskip("uvicorn", reason=EXTRA)
    pytest.importorskip("python_multipart", reason=EXTRA)
    from multimodal.cli import main

    paths = [str(ROOT), str(ROOT / "tokenizers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    words = ["demo", "--folder", "demo", "--no-browser"]
    with subprocess.Popen(
        [sys.executable, "-m", "multimodal", *words, "--steps", "2", "--port", "0"],
        cwd=tmp_path,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        while not (found := re.search(r"serving demo at (\S+)", (lines := [*lines, process.stdout.readline()])[-1])):
            assert lines[-1], lines
        examples = tmp_path / "demo" / "examples"
        assert sorted(path.stem for path in examples.glob("*.png")) == sorted(DIGITS)
        assert sorted(path.stem for path in examples.glob("*.wav")) == sorted(DIGITS)
        with httpx.Client(base_url=found[1], timeout=60) as client:
            tasks = client.get("/v1/tasks").json()
            assert "Draw a digit and say another" in tasks["about"]
            assert any("reading the digits" in line for line in lines)
            first = tasks["examples"][0]
            assert (first["image"]["name"], first["audio"]["name"]) == ("seven.png", "three.wav")
            data = base64.b64decode(first["audio"]["url"].removeprefix("data:audio/wav;base64,"))
            assert data == (examples / "three.wav").read_bytes()
            assert [row["task"] for row in tasks["data"]] == [ADD, SEE, HEAR]
            files = {
                name: (examples / f"seven.{end}").read_bytes() for name, end in (("image", "png"), ("audio", "wav"))
            }
            answer = client.post(f"/v1/tasks/{ADD}", files=files, data={"max_tokens": "3"})
            assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends what runs, then sends itself the signal
        assert process.stderr is not None
        assert re.search(
            r"it adds \d+% right, and after 420 steps most are", process.stderr.read()
        )  # after two, none are
    # the next start trains nothing
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["multimodal.cli.demo"], "serve_folders", lambda *a, **o: calls.append((a, o)) or 0)
    monkeypatch.setattr(sys.modules["multimodal.cli.demo"], "_train", None)
    assert main(words) == 0
    assert (calls[0][0][1], calls[0][1]["browser"]) == ([("demo", Path("demo"))], False)


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason=EXTRA)
    pytest.importorskip("python_multipart", reason=EXTRA)
    from multimodal.cli import main

    def refused(*words: str) -> str:
        assert main(["demo", "--folder", str(tmp_path / "demo"), "--no-browser", *words]) == 2
        assert not (tmp_path / "demo").exists()
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "demo: cannot listen" in refused("--port", str(taken.getsockname()[1]))
    assert "steps=0" in refused("--port", "0", "--steps", "0")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "scikit-learn" in refused("--port", "0")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'multimodal-stream[demo]'" in refused()


@pytest.mark.training
def test_what_it_promises_is_learned():
    """Of unseen scans and unheard voices, four sums of five are right; with either left out, few are."""
    from multimodal.demo import sums_job
    from multimodal.train import fit

    job = sums_job(420)
    assert fit(job.model, job.data, job.recipe, evaluation=job.evaluation, mix=job.mix, quiet=True).finished
    samples = [job.evaluation[ADD][i] for i in range(len(job.evaluation[ADD]))]

    def share(samples: list[dict]) -> float:
        answers = job.model.predict(ADD, samples)
        return np.mean([a.value.split()[-1:] == s["text"].split()[-1:] for a, s in zip(answers, samples, strict=True)])

    assert share(samples) > 0.8
    assert share([{**sample, "image": None} for sample in samples]) < 0.3
    assert share([{**sample, "audio": None} for sample in samples]) < 0.3

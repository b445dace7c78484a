"""What a run leaves behind: environment, table, curves, TensorBoard's file; and the comparison of runs."""

import csv
import getpass
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.shapes import ConfigError
from multimodal.train import run_report
from multimodal.train.display import draw_curves, environment, smooth, write_csv
from multimodal.train.run_report import CONFIG, Record, differences, draw, names, read_runs, table
from multimodal.train.trackers import TensorBoard

LABEL = "image -> label"


def history(steps: int, lr: float = 1e-3, every: int = 10) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 5 / (1 + lr * 100 * step),
            "grad_norm": 2.0 + step % 3,
            "lr": lr,
            "tokens_per_s": 900,
        }
        row |= {"filled": 0.99} if step % 2 else {}
        rows.append(row)
        if step % every == 0:
            row |= {f"{LABEL} loss": 1 / step, f"{LABEL} exact": 1 - 1 / step}
    return rows


def write_run(folder: Path, rows: list[dict], *, steps: int, finished: bool = True, **recipe) -> Path:
    """A run folder as `fit` leaves it, without the weights."""
    (folder / "checkpoints" / f"step-{rows[-1]['step'] if rows else 0:08d}").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layer = {"type": "multimodal.layers.mlp:MLP", "config": {"hidden": recipe.pop("hidden", 64)}}
    score = {"type": f"multimodal.attention.scores:{recipe.pop('score', 'Cosine')}", "config": {}}
    config = {
        "core": {"type": "multimodal.core:Core", "config": {"depth": 2, "score": score, "block": [layer]}},
        "tasks": [
            {"pattern": LABEL, "head": {"type": "x:Classify", "config": {}}, "weight": recipe.pop("weight", 1.0)}
        ],
        "recipe": {"steps": steps, "lr": 1e-3, "betas": [0.9, 0.99], **recipe},
        "data": {LABEL: 80},
    }
    (folder / CONFIG).write_text(json.dumps(config))
    if finished:
        (folder / "curves.png").touch()
    return folder


def test_the_environment_says_where_and_names_nobody(monkeypatch):
    home = str(Path.home())
    monkeypatch.setattr(sys, "argv", [f"{home}/bin/multimodal", "train", f"{home}/my sums.py", "--set", "lr=1"])
    facts = json.loads(json.dumps(environment()))
    assert facts["command"] == "multimodal train '~/my sums.py' --set lr=1"
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["date"])
    assert facts["cpu"]
    shown = json.dumps({**facts, "platform": ""})
    assert socket.gethostname() not in shown
    assert getpass.getuser() not in json.dumps(facts["command"])
    monkeypatch.setattr(sys, "argv", ["/somewhere/multimodal/__main__.py", "train"])
    assert environment()["command"] == "python -m multimodal train"


def test_the_environment_knows_the_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None

    def git(*arguments: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *options, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD")}
    commit = git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    git("worktree", "add", "beside")
    monkeypatch.setenv("PATH", "")  # no program is run
    assert environment()["git"] == {"commit": commit}
    monkeypatch.chdir(tmp_path / "beside")
    assert environment()["git"] == {"commit": commit}


def test_the_table_has_every_column_and_gaps_where_there_is_nothing(tmp_path):
    rows = [*history(20), {"step": 20, "note": 'a "b", c'}]
    write_csv(rows, tmp_path / "log.csv")
    with (tmp_path / "log.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows)
    for row, read in zip(rows, found, strict=True):
        assert {key: value for key, value in read.items() if value} == {key: str(value) for key, value in row.items()}
    assert list(found[0]) == [
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "filled",
        f"{LABEL} loss",
        f"{LABEL} exact",
        "note",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_smoothing_is_a_mean_without_delay():
    values = np.random.default_rng(0).normal(size=300)
    found = smooth(list(values))
    for i in (0, 1, 4, 150, 298, 299):
        n = min(6, i, 299 - i)
        assert found[i] == pytest.approx(values[i - n : i + n + 1].mean())
    assert smooth([3.0]) == [3.0]
    assert smooth([1.0, 2.0, 6.0]) == [1.0, 3.0, 6.0]
    assert smooth([]) == []
    line = [float(i) for i in range(200)]
    assert smooth(line) == pytest.approx(line)


@pytest.mark.parametrize(("rows", "panels"), [(history(30), 6), (history(5), 5), (history(1), 1), ([{"step": 1}], 1)])
def test_curves_have_a_panel_for_what_there_is(tmp_path, rows, panels, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    draw_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 400
    assert len(drawn[0].axes) == panels
    lines = {line.get_label(): line.get_xydata().tolist() for axes in drawn[0].axes for line in axes.get_lines()}
    if panels == 6:
        assert lines[f"{LABEL} exact"] == [[step, 1 - 1 / step] for step in (10, 20, 30)]


def test_runs_are_read_and_what_is_unfinished_is_said(tmp_path):
    whole = write_run(tmp_path / "whole", history(40), steps=40)
    cut = write_run(tmp_path / "cut", history(25), steps=40, lr=1e-2, score="Additive", hidden=32, weight=2.0)
    with (cut / "log.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')  # as a kill leaves it
    (tmp_path / "other").mkdir()
    records = read_runs([tmp_path])
    assert [record.folder for record in records] == [cut, whole]
    assert [record.finished for record in records] == [False, True]
    assert records[0].steps == 25
    assert records[1].best(f"{LABEL} loss") == (1 / 40, 40)
    assert records[1].best(f"{LABEL} exact") == (1 - 1 / 40, 40)
    assert differences(records) == {
        "core.score": ["Additive", "Cosine"],
        "core.block.0.hidden": [32, 64],
        f"tasks.{LABEL}.weight": [2.0, 1.0],
        "recipe.lr": [1e-2, 1e-3],
    }
    text = table(records)
    assert "25 of 40, unfinished" in text
    assert re.search(r"^whole +40 of 40 +1\.0000 +0\.9750 at 40 +0\.0250 at 40 +900 +-$", text, re.MULTILINE), text
    assert re.search(r"^recipe\.lr +0\.01 +0\.001$", text, re.MULTILINE)


def test_best_is_the_best_and_not_the_last(tmp_path):
    rows = [
        {"step": i, "loss": 1.0, f"{LABEL} loss": (i - 2) ** 2, f"{LABEL} exact": -((i - 2) ** 2)} for i in range(1, 5)
    ]
    record = Record.read(write_run(tmp_path / "a", rows, steps=4))
    assert record.best(f"{LABEL} loss") == (0, 2)
    assert record.best(f"{LABEL} exact") == (0, 2)


@pytest.mark.parametrize(
    ("change", "finished"),
    [
        (lambda run: None, True),
        (lambda run: (run / "curves.png").unlink(), False),  # killed between the last state and the end
        (
            lambda run: (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / "step-00000010.writing"),
            False,
        ),
        (lambda run: (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / "step-00000009"), False),
        (lambda run: (run / CONFIG).unlink(), False),
    ],
)
def test_finished_means_that_the_last_step_is_saved(tmp_path, change, finished):
    run = write_run(tmp_path / "a", history(10), steps=10)
    change(run)
    assert Record.read(run).finished is finished


def test_names_of_runs_differ(tmp_path):
    def at(*folders: str) -> list[str]:
        return names([Record(Path(folder), [], {}, None) for folder in folders])

    assert at("runs/a", "runs/b") == ["a", "b"]
    assert at("one/a", "two/a") == ["one/a", "two/a"]
    assert at("a", "a") == ["a", "a"]


def test_what_holds_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no log\.jsonl with a step in it, nor do folders in it"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="nothing is no folder"):
        read_runs([tmp_path / "nothing"])


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_picture_has_a_line_for_every_run(tmp_path, count, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    for i in range(count):
        write_run(tmp_path / f"run{i:02d}", history(20 + i, lr=1e-3 * (i + 1)), steps=20 + i, finished=i != 1)
    records = read_runs([tmp_path])
    draw(records, None)  # type: ignore[arg-type]
    [figure] = drawn
    assert [axes.get_title() for axes in figure.axes] == [
        "training loss, smoothed",
        f"held out: {LABEL} exact",
        f"held out: {LABEL} loss",
        "gradient norm",
        "speed",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"run{i:02d}" + (f" (unfinished, {20 + i} of {20 + i})" if i == 1 else "") for i in range(count)]
    for axes, each in zip(figure.axes, (2, 1, 1, 2, 1), strict=True):
        assert len(axes.get_lines()) == each * count
        assert len({str(line.get_color()) for line in axes.get_lines()}) == count
    top = figure.axes[-1].get_ylim()[1]
    assert top >= 900


def test_a_run_of_an_older_version_is_read_too(tmp_path):
    run = write_run(tmp_path / "a", history(10), steps=10)
    (run / "checkpoints" / "step-00000010").rmdir()
    (run / "state").mkdir()
    (run / "state" / "state.json").write_text('{"step": 10}')
    assert Record.read(run).step == 10


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = history(20)
    board = TensorBoard(tmp_path / "board")
    for row in rows[:15]:
        board({**row, "note": "text"})
    board.close()
    again = TensorBoard(tmp_path / "board")  # as a run goes on that was killed behind step 10
    for row in rows[10:]:
        again(row)
    again.close()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    tags = {f"training/{key}" for key in ("loss", "grad_norm", "lr", "tokens_per_s", "filled")}
    assert set(read.Tags()["scalars"]) == tags | {f"held out/{LABEL} loss", f"held out/{LABEL} exact"}
    losses = {event.step: event.value for event in read.Scalars("training/loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert len(read.Scalars("training/loss")) == 20
    assert [event.step for event in read.Scalars(f"held out/{LABEL} exact")] == [10, 20]


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_config_is_said(tmp_path):
    run = write_run(tmp_path / "a", history(10), steps=10)
    (run / CONFIG).unlink()
    assert f"(no {CONFIG}: a)" in table([Record.read(run)])
    assert run_report.settings({}) == {}

"""Trackers against the real libraries, offline: what was written is read back by the library itself."""

import json
import sys
from typing import Any

import pytest

import multimodal as mm
from multimodal.shapes import ConfigError
from multimodal.train import Answers, Histograms
from multimodal.train.trackers import SERVICES, MLflow, TensorBoard, Trackio, WandB, make_tracker
from multimodal_tokenizers import Labels, TextBytes

TASK = "text -> label"
PLAIN: dict[str, Any] = {"steps": 4, "batch": 4, "precision": "float32", "device": "cpu", "quiet": True}
DATA = [{"text": "abcdefgh"[: i % 7 + 1], "label": "yes" if i % 2 else "no"} for i in range(12)]


def trained(
    tracker: Any, folder: Any, *, stop: int | None = None, called: tuple = (), resume: bool = False
) -> mm.train.Run:
    """A run that a signal stops after a step, or that goes on with one."""
    import signal

    model = mm.Model({"text": TextBytes(), "label": Labels(("no", "yes"))}, mm.Core.tiny(), [TASK])
    stopping = [lambda row: row["step"] == stop and signal.raise_signal(signal.SIGTERM)]
    given = {"trackers": [tracker, *stopping], "callbacks": called, "evaluation": {TASK: DATA}, "evaluate_every": 2}
    return mm.fit(model, {TASK: DATA}, folder=folder, resume=resume, **given, **PLAIN)


def known(folder: Any) -> dict[str, str]:
    return json.loads((folder / "trackers.json").read_text())


class StandIn:
    """The calls of wandb that `WandB` makes, with the signatures of its version 0.31."""

    def __init__(self) -> None:
        self.begun: list[dict] = []
        self.rows: list[tuple] = []
        self.ended = 0
        self.id = "abc"

    def init(self, *, project=None, name=None, config=None, id=None, resume=None, **options):
        self.begun.append({"project": project, "name": name, "id": id, "resume": resume, **options})
        self.config = config
        return self

    def log(self, data: dict, step: int | None = None) -> None:
        self.rows.append((step, data))

    def finish(self) -> None:
        self.ended += 1

    def Histogram(self, sequence):
        return ("histogram", len(sequence))

    def Html(self, data):
        return ("html", data)


def test_a_resumed_run_goes_on_in_the_same_remote_run(tmp_path, monkeypatch):
    library = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", library)
    called = (Histograms(every=2), Answers(TASK, DATA[:1]))
    cut = trained(WandB("digits", mode="offline"), tmp_path / "my run", stop=2, called=called)
    assert not cut.finished
    assert known(tmp_path / "my run") == {"wandb": "abc"}
    run = trained(WandB("digits", mode="offline"), tmp_path / "my run", called=called, resume=True)
    first = {"project": "digits", "name": "my run", "id": None, "resume": "allow", "mode": "offline"}
    assert library.begun == [first, {**first, "id": "abc"}]
    assert library.ended == 2
    assert library.config["recipe"]["steps"] == 4
    losses = {step: row["training/loss"] for step, row in library.rows if "training/loss" in row}
    assert losses == {row["step"]: row["loss"] for row in run.history if "loss" in row}
    assert (4, f"held out/{TASK} exact") in {(step, key) for step, row in library.rows for key in row}
    texts = [row[f"answers/{TASK}"][1] for _, row in library.rows if f"answers/{TASK}" in row]
    assert "&#x27;" in texts[0]  # escaped
    assert any("weights/core.blocks.0" in row for _, row in library.rows)
    # a new run in the same folder is another run there: the note is moved with the files of the old one
    trained(WandB("digits"), tmp_path / "my run")
    assert library.begun[-1]["id"] is None
    assert known(tmp_path / "my run.1") == {"wandb": "abc"}


@pytest.mark.slow
def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"dir": str(tmp_path)}
    called = (Histograms(every=2), Answers(TASK, DATA[:1]))
    trained(WandB("digits", **options), tmp_path / "a", stop=2)
    trained(WandB("digits", **options), tmp_path / "a", called=called, resume=True)
    name = known(tmp_path / "a")["wandb"]
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(folder.endswith(f"-{name}") for folder in folders)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the optional package mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    trained(MLflow("digits", uri=uri), tmp_path / "a", stop=2)
    client = mlflow.MlflowClient(uri)
    name = known(tmp_path / "a")["mlflow"]
    assert client.get_run(name).info.status == "KILLED"
    run = trained(MLflow("digits", uri=uri), tmp_path / "a", called=(Answers(TASK, DATA[:1]),), resume=True)
    assert known(tmp_path / "a") == {"mlflow": name}
    found = client.get_run(name)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "a")
    assert found.data.params["steps"] == "4"
    losses = {metric.step: metric.value for metric in client.get_metric_history(name, "training/loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in run.history if "loss" in row})
    assert found.data.metrics["held out/text to label exact"] == run.last(f"{TASK} exact")
    assert len(client.search_runs([found.info.experiment_id])) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio", reason="the optional package trackio is not installed")
    trained(Trackio("digits"), tmp_path / "a", stop=2)
    run = trained(Trackio("digits"), tmp_path / "a", resume=True)
    name = known(tmp_path / "a")["trackio"]
    (found,) = trackio.Api().runs("digits")
    assert found.name == name
    rows = trackio.SQLiteStorage.get_logs("digits", name)
    losses = {row["step"]: row["training/loss"] for row in rows if "training/loss" in row}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in run.history if "loss" in row})


@pytest.mark.parametrize("name", SERVICES)
def test_without_its_package_it_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}$"):
        make_tracker(name, None)  # type: ignore[arg-type]


def test_names_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn())
    assert make_tracker("wandb:my:project", tmp_path).project == "my:project"  # type: ignore[attr-defined]
    assert make_tracker("wandb", tmp_path).project == "multimodal"  # type: ignore[attr-defined]
    for typed in ("wand", "tensorboard:x", "", ":x"):
        with pytest.raises(ConfigError, match=f"--track {typed}: wanted one of tensorboard, wandb, mlflow, trackio"):
            make_tracker(typed, tmp_path)
    with pytest.raises(ConfigError, match="WandB: project is int, wanted a text"):
        WandB(3)  # type: ignore[arg-type]


def test_a_damaged_note_is_an_error_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn())
    trained(WandB(), tmp_path / "a", stop=2)
    (tmp_path / "a" / "trackers.json").write_text("{")
    with pytest.raises(mm.train.CallbackError, match=r"the callback WandB failed in on_start .*trackers\.json"):
        trained(WandB(), tmp_path / "a", resume=True)


def test_the_command_writes_a_board(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    trained(TensorBoard(tmp_path / "board"), None)
    assert list((tmp_path / "board").iterdir())

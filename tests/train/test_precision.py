"""The faster precision of a CPU with bfloat16: measured on the first batch, remembered, and without any other effect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import multimodal as mm
from multimodal.train import precision
from multimodal_tokenizers import Labels, TextBytes

TASK = "text -> label"
SAMPLES = [{"text": text, "label": label} for text, label in (("aa", "a"), ("bb", "b"), ("aab", "a"), ("bba", "b"))]


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU with bfloat16, and a home of its own."""
    monkeypatch.setattr(precision, "may_be_faster", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model() -> mm.Model:
    kinds = {"text": TextBytes(), "label": Labels(("a", "b"))}
    return mm.Model(kinds, mm.Core(width=32, depth=1, heads=2, dropout=0.2), [TASK], seed=0)


def trained(folder: Path, steps: int = 50, **settings: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The weights, and the precision of the run."""
    found = model()
    run = mm.fit(found, {TASK: SAMPLES}, folder=folder, steps=steps, batch=2, quiet=True, **settings)
    assert run.finished
    state = json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())
    return found.state_dict(), state["computed_in"]


def of_ratio(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[int]:
    """Let measurements give this ratio, after they have computed both; returns a list that has an item for each."""
    calls: list[int] = []

    def measure(backward: Any) -> float:
        backward(torch.float32)
        backward(torch.bfloat16)
        calls.append(1)
        return ratio

    monkeypatch.setattr(precision, "measure", measure)
    return calls


def test_the_ratio_is_the_median_of_rounds_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    # the first pair warms up; then 2, 3 and 7 times as fast, until SECONDS are over
    takes = iter([9.0, 0.1, 0.2, 0.1, 0.3, 0.1, 1.4, 0.2])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(precision, "SECONDS", 11.0)
    order = []

    def backward(dtype: torch.dtype) -> None:
        order.append(dtype)
        now[0] += next(takes)

    assert precision.measure(backward) == pytest.approx(3)
    assert order == [torch.float32, torch.bfloat16] * 4


@pytest.mark.parametrize(("ratio", "wanted"), [(1.9, "bfloat16"), (1.05, "float32"), (0.6, "float32")])
def test_the_faster_one_is_taken_and_remembered(
    ratio: float, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = of_ratio(monkeypatch, ratio)
    weights, computed_in = trained(tmp_path / "one")
    assert computed_in == wanted
    again, _ = trained(tmp_path / "two")
    assert len(calls) == 1, "the second run has the same shapes"
    expected, _ = trained(tmp_path / "asked", precision=wanted)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), f"{name}: the measurement changed the run"
        assert torch.equal(again[name], tensor), name
    mm.fit(model(), {TASK: SAMPLES}, steps=50, batch=2)
    assert f"in {wanted} (" in (said := capsys.readouterr().out)
    assert f"{ratio:.1f} times as fast" in said
    assert "as measured before" in said


def test_other_shapes_are_measured_anew_and_a_short_run_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = of_ratio(monkeypatch, 2.0)
    assert trained(tmp_path / "short", steps=49)[1] == "float32"
    assert not calls
    trained(tmp_path / "one")
    mm.fit(model(), {TASK: SAMPLES}, steps=50, batch=3, quiet=True)
    assert len(calls) == 2


def test_a_resumed_run_stays_in_its_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_ratio(monkeypatch, 0.5)
    data, folder = {TASK: SAMPLES}, tmp_path / "run"

    class Stop(mm.train.Callback):
        def on_step(self, view: Any) -> None:
            if view.step == 20:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, mm.train.CallbackError)):
        mm.fit(model(), data, folder=folder, steps=60, batch=2, quiet=True, checkpoint_every=10, callbacks=[Stop()])
    of_ratio(monkeypatch, 3.0)
    (tmp_path / "cache" / "multimodal" / "precision.json").unlink()
    mm.fit(model(), data, folder=folder, steps=60, batch=2, quiet=True, checkpoint_every=10, resume=True)
    states = [json.loads(path.read_text()) for path in (folder / "checkpoints").glob("*/state.json")]
    assert {state["computed_in"] for state in states} == {"float32"}


@pytest.mark.parametrize("written", [b"", b"[]", b"{", b"\xff", b'{"k": "x"}'])
def test_a_damaged_memory_is_measured_anew(written: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = of_ratio(monkeypatch, 2.0)
    path = tmp_path / "cache" / "multimodal" / "precision.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(written)
    trained(tmp_path / "run")
    assert len(calls) == 1
    assert 2.0 in json.loads(path.read_text()).values()


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = of_ratio(monkeypatch, 2.0)
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert trained(tmp_path / "one")[1] == trained(tmp_path / "two")[1] == "bfloat16"
    assert len(calls) == 2


def test_measuring_bfloat16_for_real_gives_a_finite_ratio(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    (ratio,) = json.loads((tmp_path / "cache" / "multimodal" / "precision.json").read_text()).values()
    assert 0 < ratio < 1000

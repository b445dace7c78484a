"""The benchmark: every row in its quick form, which does the same work on both sides, and the harness that times them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.speed import main, results
from benchmarks.speed.compare import BenchError, difference, measure, ratios
from benchmarks.speed.row import Place, Row
from benchmarks.speed.worker import outputs
from multimodal.cli import main as multimodal

ROWS = {row.name: row for _, row in main.all_rows()}
FAKE = """
from pathlib import Path
from benchmarks.speed.row import Job, Row

def side(value, units=2.0):
    def make(place):
        import torch
        (place.folder / f"{value}").touch()
        return Job(lambda: None, lambda: torch.tensor([value]), units=units, unit="tokens", facts={"value": value})
    return make

def program(place):
    return Job(lambda: {"seed": place.seed, "same": 1})

def broken(place):
    raise RuntimeError("a wheel came off")

def loud(place):
    print("a library that prints")
    return side(1.0)(place)

def after(place):
    assert (place.folder / "1.0").exists(), "the peer comes first"
    return side(1.0)(place)

def report(place):
    print("noise")
    return {"lines": [f"quick {place.quick}"], "met": False}

ROWS = (
    Row(name="alike", what="", peer="them", ours=after, theirs=loud, tolerance=0.0),
    Row(name="apart", what="", peer="them", ours=side(1.0), theirs=side(1.5), tolerance=0.3),
    Row(name="broken", what="", peer="them", ours=broken, theirs=side(1.0)),
    Row(name="program", what="", peer="them", ours=program, theirs=program, fresh=True),
    Row(name="report", what="", report=report),
)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs a row of the module above in processes of its own."""
    (tmp_path / "fake_rows.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    import fake_rows

    def run(name: str, rounds: int = 1) -> dict:
        row = next(row for row in fake_rows.ROWS if row.name == name)
        return measure("fake_rows", row, Place(folder=tmp_path, quick=True), rounds, 0.0)

    return run


@pytest.fixture
def _modules():
    """Rows of whole programs hide modules from the peer, in what should be a process of its own."""
    before = dict(sys.modules)
    yield
    sys.modules.update(before)
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_modules")
@pytest.mark.parametrize("name", ROWS)
def test_a_rows_quick_form_does_the_same_work_on_both_sides(name, tmp_path):
    row = ROWS[name]
    if why := main.missing(row):
        pytest.skip(why)
    place = Place(folder=tmp_path, quick=True)
    if row.report is not None:
        found = row.report(place)
        assert found["lines"]
        assert found["met"] in (True, False, None)
        return
    theirs = row.job("theirs", place)
    ours = row.job("ours", place)
    if row.tolerance is not None:
        difference(row, outputs(ours), outputs(theirs))
    for job in (theirs, ours):
        job.run()
    assert (ours.units, ours.unit) == (theirs.units, theirs.unit)


def test_two_sides_are_compared_and_timed_the_peer_is_built_first(fake):
    found = fake("alike", rounds=3)
    assert found["difference"] == 0.0
    assert len(found["ratios"]) == 3
    assert found["unit"] == "tokens"
    assert found["ours"]["facts"]["value"] == 1.0


def test_sides_that_do_not_do_the_same_are_not_timed(fake):
    with pytest.raises(BenchError, match=r"output differs by 0\.33 of its largest, more than 0\.3"):
        fake("apart")


def test_a_side_that_fails_says_why(fake):
    with pytest.raises(BenchError, match=r"(?s)broken, us: ended with code 1.*a wheel came off"):
        fake("broken")


def test_a_whole_program_is_started_anew_each_round_with_another_seed(fake):
    found = fake("program", rounds=3)
    assert found["theirs"]["facts"] == {"seed": [0, 1, 2], "same": 1}
    assert found["difference"] is None


def test_a_row_without_a_peer_reports(fake):
    assert fake("report") == {"lines": ["quick True"], "met": False}


def test_outputs_must_have_the_same_names_and_shapes():
    row = Row(name="r", what="", peer="them", tolerance=1.0)
    with pytest.raises(BenchError, match="same names"):
        difference(row, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(BenchError, match="same names"):
        difference(row, {}, {})
    with pytest.raises(BenchError, match=r"\(1,\) of ours and \(2,\)"):
        difference(row, {"a": torch.ones(1)}, {"a": torch.ones(2)})
    with pytest.raises(BenchError, match="nan"):
        difference(row, {"a": torch.tensor([float("nan")])}, {"a": torch.ones(1)})
    assert difference(row, {"a": torch.tensor([1.0, 4.0])}, {"a": torch.tensor([2.0, 4.0])}) == 0.25


def test_the_ratio_is_the_median_of_neighbouring_rounds():
    def timed(*walls: float) -> list[dict[str, float]]:
        return [{"wall": wall, "cpu": 2 * wall} for wall in walls]

    # the machine is slow in the second round: the ratio of medians would be 2 / 3
    found = ratios(timed(1.0, 8.0, 3.0), timed(2.0, 16.0, 1.5))
    assert found["ratio"] == found["ratio_cpu"] == 2.0
    assert found["ratios"] == [0.5, 2.0, 2.0]


def line(row: str, ratio: float, goal: float | None) -> dict:
    side = {"wall": 0.5, "cpu": 1.0, "peak_mb": 3, "facts": {}}
    facts = {"unit": "tokens", "difference": None, "ours": side, "theirs": side, "ratio": ratio, "ratio_cpu": ratio}
    return {**results.record(Row(name=row, what="", peer="them", goal=goal), facts | {"ratios": [ratio]}, 2, 1)}


def test_results_are_added_and_the_table_shows_the_newest_of_each_row(tmp_path):
    for one in (line("a", 1.0, 1.2), line("b", 2.5, 2.0), line("a", 1.15, 1.2)):
        results.add(one, tmp_path)
    results.add(results.record(Row(name="c", what=""), {"lines": ["a curve"], "met": None}, 1, 1), tmp_path)
    assert [json.loads(x)["row"] for x in (tmp_path / "bench.jsonl").read_text("utf-8").splitlines()] == [*"abac"]
    page = (tmp_path / "bench.md").read_text("utf-8")
    assert (
        "| a | them | 2 tokens/s | 2 tokens/s | 1.15 | 1.15 .. 1.15 (1) | 1.15 | 1.2, missed | not compared |" in page
    )
    assert "| 2.50 | 2.50 .. 2.50 (1) | 2.50 | 2 | not compared |" in page
    assert "1.00" not in page
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.height > 100
    assert "**c**\n\na curve\n" in page


def test_a_ratio_is_said_in_words_and_a_missed_goal_too():
    assert main._shown(line("a", 1.15, 1.2), quick=False)[0] == (
        "  1.15 times as fast as them (1.15 to 1.15 in 1 rounds; 1.15 by CPU time), goal 1.2, missed; outputs not compared"
    )
    assert "missed" not in main._shown(line("a", 1.2, 1.2), quick=False)[0]


def test_the_machine_is_reported_without_its_name():
    import platform

    assert platform.node() not in results.machine() or not platform.node()


def test_the_command_lists_rows_and_refuses_what_it_does_not_know(capsys):
    assert multimodal(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in ROWS if not any(text.split()[0] == name for text in listed.splitlines())] == []
    assert multimodal(["bench", "vitt"]) != 0
    assert "there is no row vitt; there are" in capsys.readouterr().err
    assert multimodal(["bench", "--rounds", "0"]) != 0


def test_a_row_whose_peer_is_not_there_is_left_out(monkeypatch, capsys):
    row = Row(name="r", what="", peer="them", needs=("no-such-distribution",))
    monkeypatch.setattr(main, "all_rows", lambda: iter([("fake", row)]))
    settings = {"quick": True, "rounds": 1, "seconds": 0.0, "threads": 1, "profile": False, "keep": None}
    assert main.bench([], **settings) == 0
    assert main.bench(["r"], **settings) == 1
    assert "no-such-distribution not installed: uv sync --group peers" in capsys.readouterr().out


def test_saved_results_can_be_read():
    lines = results.read(Path(__file__).parents[2] / "benchmarks" / "results")
    assert {one["row"] for one in lines} <= set(ROWS)

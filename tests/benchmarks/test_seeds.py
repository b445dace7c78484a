"""Every row of benchmarks/seeds.py in its quick form, what it must reach (marked training), and the harness itself."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import seeds
from benchmarks.seed_rows.table import Bar, Row, remarks_of

ROOT = Path(__file__).parents[2]
ROWS = [row for row in seeds.ROWS if not row.of]


def named(rows: list[Row]) -> list:
    return [pytest.param(row, id=row.name) for row in rows]


def can_run(row: Row) -> None:
    if why := seeds.absent(row):
        pytest.skip(why)


def names_asked(row: Row) -> set[str]:
    """Everything that the row's bars and baselines name, and those of rows that share its numbers."""
    sharing = [row, *(other for other in seeds.ROWS if other.of == row.name)]
    bars = [bar for one in sharing for bar in one.bars]
    return {name for bar in bars for name in (bar.value, bar.over, bar.times) if name} | {
        name for one in sharing for name in one.beats
    }


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    monkeypatch.setenv("MULTIMODAL_DATA", str(seeds.DATA))


@pytest.mark.parametrize("row", named(ROWS))
def test_a_rows_quick_form_gives_every_number_that_its_bars_name(row: Row, tmp_path):
    can_run(row)
    values = seeds.measured(row, seed=0, quick=True, out=tmp_path)
    assert names_asked(row) <= set(values), sorted(values)
    assert [name for name in names_asked(row) if not math.isfinite(values[name])] == []


@pytest.mark.training
@pytest.mark.parametrize("row", named(ROWS))
def test_a_row_meets_its_bars(row: Row, tmp_path):
    can_run(row)
    found = seeds.run(row, 0, quick=False, folder=tmp_path)
    assert "error" not in found, found
    sharing = [row, *(other for other in seeds.ROWS if other.of == row.name)]
    verdicts = [seeds.judged(bar, found["values"]) for one in sharing for bar in one.bars]
    assert [text for met, text in verdicts if not met] == []


def test_rows_have_names_bars_and_programs_that_agree():
    names = [row.name for row in seeds.ROWS]
    assert len(set(names)) == len(names) > 50
    for row in seeds.ROWS:
        assert row.bars
        assert row.file.startswith(("examples/attention/", "benchmarks/seed_rows/"))
        if row.of:
            assert (seeds.BY_NAME[row.of].program, seeds.BY_NAME[row.of].of) == (row.program, "")
    assert set(seeds.NOT_CLAIMED) == {"machine reading", "abstractive summarisation"}


@pytest.mark.parametrize(
    ("bar", "met", "text"),
    [
        (Bar("a", ">=", 0.5), True, "a >= 0.5: 0.75"),
        (Bar("a", ">=", 0.75), True, "a >= 0.75: 0.75"),
        (Bar("a", ">=", 0.9), False, "a >= 0.9: 0.75, missed by 0.15"),
        (Bar("a", "<=", 0.5), False, "a <= 0.5: 0.75, missed by 0.25"),
        (Bar("a", "==", 0.75), True, "a == 0.75: 0.75"),
        (Bar("a", "==", 1), False, "a == 1: 0.75, missed by 0.25"),
        (Bar("a", ">=", 0.25, over="b"), True, "a >= (b) +0.25: 0.75"),
        (Bar("a", ">=", 0.5, over="b"), False, "a >= (b) +0.5: 0.75, missed by 0.25"),
        (Bar("a", "<=", 0, over="b"), False, "a <= (b): 0.75, missed by 0.25"),
        (Bar("a", ">=", 1.5, times="b"), True, "a >= 1.5 x (b): 0.75"),
        (Bar("a", ">=", 2, times="b"), False, "a >= 2 x (b): 0.75, missed by 0.25"),
        (Bar("e", ">=", 0.5, absolute=True), True, "|e| >= 0.5: 0.75"),
        (Bar("e", ">=", 1, absolute=True), False, "|e| >= 1: 0.75, missed by 0.25"),
        (Bar("c", "<=", 1), False, "c <= 1: c is nan"),
        (Bar("a", ">=", 0, over="c"), False, "a >= (c): c is nan"),
        (Bar("d", ">=", 1), False, "d >= 1: nothing named 'd' was measured"),
    ],
)
def test_a_bar_says_by_how_much_it_is_missed(bar, met, text):
    assert seeds.judged(bar, {"a": 0.75, "b": 0.5, "c": float("nan"), "e": -0.75}) == (met, text)
    declared = text.partition(":")[0].replace("|e|", "abs(e)")
    assert Bar.parse(declared) == bar


def test_a_bar_may_name_numbers_whose_names_look_like_bars():
    bar = Bar("BLEU >= 16 words", ">=", 1.4, times="BLEU >= 16 words, no attention")
    assert Bar.parse(str(bar)) == bar
    assert Bar.parse("|ELBO - log p| <= 1e-3") == Bar("|ELBO - log p|", "<=", 1e-3)
    with pytest.raises(ValueError, match=r"'share above 0.5' is no bar; write for example \"a >= 0.5\""):
        Bar.parse("share above 0.5")


PROGRAM = """
def measure(seed=0, quick=False, out=None):
    return {"share": 0.5 + seed / 4, "chance": 0.1}

def crash(seed=0, quick=False, out=None):
    raise ValueError("the ninth head fell off")

def leave(seed=0, quick=False, out=None):
    import os
    os._exit(7)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Rows on a program of our own, known to the harness; the folder that it is in."""
    file = ROOT / "examples" / "attention" / "no_such_program.py"
    row = {"title": "t", "section": "0", "seam": "s", "bars": (Bar("share", ">=", 0.6),), "beats": ("chance",)}
    rows = {
        name: Row(name=name, program=f"examples/attention/no_such_program.py:{function}", **row)
        for name, function in (("fine", "measure"), ("crashes", "crash"), ("leaves", "leave"))
    }
    assert not file.exists()
    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True)
    (tmp_path / file.relative_to(ROOT)).write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "seed_program_no_such_program", None)
    monkeypatch.setattr(seeds, "BY_NAME", {**seeds.BY_NAME, **rows})

    def run_here(row: Row, seed: int, quick: bool, folder: Path) -> dict:
        """`seeds.run`, but its child knows these rows as well."""
        script = tmp_path / "child.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks import seeds\nfrom pathlib import Path\n"
            f"seeds.ROOT = Path({str(tmp_path)!r})\nfrom benchmarks.seed_rows.table import Row\n"
            f"row = Row(name={row.name!r}, program={row.program!r}, title='', section='', seam='', bars=())\n"
            "seeds.BY_NAME[row.name] = row\nsys.exit(seeds.main())\n",
            encoding="utf-8",
        )
        monkeypatch.setattr(seeds, "PROGRAM", script)
        return original(row, seed, quick, folder)

    original = seeds.run
    monkeypatch.setattr(seeds, "run", run_here)
    return rows


@pytest.mark.slow
def test_a_row_that_fails_ends_no_other_and_is_not_saved(made, tmp_path, capsys):
    path = tmp_path / "results" / "seeds.json"
    rows = [made["crashes"], made["leaves"], made["fine"]]
    assert not seeds.run_all(rows, [0], False, path, tmp_path / "logs")
    out = capsys.readouterr().out
    assert "crashes, seed 0: FAILED, ended with status 1: ValueError: the ninth head fell off" in out
    assert "leaves, seed 0: FAILED, ended with status 7: it printed nothing" in out
    assert "fine, seed 0: MISSED" in out
    assert "missed  share >= 0.6: 0.5, missed by 0.1" in out
    assert "chance: 0.1  (baseline)" in out
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert set(saved) == {"fine"}
    assert saved["fine"]["0"]["values"] == {"share": 0.5, "chance": 0.1}
    assert 0 <= saved["fine"]["0"]["cpu_s"] < 30
    assert saved["fine"]["0"]["command"] == "uv run benchmarks/seeds.py fine --seeds 0"


def test_runs_are_merged_by_row_and_seed(made, tmp_path):
    path = tmp_path / "seeds.json"
    first = {"values": {"share": 0.1}, "cpu_s": 60.0}
    seeds.save(path, made["crashes"], 0, first)
    seeds.save(path, made["fine"], 0, first)
    seeds.save(path, made["fine"], 2, {"values": {"share": 0.3}, "cpu_s": 120.0})
    saved = seeds.save(path, made["fine"], 0, {"values": {"share": 0.7}, "cpu_s": 60.0})
    assert saved == json.loads(path.read_text(encoding="utf-8"))
    assert {row: {seed: e["values"]["share"] for seed, e in by.items()} for row, by in saved.items()} == {
        "crashes": {"0": 0.1},
        "fine": {"0": 0.7, "2": 0.3},
    }


@pytest.mark.slow
def test_quick_forms_are_shown_and_never_saved(made, tmp_path, capsys):
    path = tmp_path / "seeds.json"
    assert seeds.run_all([made["fine"]], [0], True, path, tmp_path / "logs")
    out = capsys.readouterr().out
    assert out.count("too short for the bars") == 1
    assert "fine, seed 0: ran, 0." in out
    assert "share: 0.5\n" in out
    assert "chance: 0.1  (baseline)" in out
    assert "MISSED" not in out
    assert ">=" not in out
    assert not path.exists()
    assert not seeds.run_all([made["crashes"]], [0], True, path, tmp_path / "logs")
    assert "crashes, seed 0: FAILED" in capsys.readouterr().out


def test_a_program_shows_its_bars_and_what_was_not_reached_and_no_bars_when_quick(tmp_path, monkeypatch, capsys):
    import command  # pyright: ignore[reportMissingImports]  # examples/attention

    given: list = []

    def measure(seed: int, quick: bool, out: Path, variant: list[str]) -> dict[str, float]:
        given.append((seed, quick, out, variant))
        return {"share": 0.125, "steps": math.inf}

    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["made.py", *arguments])
        command.run(measure, "made", "What it is.", {"share": "bar >= 0.5"}, variant=("one", "two"))
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    lines = [line.split() for line in printed().splitlines()]
    assert lines[0] == ["share", "0.125", "bar", ">=", "0.5"]
    assert lines[1] == ["steps", "not", "reached"]
    assert lines[2][:2] == ["picture:", "runs/made/made.png;"]
    quick = printed("--quick", "--seed", "3", "--out", "there", "--variant", "two").splitlines()
    assert quick[0] == "quick form: too short for the bars"
    assert [line.split() for line in quick[1:3]] == [["share", "0.125"], ["steps", "not", "reached"]]
    assert given == [(0, False, Path("runs/made"), ["one", "two"]), (3, True, Path("there"), ["two"])]
    assert (tmp_path / "there").is_dir()
    with pytest.raises(SystemExit):
        printed("--help")


def test_a_program_of_the_table_shows_the_bars_and_baselines_of_its_rows(tmp_path, monkeypatch, capsys):
    import command  # pyright: ignore[reportMissingImports]  # examples/attention

    numbers = {
        "hard exact": 0.9,
        "soft exact": 0.8,
        "hard pointing": 1.0,
        "soft mean-pooled exact": 0.1,
        "seconds": 2.0,
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["captions.py"])
    command.run(
        lambda *_: numbers, "captions", "What it is.", {"hard pointing": "one look a word", "seconds": "of CPU"}
    )
    out = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=3)[-1] for line in out[:3]] == [
        "bar >= 0.85, and >= (mean-pooled exact)",
        "bar >= 0.9, and >= (mean-pooled exact) +0.2",
        "bar >= 0.95; one look a word",
    ]
    assert [line.split()[-1] for line in out[3:5]] == ["baseline", "CPU"]
    assert all(remarks_of(Path(row.file).stem) for row in seeds.ROWS if row.file.startswith("examples/"))


def test_gradients_that_never_reach_the_target_are_not_the_best(monkeypatch):
    program = sys.modules[seeds.measure_of(seeds.BY_NAME["em-or-gradient"]).__module__]
    bits = (torch.rand(60, 784, generator=torch.Generator().manual_seed(0)) < 0.5).float().numpy()
    monkeypatch.setattr(program, "binarised_mnist", lambda: (bits, None, bits, None))
    climbs = {"EM()": [-9.0, -1.0], "0.3": [-9.0, -2.0], "0.1": [-9.0, -5.0, -1.2], "0.03": [-9.0, -8.0]}

    def made(start, x, objective, steps):
        name = str(getattr(objective, "rate", "EM()"))
        bounds = climbs[name]
        return program.Fit(start, x.new_ones(50), bounds, [float(i) for i in range(len(bounds))])

    monkeypatch.setattr(program, "fit", made)
    values = program.measure()
    assert values["best gradient CPU-s to target"] == values["Adam 0.1 CPU-s to target"] == 2
    assert values["Adam 0.3 steps to target"] == values["Adam 0.03 CPU-s to target"] == math.inf
    climbs["0.1"] = [-9.0, -8.0, -7.0]
    assert program.measure()["best gradient CPU-s to target"] == 1  # a bound from below


def test_the_table_shows_means_ranges_misses_and_what_is_not_run(made):
    def entry(share: float, minutes: float) -> dict:
        return {"values": {"share": share, "chance": 0.1}, "cpu_s": 60 * minutes, "date": "2026-01-02", "command": ""}

    rows = [made["fine"], made["crashes"], made["leaves"]]
    rows[1] = Row(**{**vars(rows[1]), "title": "second", "tried": "Another seed.", "notes": "Toy data."})
    saved = {"fine": {"0": entry(0.7, 1), "1": entry(0.9, 2)}, "crashes": {"0": entry(0.5, 1), "1": entry(0.7, 1)}}
    text = seeds.markdown(rows, saved)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    met, some, absent = (dict(zip(lines[0], line, strict=True)) for line in lines[1:])
    assert (met["measured"], met["beside"]) == ("share 0.8 (0.7 to 0.9)", "chance 0.1")
    assert (met["met"], met["CPU-minutes"], met["seeds"]) == ("yes", "1.5", "0 1")
    assert (some["met"], absent["met"], absent["measured"]) == ("1 of 2 seeds", "not run", "")
    assert "1 of 3 rows meet their bars, 1 are not run" in text
    assert "- second: seed 0, share >= 0.6: 0.5, missed by 0.1. Another seed." in text
    assert "- second: Toy data." in text
    assert "machine reading" in text
    assert "Measured on 2026-01-02" in text


def test_a_row_without_its_program_or_data_is_told(made, tmp_path, capsys):
    there = made["fine"]
    elsewhere = Row(**{**vars(there), "name": "elsewhere", "program": "examples/attention/nowhere.py"})
    hungry = Row(**{**vars(there), "name": "hungry", "needs": ("no_such_data.zip",)})
    shared = Row(**{**vars(there), "name": "shared", "of": "fine"})
    assert seeds.run_all([elsewhere, hungry, shared], [0], False, tmp_path / "seeds.json", tmp_path)
    out = capsys.readouterr().out
    assert "elsewhere: not run, examples/attention/nowhere.py is not written yet" in out
    assert "hungry: not run, no no_such_data.zip in the folder of MULTIMODAL_DATA" in out
    assert "shared: has the numbers of fine" in out


def test_options_that_a_program_does_not_take_are_refused(made):
    sys.modules.pop("seed_program_no_such_program", None)
    wrong = Row(**{**vars(made["fine"]), "options": {"read": "soft"}})
    with pytest.raises(TypeError, match="takes no read, which row 'fine' gives"):
        seeds.measured(wrong, 0, quick=True)


def test_an_unknown_row_is_refused_with_its_neighbours():
    with pytest.raises(SystemExit, match="there is no row 'causel'; causal"):
        seeds.main(["causel"])


def test_the_list_runs_nothing(capsys):
    assert seeds.main(["--list", "causal", "induction"]) == 0
    out = capsys.readouterr().out
    assert "edit leak, masked == 0" in out
    assert "abstractive summarisation: not claimed" in out


@pytest.mark.slow
def test_a_run_of_one_row_from_the_command_line(tmp_path, program):
    out = program("benchmarks/seeds.py", "scaled-start", "--quick", cwd=tmp_path)
    assert "scaled-start, seed 0:" in out
    assert "largest weight, scaled" in out

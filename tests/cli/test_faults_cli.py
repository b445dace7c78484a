"""The command line as a new user tries it: what is typed is taken as meant, refused in one message, and nothing is overwritten."""

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multimodal as mm
from multimodal_tokenizers import Labels, TextBytes

pytest.importorskip("cyclopts")  # GPU machines may lack it, and run the tests marked cuda alone

from multimodal.cli import main

ROOT = Path(__file__).resolve().parents[2]
KINDS = '''
from dataclasses import dataclass

import torch

import multimodal as mm


@dataclass(frozen=True)
class Things(mm.Tokenizer):
    """Rows such as [{"x": 1}]; what else comes ends in the error that Python gives."""

    feature_size = 1

    def encode(self, value):
        numbers = [[float(row["x"])] for row in value]
        return mm.Tokens(torch.tensor(numbers), mm.at_times(torch.arange(float(len(numbers)))))


@dataclass(frozen=True)
class Walk(mm.Tokenizer):
    """Columns {"x": [..], "y": [..]} of numbers."""

    feature_size = 2

    def encode(self, value):
        if not isinstance(value, dict):
            raise mm.MediaError(f"Walk.encode: cannot read {type(value).__name__} {value!r}; wanted columns x and y")
        for name in ("x", "y"):
            if not all(isinstance(number, (int, float)) for number in value.get(name, [None])):
                raise mm.MediaError(f"Walk.encode: column {name!r} holds something else than numbers")
        rows = torch.tensor([value["x"], value["y"]], dtype=torch.float32).T
        return mm.Tokens(rows, mm.at_times(torch.arange(float(len(rows)))))


@dataclass(frozen=True)
class Grid(mm.Tokenizer):
    """Arrays of two rows."""

    feature_size = 2

    def encode(self, value):
        shape = getattr(value, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != 2:
            raise mm.MediaError(f"Grid.encode: {shape or type(value).__name__} came, wanted an array of 2 rows")
        return mm.Tokens(torch.from_numpy(value).T.contiguous(), mm.at_times(torch.arange(float(shape[1]))))
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with models that were never trained, and values for them."""
    import importlib.util

    folder = tmp_path_factory.mktemp("faults_cli")
    (folder / "fault_kinds.py").write_text(KINDS)
    spec = importlib.util.spec_from_file_location("fault_kinds", folder / "fault_kinds.py")
    assert spec is not None
    assert spec.loader is not None
    kinds = importlib.util.module_from_spec(spec)
    sys.modules["fault_kinds"] = kinds
    spec.loader.exec_module(kinds)
    core = mm.Core(width=16, depth=1, heads=2)
    label = Labels(("yes", "no"))
    own = {"things": kinds.Things(), "walk": kinds.Walk(), "grid": kinds.Grid(), "label": label}
    mm.Model(own, core, ["things -> label", "walk -> label", "grid -> label"]).save(folder / "own")
    texts = {"text": TextBytes(), "note": TextBytes(), "label": label, "tags": Labels(("red", "blue"), several=True)}
    tasks = ["text -> label", "text note -> tags", "text -> note", "-> note"]
    mm.Model(texts, core, tasks).save(folder / "texts")
    (folder / "badrow.json").write_text('{"x": [1, 2], "y": [1, "two"]}')
    (folder / "broken.json").write_text('{"x": [1, 2')
    (folder / "empty.npy").write_bytes(b"")
    (folder / "archive.npy").write_bytes(b"PK\x03\x04 and so on")
    Image.fromarray(np.full((8, 8), 230, np.uint8)).save(folder / "light.png")
    yield folder
    del sys.modules["fault_kinds"]


TAGS = ("predict", "texts", "--task", "text note -> tags")


def test_fault_32_a_kind_that_raises_anything_refuses_the_value_in_one_message(refused, say) -> None:
    ask = ("predict", "own", "--task", "things -> label", "--things")
    assert "KeyError: 'x'" in refused(*ask, '[{"y": 1}]')
    assert "TypeError: " in refused(*ask, "7")
    assert say(*ask, '[{"x": 1}, {"x": 2}]')[0] == 0


def test_fault_33_the_refusal_that_is_shown_is_that_of_the_reading_that_came_closest(refused) -> None:
    assert "--walk: Walk.encode: column 'y' holds something else" in refused("predict", "own", "--walk", "badrow.json")
    assert "broken.json is no JSON that can be read: Expecting" in refused("predict", "own", "--walk", "broken.json")
    assert "empty.npy is no array that can be read" in refused("predict", "own", "--grid", "empty.npy")
    assert "archive.npy is no array that can be read" in refused("predict", "own", "--grid", "archive.npy")
    assert "Grid.encode: (3, 1) came, wanted an array of 2 rows" in refused(
        "predict", "own", "--grid", "[[1], [2], [3]]"
    )
    assert "cannot read str 'nowhere.json'" in refused("predict", "own", "--walk", "nowhere.json")  # no such file


def test_fault_33a_json_that_is_nested_too_deeply_or_a_name_that_is_too_long_is_refused(refused) -> None:
    deep = "[" * 100_000
    for text in (deep, "x" * 5000):
        err = refused("predict", "own", "--walk", text)
        assert "Walk.encode: cannot read str" in err
        assert len(err) < 400  # what was typed is shortened


def test_fault_34_a_field_can_be_left_out(say, refused) -> None:
    whole = json.loads(say(*TAGS, "--text", "a", "--note", "b", "--json")[1])
    code, out, _ = say(*TAGS, "--text", "a", "--without", "note", "--json")
    assert code == 0
    model = mm.Model.load("texts")
    wanted = model.predict("text note -> tags", [{"text": "a", "note": None}])[0]
    assert json.loads(out)["probability"] == pytest.approx({str(c): p for c, p in wanted.probability.items()})
    assert json.loads(out)["probability"] != whole["probability"]
    assert "give it too, or leave it out: --without note" in refused(*TAGS, "--text", "a")
    assert "--without note: --note is given as well" in refused(
        *TAGS, "--text", "a", "--note", "b", "--without", "note"
    )
    assert "reads --text --note; did you mean 'note'?" in refused(*TAGS, "--text", "a", "--without", "nota")


def test_fault_35_a_value_may_begin_with_a_dash(say, refused) -> None:
    ask = ("generate", "texts", "--max-tokens", "2", "--json")
    assert json.loads(say(*ask, "--task", "-> note")[1])["task"] == "-> note"
    for text in ("-> note", "-hello", "--two dashes and blanks", "-3"):
        plain = say("predict", "texts", "--task", "text -> label", "--text", text, "--json")
        joined = say("predict", "texts", "--task", "text -> label", f"--text={text}", "--json")
        assert plain == joined
        assert plain[0] == 0
    err = refused("predict", "texts", "--task", "text -> label", "--text", "--json")
    assert "--text requires an argument" in err
    assert "--text=VALUE" in err


def test_fault_36_out_writes_a_list_and_what_is_printed_can_be_given_back(say, tmp_path) -> None:
    ask = (*TAGS, "--text", "a", "--note", "b")
    printed = say(*ask)[1].splitlines()[0]
    out = say(*ask, "--out", str(tmp_path))[1].strip()
    assert out == str(tmp_path / "tags.json")
    assert json.loads((tmp_path / "tags.json").read_text()) == json.loads(printed)
    shown = json.loads(say(*ask, "--out", str(tmp_path), "--json")[1])
    assert shown["answer"] == json.loads(printed)
    assert shown["file"] == str(tmp_path / "tags-2.json")
    assert say("verify", "texts", "--text", "a", "--note", "b", "--tags", printed)[0] == 0


def test_fault_36a_an_answer_that_no_file_can_hold_is_shown_and_that_is_said(capsys, tmp_path) -> None:
    from multimodal.cli.output import show

    class Odd:
        def __str__(self) -> str:
            return "an odd one"

    show("a -> b", mm.Prediction(Odd(), 0.5), False, name="b", out=tmp_path)
    out, err = capsys.readouterr()
    assert out == "an odd one\n"
    assert "Odd is shown only" in err
    show("a -> b", mm.Prediction({"n": np.float32(3), "m": [np.arange(2)]}, 0.5), False, name="b", out=tmp_path)
    assert json.loads((tmp_path / "b.json").read_text()) == {"n": 3.0, "m": [[0, 1]]}
    assert not list(tmp_path.glob("*.txt"))


def test_fault_52_several_values_are_several_samples(say, refused) -> None:
    ask = ("predict", "texts", "--task", "text -> label")
    alone = [json.loads(say(*ask, "--text", text, "--json")[1]) for text in "abc"]
    for typed in (("--text", "a", "b", "c"), ("--text", "a", "--text", "b", "--text", "c")):
        rows = [json.loads(line) for line in say(*ask, *typed, "--json")[1].splitlines()]
        assert [row["sample"] for row in rows] == [{"text": text} for text in "abc"]
        assert [row["answer"] for row in rows] == [row["answer"] for row in alone]
    shown = say(*ask, "--text", "a", "b")[1].splitlines()
    assert [line for line in shown if line.startswith("==")] == ["== a", "== b"]
    rows = say(*TAGS, "--text", "a", "b", "--note", "same", "--json")[1].splitlines()
    assert len(rows) == 2
    assert "different numbers of values: --text 2, --note 3" in refused(
        *TAGS, "--text", "a", "b", "--note", "1", "2", "3"
    )
    written = say("generate", "texts", "--task", "text -> note", "--text", "a", "b", "--max-tokens", "2", "--json")[1]
    assert [json.loads(row)["sample"] for row in written.splitlines()] == [{"text": "a"}, {"text": "b"}]
    assert "look shows one sample, and 2 were given" in refused(
        "look", "texts", "--task", "text -> label", "--text", "a", "b"
    )
    assert say("predict", "--task", "text -> label", "--text", "a", "texts")[0] == 0  # the checkpoint may stand last


def test_fault_85_a_file_is_no_checkpoint_and_a_value_that_is_not_used_is_refused(refused, say) -> None:
    err = refused("predict", "light.png")
    assert "light.png is a file; give the folder of a run or a model first" in err
    assert "did you mean" not in err
    assert "did you mean 'texts'?" in refused("predict", "text", "--text", "a")
    assert "light.png" not in refused("predict", "light.pn", "--text", "a")  # what is meant is a folder
    assert "--label alone makes no sample of any task; give --things or --walk or --grid too" in refused(
        "verify", "own", "--label", "yes"
    )
    assert "'zzz' is not one of the 2 classes" in refused("verify", "texts", "--text", "a", "--label", "zzz")


def test_fault_82_errors_of_configurations_and_names_are_one_message(refused) -> None:
    patches = ("check", "multimodal_tokenizers:ImagePatches", "--config")
    assert "ImagePatches: patch=4.5 must be a whole number" in refused(*patches, '{"patch": 4.5}')
    assert "ImagePatches: patch=inf must be a whole number" in refused(*patches, '{"patch": 1e400}')
    assert "this is no JSON" in refused(*patches, "[" * 100_000)
    assert "cannot import '.a'" in refused("check", ".a:x")
    assert "File name too long" in refused("check", f"{'a' * 300}.py:x")
    assert "--shard-mb nan: wanted a number of megabytes" in refused("shards", ".", "new", "--shard-mb", "nan")
    assert "--train-tokens nan: wanted a number" in refused(
        "plan", str(ROOT / "examples/recipe.py"), "--train-tokens", "nan"
    )
    assert "--processes 1000000: more than" in refused(
        "train", str(ROOT / "examples/recipe.py"), "--processes", "1000000", "--folder", "many"
    )


def test_fault_82a_a_file_that_ends_the_program_is_named_with_its_line(refused, home) -> None:
    (home / "ends.py").write_text("import sys\nsys.exit(0)\n")
    assert "ends.py, line 2: SystemExit: 0" in refused("train", "ends.py", "--folder", "ended")
    (home / "raises.py").write_text("def recipe():\n    return {}['model']\n")
    assert "raises.py, line 2: KeyError: 'model'" in refused("train", "raises.py", "--folder", "broken")


def test_fault_82b_more_than_there_is_memory_is_said(refused, say, monkeypatch) -> None:
    def greedy(*_: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
        )

    monkeypatch.setattr(mm.Model, "predict", greedy)
    assert "out of memory" in refused("predict", "texts", "--task", "text -> label", "--text", "a")


def test_fault_82c_a_bug_is_one_line_and_its_traceback_a_file(say, monkeypatch, tmp_path) -> None:
    from multimodal.cli import commands

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(broken, "__code__", broken.__code__.replace(co_filename=commands.__file__))
    monkeypatch.setattr(mm.Model, "predict", broken)
    code, _, err = say("predict", "texts", "--task", "text -> label", "--text", "a")
    assert code == 70
    assert err.count("\n") == 1
    assert "this is a bug: ZeroDivisionError: division by zero" in err
    (trace,) = tmp_path.iterdir()
    assert str(trace) in err
    assert "Traceback" in trace.read_text()
    code, _, err = say("predict", "texts", "--task", "text -> label", "--text", "a", "--debug")
    assert code == 70
    assert "Traceback" in err


class Full(io.TextIOWrapper):
    """Standard output on a disk that is full: what was printed is not written, which flushing reports."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ASK = ("predict", "texts", "--task", "text -> label", "--text", "a")


def test_fault_82d_standard_output_that_is_closed_or_full_is_said(home, monkeypatch, capsys) -> None:
    monkeypatch.chdir(home)
    for stream, message in ((None, "standard output is closed"), (Full(), "standard output: No space left on device")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(ASK) == 2
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        assert message in capsys.readouterr().err
        if stream is not None:
            monkeypatch.setattr(Full, "flush", io.TextIOWrapper.flush)  # so that it can be thrown away


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_fault_82e_every_character_can_be_shown_in_every_encoding(home, monkeypatch, encoding) -> None:
    monkeypatch.chdir(home)
    with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code = main(ASK)
        bars = stream.buffer.getvalue().decode(encoding)
        stream.buffer.truncate(0)
        stream.buffer.seek(0)
        again = main([*ASK[:4], "--text", "日本", "é", "--json"])
        rows = stream.buffer.getvalue().decode(encoding).splitlines()
        assert stream.errors == "strict"  # as it was
        monkeypatch.undo()
    assert (code, again) == (0, 0)
    assert ("█" if encoding == "utf-8" else r"\u2588") in bars
    assert [json.loads(row)["sample"]["text"] for row in rows] == ["日本", "é"]


@pytest.mark.parametrize("columns", ["0", "1", "2", "19"])
def test_fault_64_help_ends_in_a_terminal_of_any_width(columns, tmp_path) -> None:
    """In a process of its own, which can be stopped."""
    environment = os.environ | {
        "COLUMNS": columns,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")]),
    }
    command = [sys.executable, "-m", "multimodal", "predict", "--help"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_fault_78_real_pipes_and_disks_end_without_a_traceback(tmp_path) -> None:
    """One shell starts all of them; help needs no PyTorch, so each is quick."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])}
    environment.pop("HOME", None)
    run = f"{shlex.quote(sys.executable)} -m multimodal"
    script = f"{run} predict --help >&-; echo $?; {run} --help >/dev/full; echo $?; {run} predcit 2>&-; echo $?"
    done = subprocess.run(
        ["sh", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == ["2", "2", "2"]
    closed, full = done.stderr.splitlines()
    assert closed == "multimodal: standard output is closed, so nothing can be shown; send it to a file or to /dev/null"
    assert full.startswith("multimodal: ")
    assert "No space left on device" in full


def test_fault_78a_without_arguments_with_a_near_miss_and_with_words_too_many(say, refused) -> None:
    code, out, _ = say()
    assert code == 0
    assert "predict" in out
    assert 'Did you mean "predict"?' in refused("predcit")
    assert "quotes" in refused("predict", "texts", "one", "two")
    err = refused("look", "texts", "one", "two")
    assert "'one', 'two'" in err
    assert "quotes" in err
    assert re.fullmatch(r"\d+\.\d+.*\n", say("--version")[1])


def test_fault_44_the_benchmark_writes_only_where_it_was_asked_to(monkeypatch, tmp_path, capsys) -> None:
    from benchmarks.speed import main as speed
    from benchmarks.speed.row import Row

    row = Row(name="fake", what="nothing", report=lambda place: {"lines": ["a line"], "met": None})
    monkeypatch.setattr(speed, "all_rows", lambda: iter([("fake", row)]))
    monkeypatch.setattr(speed, "measure", lambda *_: {"lines": ["a line"], "met": None})
    written: list[Path] = []
    monkeypatch.setattr(speed.results, "add", lambda line, folder=speed.results.RESULTS: written.append(folder))
    assert main(["bench", "fake"]) == 0
    assert written == []
    assert "--keep adds the figures to benchmarks/results" in capsys.readouterr().out
    assert main(["bench", "fake", "--quick", "--keep"]) == 0
    assert written == []
    assert main(["bench", "fake", "--keep"]) == 0
    assert main(["bench", "fake", "--out", str(tmp_path)]) == 0
    assert written == [ROOT / "benchmarks" / "results", tmp_path]
    assert main(["bench", "fake", "--out", str(tmp_path), "--keep"]) == 2
    assert main(["bench", "--threads", str(10**20)]) == 2

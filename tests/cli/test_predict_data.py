"""`multimodal predict CHECKPOINT DATA`: every row answered once and in order, whatever its source, and whenever it is killed."""

import csv
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal as mm
from multimodal.cli import batch as batch_module
from multimodal.cli import main
from multimodal.data import open_table
from multimodal.files import lock
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

LABEL = "text -> label"
NASTY = [
    'a "quoted", one',
    "two\nlines",
    "cr\rlf\r\n",
    "=1+1",
    "tab\there",
    "ünï ✓ 漢字",
    " blanks ",
    "back\\slash",
    "x,y;z",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    kinds = {
        "image": ImagePatches(patch=4, channels=1),
        "text": TextBytes(),
        "label": Labels(("dark", "light", '=odd, "name"')),
    }
    core = mm.Core(width=16, depth=1, heads=2)
    mm.Model(kinds, core, [LABEL, "image -> label", "image -> text"]).save(folder / "model")
    random = np.random.default_rng(0)
    for i in range(9):
        path = folder / "photos" / ("dark", "light")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 4 + 4 * (i % 3)), dtype=np.uint8)).save(path)
    (folder / "photos" / "light" / "zz_broken.png").write_bytes(b"no picture")
    with (folder / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "answer"])
        writer.writerows([i, text, "theirs"] for i, text in enumerate(NASTY))
        writer.writerow([99, "", "nothing to read"])
    return folder


@pytest.fixture
def model(home):
    return mm.Model.load(home / "model")


def rows_of(path: Path) -> list[dict]:
    """The rows of a table, read by other libraries."""
    ending = path.suffix
    if ending == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    if ending == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return parquet.read_table(path).to_pylist()
    head, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    back = {"\\t": "\t", "\\n": "\n", "\\r": "\r", "\\\\": "\\"}
    unescaped = [
        ["".join(back.get(p, p) for p in re.findall(r"\\.|[^\\]", cell)) for cell in line.split("\t")] for line in lines
    ]
    return [dict(zip(head.split("\t"), cells, strict=True)) for cells in unescaped]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_keeps_its_columns_and_has_the_answers_of_the_library(say, home, model, ending):
    out = home / f"texts_out.{ending}"
    code, _, err = say(
        "predict", "model", "texts.csv", "--out", out.name, "--task", LABEL, "--probabilities", "--batch", "2"
    )
    assert code == 1, err  # the empty text
    assert "1 of 10 rows have an error; the first, row 9: " in err
    found = rows_of(out)
    wanted = model.predict(LABEL, [{"text": text} for text in NASTY])
    assert [row["text"] for row in found[:-1]] == NASTY
    assert [row["answer"] for row in found] == ["theirs"] * 9 + ["nothing to read"]  # the data's own column
    assert [row["model_answer"] for row in found[:-1]] == [answer.value for answer in wanted]
    for row, answer in zip(found, wanted, strict=False):
        assert float(row["confidence"]) == pytest.approx(answer.confidence, abs=1e-5)
        for name, p in answer.probability.items():
            assert float(row[f"p({name})"]) == pytest.approx(p, abs=1e-5)
    assert "text" in found[-1]["error"]
    assert not any(row["error"] for row in found[:-1])
    assert found[-1]["model_answer"] in ("", None)
    assert not (home / f"{out.name}.part").exists()
    if ending == "csv":
        assert [row["text"] for row in open_table(str(out)).rows(0)][:-1] == NASTY


def test_a_folder_a_glob_and_files_give_the_same_answers(say, home, model):
    folder = say("predict", "model", "photos", "--task", "image -> label", "--out", "a.csv")
    assert folder[0] == 1, folder
    found = rows_of(home / "a.csv")
    paths = sorted((home / "photos").rglob("*.png"))
    assert [home / row["file"] for row in found] == paths
    assert [row["label"] for row in found] == [path.parent.name for path in paths]
    wanted = model.predict("image -> label", [{"image": path} for path in paths[:-1]])
    assert [row["answer"] for row in found[:-1]] == [answer.value for answer in wanted]
    assert found[-1]["error"]
    assert say("predict", "model", "photos/*/*.png", "--task", "image -> label", "--out", "b.csv")[0] == 1
    names = [str(path.relative_to(home)) for path in paths]
    assert say("predict", "model", *names, "--task", "image -> label", "--out", "c.csv")[0] == 1
    assert (home / "b.csv").read_bytes() == (home / "c.csv").read_bytes()
    assert [row["answer"] for row in rows_of(home / "b.csv")] == [row["answer"] for row in found]


def test_shards_are_answered_in_their_order(say, home, model):
    samples = [{"text": text, "note": i} for i, text in enumerate(NASTY)]
    mm.write_shards(samples, home / "shards")
    code, _, err = say("predict", "model", "shards", "--task", LABEL, "--out", "shards.jsonl")
    assert code == 0, err
    found = rows_of(home / "shards.jsonl")
    assert [(row["row"], row["note"], row["text"]) for row in found] == [(i, i, text) for i, text in enumerate(NASTY)]
    assert [row["answer"] for row in found] == [a.value for a in model.predict(LABEL, samples)]


def test_a_task_that_writes_says_which_answers_were_cut(say, home, model):
    code, _, err = say("predict", "model", "photos", "--task", "image -> text", "--out", "w.jsonl", "--batch", "3")
    assert code == 1, err
    found = rows_of(home / "w.jsonl")
    wanted = model.predict("image -> text", [{"image": home / row["file"]} for row in found[:-1]])
    assert [(row["answer"], row["complete"]) for row in found[:-1]] == [(a.value, a.complete) for a in wanted]
    assert len(found) == 10


def test_lines_whose_keys_differ_lose_none(say, home):
    lines = [{"text": "a"}, {"text": "b", "more": [1, {"x": None}]}, {"other": 1}]
    (home / "ragged.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nno json\n")
    assert say("predict", "model", "ragged.jsonl", "--task", LABEL, "--out", "ragged.csv")[0] == 1
    found = rows_of(home / "ragged.csv")
    assert list(found[0]) == ["text", "more", "other", "answer", "confidence", "error"]
    assert json.loads(found[1]["more"]) == [1, {"x": None}]
    assert found[2]["other"] == "1"
    assert "'text'" in found[2]["error"] or "text" in found[2]["error"]
    assert "line 4" in found[3]["error"]


# Killed and resumed


def forked(work) -> int:
    """The exit code of a copy of this process that does some work; minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that is killed is a fork of this one")
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_killed_run_goes_on_and_gives_the_same_file(say, home, monkeypatch, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    with (home / "many.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows(["abc " * (i % 7) if i % 5 else " "] for i in range(40))
    words = ["predict", "model", "many.csv", "--task", LABEL, "--batch", "3", "--probabilities", "--out"]
    kept, seen = batch_module._entry, []

    def until(rows: int):
        def entry(*arguments):
            seen.append(1)
            if len(seen) > rows:
                os.kill(os.getpid(), signal.SIGKILL)
            return kept(*arguments)

        def work():
            monkeypatch.setattr(batch_module, "_entry", entry)
            return main([*words, f"killed.{ending}"])

        return work

    code, _, err = say(*words, f"whole.{ending}")
    assert code == 1, err
    for rows in (0, 17):
        assert forked(until(rows)) == -signal.SIGKILL
        assert not (home / f"killed.{ending}").exists()
    with (home / f"killed.{ending}.part").open("ab") as file:  # as a power cut leaves it
        file.write(b'{"answer": "da\0\0')
    code, _, err = say(*words, f"killed.{ending}")
    assert code == 1
    assert "17 rows are answered already" in err
    assert (home / f"killed.{ending}").read_bytes() == (home / f"whole.{ending}").read_bytes()
    assert len(rows_of(home / f"whole.{ending}")) == 40


def interrupted(say, monkeypatch, out: str, *more: str) -> None:
    """A run that is stopped by Ctrl-C after three rows."""
    kept, seen = batch_module._entry, []

    def entry(*arguments):
        seen.append(1)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return kept(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "_entry", entry)
        assert say("predict", "model", "texts.csv", "--task", LABEL, "--out", out, *more)[0] == 130


def test_what_was_begun_with_other_settings_is_not_mixed(say, home, refused, monkeypatch):
    interrupted(say, monkeypatch, "mixed.csv")
    line = ["predict", "model", "texts.csv", "--task", LABEL, "--out", "mixed.csv"]
    assert "other data, fields or options" in refused(*line, "--probabilities")
    assert say(*line)[0] == 1
    assert len(rows_of(home / "mixed.csv")) == 10
    assert "it is there already" in refused(*line)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process is a fork of this one")
def test_two_processes_do_not_write_one_table(home, refused, monkeypatch, say):
    interrupted(say, monkeypatch, "held.csv")
    held = lock(home / "held.csv.part")
    try:
        assert forked(lambda: main(["predict", "model", "texts.csv", "--task", LABEL, "--out", "held.csv"])) == 2
    finally:
        held.close()
    assert not (home / "held.csv").exists()


def test_a_file_that_came_meanwhile_is_not_replaced(say, home, monkeypatch):
    interrupted(say, monkeypatch, "late.csv")
    (home / "late.csv").write_text("mine")
    code, _, err = say("predict", "model", "texts.csv", "--task", LABEL, "--out", "late.csv")
    assert code == 2
    assert "is there by now" in err
    assert (home / "late.csv").read_text() == "mine"
    (home / "late.csv").unlink()
    assert say("predict", "model", "texts.csv", "--task", LABEL, "--out", "late.csv")[0] == 1  # nothing was lost


# Pictures as answers


def test_answers_that_are_pictures_are_files_beside_the_table(say, home):
    kinds = {"text": TextBytes(), "image": ImagePatches(patch=4, channels=1)}
    task = mm.Task("image -> image", mm.Masked(0.5))
    mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [task]).save(home / "drawer")
    code, _, err = say("predict", "drawer", "photos", "--out", "drawn.csv")
    assert code == 1, err
    found = rows_of(home / "drawn.csv")
    assert len({row["answer"] for row in found[:-1]}) == 9
    for row in found[:-1]:
        assert row["answer"].startswith("drawn_files/")
        assert (home / row["answer"]).stat().st_size > 0


# Standard input


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the command runs in a fork of this process")
def test_standard_input_is_answered_as_it_comes_and_in_order(home, model, monkeypatch):
    monkeypatch.chdir(home)
    (theirs, ours), (answers, written) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(ours), os.close(answers)
            os.dup2(theirs, 0)
            sys.stdin, sys.stdout = open(0), os.fdopen(written, "w")  # noqa: SIM115
            code = main(["predict", "model", "-", "--task", LABEL])
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(theirs), os.close(written)
    with os.fdopen(ours, "wb") as send, os.fdopen(answers, "rb") as receive:
        for text in NASTY:  # each is answered before the next is sent
            send.write(json.dumps({"text": text, "id": text[:2]}).encode() + b"\n")
            send.flush()
            found = json.loads(receive.readline())
            assert found["sample"]["text"] == text
            assert found["answer"] == model.predict(LABEL, text=text).value
        rest = "".join(json.dumps({"text": str(i)}) + "\n" for i in range(300)) + 'no json\n\n{"text": "last"}'
        send.write(rest.encode())
        send.close()
        found = [json.loads(line) for line in receive]
    assert [one["sample"].get("text") for one in found] == [*map(str, range(300)), None, "last"]
    assert "line 310" in found[300]["error"]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_what_stands_in_for_standard_input_is_read_too(say, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"t": "a"}\n{"t": "b"}\n'))
    code, out, err = say("predict", "model", "-", "--task", LABEL, "--fields", "text=t")
    assert code == 0, err
    assert [json.loads(line)["sample"] for line in out.splitlines()] == [{"t": "a"}, {"t": "b"}]


def test_without_out_a_table_is_answered_on_standard_output(say):
    code, out, _ = say("predict", "model", "texts.csv", "--task", LABEL)
    assert code == 1
    assert [json.loads(line)["sample"]["text"] for line in out.splitlines()] == [*NASTY, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["texts.csv", "--out", "x.xlsx"], "end its name in .csv, .tsv, .jsonl, .parquet"),
        (["texts.csv", "--out", "texts.csv"], "it is there already"),
        (["texts.csv", "--out", "texts.csv/x.csv"], "is a file, not a folder"),
        (["nowhere/*.png", "--out", "x.csv"], "no file has a name like"),
        (["nowhere.csv", "--out", "x.csv"], "there is no file or folder nowhere.csv"),
        (["texts.csv", "photos", "--out", "x.csv"], "photos is no file"),
        (["texts.csv", "-"], "standard input"),
        (["-", "--out", "x.csv"], "answers to standard input go to standard output"),
        (["texts.csv", "--out", "x.csv", "--fields", "text=words"], "there is no 'words'"),
        (["photos", "--out", "x.csv"], "several tasks read these data"),
        (["texts.csv", "--out", "x.csv", "--fields", "id"], "the data have id"),
        (["texts.csv", "--out", "x.csv", "--batch", "0", "--task", LABEL], "--batch 0"),
        (["photos", "--out", "x.csv", "--task", "image -> text", "--probabilities"], "does not choose among classes"),
        (["texts.csv", "--out", "x.csv", "--text", "a", "--text", "b"], "one value for all rows"),
        (["--probabilities", "--text", "a"], "are about data"),
        (["texts.csv", "--out", "x.csv", "--wrong", "a"], "--wrong"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(refused, home, words, message):
    assert message in refused("predict", "model", *words)
    assert not (home / "x.csv").exists()
    assert not (home / "x.csv.part").exists()


def test_one_value_for_all_rows(say, home):
    kinds = {"image": ImagePatches(patch=4, channels=1), "text": TextBytes(), "label": Labels(("no", "yes"))}
    mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), ["image question:text -> label"]).save(home / "asks")
    code, _, err = say("predict", "asks", "photos", "--question", "is it dark?", "--out", "asked.csv")
    assert code == 1, err
    assert {row["answer"] for row in rows_of(home / "asked.csv")[:-1]} <= {"no", "yes"}
    assert say("predict", "asks", "photos", "--without", "question", "--out", "asked2.csv")[0] == 1


# The iterator


def test_predict_each_gives_what_predict_gives_and_reads_little_ahead(model):
    read = []

    def samples():
        for i in range(100):
            read.append(i)
            yield {"text": "ab" * (1 + i * 37 % 11)}

    each = model.predict_each(LABEL, samples(), batch=4)
    assert read == []
    first = next(each)
    assert len(read) == 16
    answers = [first, *each]
    wanted = model.predict(LABEL, samples())
    assert [a.value for a in answers] == [a.value for a in wanted]
    assert [a.confidence for a in answers] == pytest.approx([a.confidence for a in wanted], abs=1e-5)


@pytest.mark.parametrize("task", [LABEL, "image -> text"])
def test_predict_each_gives_errors_in_the_place_of_answers(model, task):
    good = {"text": "a", "image": np.zeros((4, 4), np.float32)}
    bad = {"text": object(), "image": "no.png"}
    samples = [good, bad, ValueError("from the source"), good, {}, good]
    found = list(model.predict_each(task, samples, errors="yield", batch=2, first=7))
    assert [isinstance(one, Exception) for one in found] == [False, True, True, False, True, False]
    assert "sample 8" in str(found[1])
    assert str(found[2]) == "from the source"
    alone = model.predict(task, [good])[0]
    assert found[5].value == alone.value
    with pytest.raises(mm.MediaError, match="sample 1"):
        list(model.predict_each(task, samples))
    with pytest.raises(mm.ConfigError, match="errors='ignore'"):
        model.predict_each(task, samples, errors="ignore")


def test_predict_each_leaves_grad_and_training_mode_alone(model):
    model.train()
    for _ in model.predict_each(LABEL, [{"text": "a"}] * 3, batch=1):
        assert model.training
        assert torch.is_grad_enabled()

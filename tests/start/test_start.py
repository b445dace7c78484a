"""The quick path: what it sees in good and in hostile data, how it divides them, and that it trains what its program trains."""

import csv
import json
import os
import runpy
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import train_test_split

import multimodal as mm
from multimodal import augment
from multimodal.cli import main
from multimodal.declare import declaration
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.start import DataReport, one_call, rules
from multimodal.start.division import divide
from multimodal.start.gather import gather
from multimodal.start.survey import survey
from multimodal_tokenizers import AudioFrames, Number, TextBPE, TextBytes

FAST: dict[str, Any] = {"settings": ["steps=2"], "quiet": True}


def picture(path: Path, seed: int, grey: bool = False) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 9) if grey else (8, 9, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def classes(root: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 5) -> Path:
    for c, name in enumerate(names):
        for i in range(count):
            picture(root / name / f"{i}.png", 100 * c + i)
    return root


def table(path: Path, header: str, *rows: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(("\n".join([header, *rows]) + "\n").encode(encoding))
    return path


def looked(data: Any, **options: Any) -> Any:
    """The survey of data, without training."""
    given = {name: options.pop(name) for name in ("test", "encoding") if name in options}
    rows = gather(data, quiet=True, **given)
    found = survey(rows, quiet=True, **options)
    found.measured(found.used)
    return found, rows


@pytest.fixture(autouse=True)
def _no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals take most of the time of a small run."""
    monkeypatch.setattr(one_call, "RESAMPLES", 0)


# what is seen


def test_a_folder_of_classes_is_seen_as_it_is(tmp_path: Path):
    names = ("Größe ä", "猫", "train")
    root = classes(tmp_path / "photos", names)
    (root / "empty").mkdir()
    (root / "猫" / "broken.png").write_bytes(b"\x89PNG nothing")
    picture(root / "loose.png", 7)
    shutil.copy(root / "猫" / "0.png", root / "猫" / "copy.png")
    shutil.copy(root / "猫" / "1.png", root / "train" / "other.png")
    found = mm.quick(root, **FAST)
    assert list(found.report.classes) == sorted(names)
    assert found.report.saw == 20
    assert found.report.used == 17
    assert [len(names) for names in found.report.left_out.values()] == [1, 1, 1]
    assert found.report.left_out["broken"][0].startswith("猫/broken.png: ")
    assert found.report.left_out["in no class folder"] == ["loose.png"]
    equal, against = found.report.findings
    assert "4 samples are equal to others, in 2 groups" in equal
    assert "train/other.png (train) and 猫/1.png (猫)" in against
    assert "colour pictures of 8 x 9 pixels" in str(found.report)
    assert "猫" in found._repr_html_()


def test_the_mean_and_deviation_are_those_of_the_training_part(tmp_path: Path):
    root = tmp_path / "photos"
    for part, level in (("train", 50), ("test", 200)):
        for c in "ab":
            for i in range(3):
                path = root / part / c / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), level + i + 3 * (c == "a"), np.uint8)).save(path)
    found = mm.quick(root, **FAST)
    pixels = np.array([50, 51, 52, 53, 54, 55]) / 255
    assert found.report.fields["image"]["mean"][0] == pytest.approx(pixels.mean(), abs=1e-3)
    assert found.report.fields["image"]["grey"]
    assert found.model.packer.tokenizers["image"].channels == 1  # type: ignore[attr-defined]


def test_the_same_picture_in_train_and_test_is_left_out_of_train(tmp_path: Path):
    root = tmp_path / "photos"
    for part in ("train", "val", "test"):
        for c in "ab":
            for i in range(4):
                picture(root / part / c / f"{i}.png", hash((part, c, i)) % 2**31)
    shutil.copy(root / "test" / "a" / "0.png", root / "train" / "a" / "leak.png")
    found = mm.quick(root, **FAST).report
    assert found.parts == {"train": 8, "held_out": 8, "test": 8}
    assert list(found.left_out.values()) == [["train/a/leak.png"]]


def test_splits_inside_of_classes_are_read_too(tmp_path: Path):
    for c in "ab":
        for part in ("train", "test"):
            for i in range(4):
                picture(tmp_path / c / part / f"{i}.png", hash((part, c, i)) % 2**31)
    assert mm.quick(tmp_path, **FAST).report.parts == {"train": 8, "held_out": 0, "test": 8}


def wide(tmp_path: Path) -> Path:
    rows = [
        f"{'n/a' if i == 3 else 'abc' if i == 5 else i * 0.5},{'x' if i % 3 else i % 12},k{i},1,{'Y' if i % 2 else 'N'},"
        f'"{1000 + i * 1000:,}",{"" if i == 7 else "yes" if i % 2 else "no"}'
        for i in range(60)
    ]
    return table(tmp_path / "wide.csv", "a,b,id,same,leak,money,label", *rows)


def test_columns_of_a_table_are_judged_and_each_judgement_is_said(tmp_path: Path):
    found, rows = looked(wide(tmp_path))
    (row,) = found.fields
    assert row.columns == ("a", "b", "money")
    kinds = {name: about["kind"] for name, about in row.facts["columns"].items()}
    assert kinds == {"a": "number", "b": "category", "money": "number"}
    assert found.samples(9)["row"] == {"a": 4.5, "b": "9", "money": 10000.0}
    said = "\n".join(found.findings)
    for part in (
        "id is left out: it is another one in each row",
        "same is left out: it is the same in all rows (1)",
        "leak is left out: it says the answer one to one",
        "a: 1 cells ('n/a') are read as missing",
        "a: 1 cells are no numbers ('abc') and are read as missing",
        "money: commas are read as those between thousands, as in 1,000",
    ):
        assert part in said
    assert rows.left_out == {"without an answer": ["row 8"]}
    assert looked(wide(tmp_path), read=["leak"])[0].fields[0].columns == ("leak",)


def test_semicolons_decimal_commas_and_latin_1(tmp_path: Path):
    rows = [f"{i},5;Größe {i} wie schön;{'ja' if i % 2 else 'nein'}" for i in range(40)]
    path = table(tmp_path / "t.csv", "zahl;text;label", *rows, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"broken rows: row 1: line 2: it is not utf-8; give t.*--encoding latin-1"):
        gather(path, quiet=True)
    found, _ = looked(path, encoding="latin-1")
    assert found.findings == [
        "its cells are separated by semicolons",
        "zahl: commas are read as decimal ones, as in 0,5",
    ]
    assert found.samples(3) == {"text": "Größe 3 wie schön", "row": {"zahl": 3.5}, "label": "ja"}


def test_answers_decide_the_head(tmp_path: Path):
    numbers = table(tmp_path / "n.csv", "a,target", *(f"{i},{i * 1.5 + 0.25 * (i % 3)}" for i in range(30)))
    found = mm.quick(numbers, **FAST)
    assert isinstance(found.model.packer.tokenizers["number"], Number)
    assert found.evaluation is not None
    assert "R2" in found.evaluation
    several = tmp_path / "s.jsonl"
    lines = [{"text": f"words {i}", "labels": ["a"] * (i % 2) + ["b"] * (i % 3 == 0)} for i in range(30)]
    several.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert isinstance(mm.quick(several, **FAST).model.predict("text -> label", text="words 3").value, list)
    texts = table(tmp_path / "t.csv", "text,answer", *(f"what is {i},it is the number {i} of all" for i in range(30)))
    found = mm.quick(texts, **FAST)
    assert list(found.model.tasks) == ["text -> answer:text"]
    assert list(found.model.packer.tokenizers) == ["text"]


def test_files_named_by_a_table_and_those_that_are_not_there(tmp_path: Path):
    classes(tmp_path / "p", ("x",), 10)
    rows = [f"p/x/{i % 10}.png,is it red number {i},{'yes' if i % 2 else 'no'}" for i in range(20)]
    path = table(tmp_path / "t.csv", "file,question,label", *rows, "p/gone.png,what,yes")
    found = mm.quick(path, read=["image=file", "text=question"], **FAST)
    assert list(found.model.tasks) == ["image text -> label"]
    assert [name.split(":")[0] for name in found.report.left_out["broken"]] == ["row 21"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: classes(root, ("cat",)), r"all 5 samples that can be used are of one class, 'cat'"),
        (lambda root: classes(root, count=1), r"no test part can be made: 2 samples in 2 units"),
        (lambda root: picture(root / "1.png", 0).parent, r"holds pictures, and none lies in a class folder"),
        (lambda root: root.mkdir() or root, r"holds neither pictures nor sounds; wanted a sub-folder for each class"),
        (lambda root: table(root.with_suffix(".csv"), "a,b", "1,2"), r"say which column is the answer: --write COLUMN"),
        (lambda root: table(root.with_suffix(".csv"), "a,label"), r"holds no rows that can be used"),
        (lambda root: table(root.with_suffix(".csv"), "a,label", "1,", "2,"), r"'label', holds nothing in 2 rows"),
        (lambda root: {"a": 1}, r"quick: the data are dict; wanted a folder, a table, hf:NAME"),
        (lambda root: [1, 2], r"sample 0 is int, wanted a mapping of fields"),
        pytest.param(
            lambda root: "hf:nobody/none",
            r"a data set of the hub needs a network, or a copy of it on this disk",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_data_that_cannot_be_used_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, words: str):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "hub" in words:
        pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=words):
        mm.quick(make(tmp_path / "data"), **FAST)


def test_wrong_arguments_are_refused(tmp_path: Path):
    path = wide(tmp_path)
    for options, words in (
        ({"read": "a"}, r"read='a': give a list of texts"),
        ({"read": ["nowhere"]}, r"there is no column 'nowhere'"),
        ({"read": ["label"]}, r"column 'label' is read and is the answer"),
        ({"read": ["image=a"]}, r"column 'a' is asked for as image, and looks like number"),
        ({"write": "number=label"}, r"has cells that are no numbers, such as 'no'"),
        ({"minutes": 0}, r"minutes=0 must be more than 0"),
        ({"group": "b", "time": "a"}, r"time: row 4 has 'n/a' in column 'a'"),
    ):
        with pytest.raises(ConfigError, match=words):
            mm.quick(path, **{**FAST, **options})


# parts


def divided(answers: list[Any], seed: int = 0, **options: Any) -> Any:
    rows = range(len(answers))
    options.setdefault("keys", {row: bytes([row % 256, row // 256]) for row in rows})
    return divide(rows, strata=dict(enumerate(answers)), given=dict.fromkeys(rows, None), seed=seed, **options)


def test_each_class_has_its_share_of_the_test_part_as_in_scikit_learn():
    answers = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    parts = divided(answers).parts
    _, test = train_test_split(range(100), test_size=0.2, stratify=answers, random_state=0)
    assert Counter(answers[i] for i in parts["test"]) == Counter(answers[i] for i in test)
    assert sorted(parts["train"] + parts["test"]) == list(range(100))
    assert divided(answers).parts == parts
    assert divided(answers, seed=1).parts != parts


def test_small_classes_have_one_sample_in_each_part_and_single_ones_are_said():
    found = divided(["a"] * 20 + ["b"] * 2 + ["c"])
    assert sum(row in (20, 21) for row in found.parts["test"]) == 1
    assert 22 in found.parts["train"]
    assert "not tested, as all of its samples belong together or there is one only: c" in found.says


def test_equal_samples_and_groups_are_on_one_side_also_by_way_of_others():
    rows = range(60)
    keys = {
        row: bytes([5 if row == 6 else row]) for row in rows
    }  # 5 and 6 are equal, of two groups, which stay together
    groups = {row: row // 6 for row in rows}
    parts = divided(["a", "b"] * 30, keys=keys, groups=groups).parts
    test = set(parts["test"])
    assert len(test) == 12
    assert len({groups[row] for row in test} & {0, 1}) in (0, 2)
    for of in (keys, groups):
        assert {of[row] for row in test}.isdisjoint({of[row] for row in parts["train"]})


def test_by_time_the_latest_are_tested_and_one_time_is_not_cut():
    times = {row: float(row // 3) for row in range(30)}
    found = divided(["a", "b"] * 15, times=times)
    assert found.parts["test"] == list(range(24, 30))
    assert max(times[row] for row in found.parts["train"]) < min(times[row] for row in found.parts["test"])
    with pytest.raises(ConfigError, match="the last fifth of the samples has one time"):
        divided(["a", "b"] * 15, times=dict.fromkeys(range(30), 1.0))


def test_a_test_part_of_ones_own_and_a_column_split(tmp_path: Path):
    rows = [f"{i},{'test' if i % 4 == 0 else 'train'},{'yes' if i % 2 else 'no'}" for i in range(40)]
    path = table(tmp_path / "t.csv", "a,split,label", *rows)
    assert mm.quick(path, **FAST).report.parts == {"train": 30, "held_out": 0, "test": 10}
    with pytest.raises(ConfigError, match="has a test part of its own"):
        mm.quick(path, test=path, **FAST)
    a = table(tmp_path / "a.csv", "a,label", *(f"{i},{'yes' if i % 2 else 'no'}" for i in range(20)))
    b = table(tmp_path / "b.csv", "a,label", *(f"{i},{'yes' if i % 2 else 'no'}" for i in range(100, 106)))
    assert mm.quick(a, test=b, **FAST).report.parts["test"] == 6


# what is left behind


def test_the_program_trains_the_same_weights(tmp_path: Path):
    path = table(
        tmp_path / "t.csv", "a,b,label", *(f"{i % 7},{'xyz'[i % 3]},{'yes' if i % 2 else 'no'}" for i in range(40))
    )
    found = mm.quick(path, folder=tmp_path / "run", settings=["steps=5", "core.depth=1", "model.seed=3"], quiet=True)
    again = runpy.run_path(str(tmp_path / "run" / "script.py"))
    weights = again["model"].state_dict()
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    script = (tmp_path / "run" / "script.py").read_text()
    assert "steps=5" in script
    assert "depth=1" in script
    loaded = mm.Model.load(tmp_path / "run")
    assert torch.equal(loaded.state_dict()["core.norm.weight"], weights["core.norm.weight"])


@pytest.mark.parametrize("kind", ["pictures", "series", "texts"])
def test_programs_of_other_kinds_run_too(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    if kind == "pictures":
        data: Any = classes(tmp_path / "photos")
    elif kind == "series":
        draw = np.random.default_rng(0)
        data = [{"series": draw.standard_normal((12, 2)), "label": "ab"[i % 2]} for i in range(20)]
    else:
        monkeypatch.setattr(rules, "BYTES_BELOW", 10)
        data = [{"text": f"some words {i}", "label": "ab"[i % 2]} for i in range(20)]
    found = mm.quick(data, folder=tmp_path / "run", **FAST)
    weights = runpy.run_path(str(tmp_path / "run" / "script.py"))["model"].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())
    for name in ("data.json", "data.html", "curves.png", "report/report.html", "model/config.json"):
        assert (tmp_path / "run" / name).is_file()
    assert DataReport.load(tmp_path / "run") == found.report
    if kind == "texts":
        assert isinstance(found.model.packer.tokenizers["text"], TextBPE)


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path):
    path = table(
        tmp_path / "t.csv", "a,b,label", *(f"{i % 7},{'xyz'[i % 3]},{'yes' if i % 2 else 'no'}" for i in range(40))
    )
    options: dict[str, Any] = {"settings": ["steps=12", "checkpoint_every=4"], "quiet": True}
    whole = mm.quick(path, folder=tmp_path / "whole", **options)

    def kill(row: Any) -> None:
        if row["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        mm.quick(path, folder=tmp_path / "cut", trackers=[kill], **options)
    found = mm.quick(path, folder=tmp_path / "cut", **options)
    assert [row["step"] for row in found.run.history if "loss" in row] == list(range(1, 13))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name
    assert found.evaluation is not None
    with pytest.raises(ConfigError, match="holds a training run that went to its end"):
        mm.quick(path, folder=tmp_path / "cut", **options)
    taken = mm.quick(path, folder=tmp_path / "cut", resume=True, **options)
    assert taken.evaluation == found.evaluation
    with pytest.raises(CheckpointError, match=r"holds a run with another seed \(0\)"):
        mm.quick(path, folder=tmp_path / "cut", seed=1, **options)
    with path.open("a") as file:
        file.write("1,x,yes\n")
    with pytest.raises(CheckpointError, match="holds a run with other data"):
        mm.quick(path, folder=tmp_path / "cut", **options)


def test_a_stop_is_said_and_the_same_command_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    classes(Path("photos"))
    command = ["train", "photos", "--set", "steps=6", "--set", "checkpoint_every=2"]
    stopped = []

    def stop(model: Any, *arguments: Any, **options: Any) -> Any:
        def interrupt(row: Any) -> None:
            if row["step"] == 3 and not stopped:
                stopped.append(1)
                os.kill(os.getpid(), signal.SIGINT)

        return fit(model, *arguments, **{**options, "trackers": [interrupt]})

    import multimodal.train.job as job

    fit = job.fit
    monkeypatch.setattr(job, "fit", stop)
    assert main(command) == 130
    assert (
        "multimodal train photos --set=steps=6 --set=checkpoint_every=2 --folder runs/photos again"
        in capfd.readouterr().out
    )
    assert main(command) == 0
    out = capfd.readouterr().out
    for line in (
        "the data, parts and choices are those of the run in runs/photos",
        "multimodal evaluate runs/photos runs/photos/test.jsonl",
        "program   runs/photos/script.py",
    ):
        assert line in out
    assert main(["evaluate", "runs/photos", "runs/photos/test.jsonl", "--resamples", "0"]) == 0
    assert main(["predict", "runs/photos", "--image", "photos/cat/0.png"]) == 0
    assert main(command) == 2
    assert "went to its end" in capfd.readouterr().err


def test_files_of_others_are_not_written_over(tmp_path: Path):
    data = [{"text": f"w {i}", "label": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds train.jsonl, which the quick path did not write"):
        mm.quick(data, folder=tmp_path, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_run_that_was_killed_while_it_looked_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = [{"text": f"w {i}", "label": "ab"[i % 2]} for i in range(20)]

    def fail(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(one_call, "write_parts", fail)
        with pytest.raises(Killed):
            mm.quick(data, folder=tmp_path / "run", **FAST)
    assert mm.quick(data, folder=tmp_path / "run", **FAST).run.finished


def test_the_command_line_refuses_what_would_do_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    Path("recipe_of_mine.py").write_text("def recipe(): ...\n")
    for command, words in (
        (["train", "recipe_of_mine.py", "--read", "a"], "--read is for a folder, a table or a data set"),
        (["train", "nowhere.csv"], "there is no file or folder nowhere.csv"),
        (["train", str(wide(tmp_path)), "--processes", "2"], "data are trained on in one process"),
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err


# rules


def test_the_rules_fit_the_minutes_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_call, "_speed", lambda job: 0.5)
    path = table(tmp_path / "t.csv", "a,label", *(f"{i % 7},{'yes' if i % 2 else 'no'}" for i in range(40)))
    found = mm.quick(path, minutes=0.1, quiet=True)  # 0.1 * 60 * 0.9 / 0.5 = 10.8
    assert found.run.history[-1]["step"] == 10
    assert "training: 10 of 300 steps, which fit in 0.1 minutes; a step takes 500 ms here, so about 5 s" in found.says


def rows_of(answer: Any, count: int = 90) -> list[dict[str, Any]]:
    """Rows of three numbers and what is answered about them."""
    x = np.random.default_rng(0).standard_normal((count, 3))
    return [dict(zip("abc", map(float, row), strict=True)) | {"target": answer(row)} for row in x]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "depth"),
    [(lambda row: float(row @ [1.0, -2.0, 0.5]), 0), (lambda row: "ny"[int(row[0] * row[1] > 0)], 2)],
)
def test_a_sum_of_columns_needs_no_blocks_and_a_product_does(answer: Any, depth: int):
    found = mm.quick(rows_of(answer, 240), settings=["steps=200"], quiet=True)
    assert found.model.core.core.depth == depth
    (line,) = [line for line in found.says if "cross-validation" in line]
    assert line.startswith("blocks" if depth else "no blocks")


def test_folds_are_the_training_part_with_equal_shares_of_the_answers(monkeypatch: pytest.MonkeyPatch):
    trained, measured, answered = [], [], mm.evaluate

    def samples_of(job: Any) -> Any:
        source = job.data["row -> label"]
        return list(getattr(source, "samples", source))  # without missing cells, if there are such

    monkeypatch.setattr(one_call, "_fitted", lambda job, steps: trained.append(samples_of(job)))

    def evaluate(model: Any, task: str, samples: Any, **options: Any) -> Any:
        if not options.get("resamples", 1):
            return answered(model, task, samples, **options)
        measured.append(samples)
        return {"loss": len(measured)}

    monkeypatch.setattr(one_call, "evaluate", evaluate)
    samples = [{"a": float(i), "b": float(i % 7), "c": float(i % 5), "label": "xyz"[i % 3]} for i in range(75)]
    found = mm.quick(samples, **FAST)
    train = [found.parts["train"][i] for i in range(60)]
    assert measured[::2] == measured[1::2]
    assert sorted(str(x) for fold in measured[::2] for x in fold) == sorted(map(str, train))
    for fold, rest in zip(measured, trained, strict=True):
        assert Counter(x["label"] for x in fold) in [Counter(x=a, y=b, z=20 - a - b) for a in (6, 7) for b in (6, 7)]
        assert sorted(map(str, [*fold, *rest])) == sorted(map(str, train))
    # the means of 1, 3, 5 and of 2, 4, 6, as folds are of equal size
    assert found.says[-1] == (
        "blocks: the loss in 3-fold cross-validation of the training part is 3.0000 with blocks and 4.0000 without"
    )


def test_many_steps_of_the_user_are_not_done_for_each_fold(monkeypatch: pytest.MonkeyPatch):
    def fitted(job: Any, steps: int) -> None:
        raise KeyError(steps)

    monkeypatch.setattr(one_call, "_fitted", fitted)
    for setting, steps in (("steps=5000", 300), ("steps=7", 7)):
        with pytest.raises(KeyError, match=f"^{steps}$"):
            mm.quick(rows_of(lambda row: float(row @ [1.0, -2.0, 0.5])), settings=[setting], quiet=True)


@pytest.mark.slow
def test_a_table_without_blocks_is_in_the_program_and_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared = []

    def better(*arguments: Any) -> list[float]:
        compared.append(arguments)
        return [0.5, 0.25]

    monkeypatch.setattr(one_call, "_compared", better)
    samples = rows_of(lambda row: float(row @ [1.0, -2.0, 0.5]))
    found = mm.quick(samples, folder=tmp_path / "run", **FAST)
    again = mm.quick(samples, folder=tmp_path / "run", resume=True, **FAST)
    assert len(compared) == 1
    assert again.says == found.says
    assert found.model.core.core.depth == 0
    script = (tmp_path / "run" / "script.py").read_text()
    assert 'MissingCells(train, "row", share=0.1)' in script  # 10 by 72 samples are more
    assert "bins=0" in script
    weights = runpy.run_path(str(tmp_path / "run" / "script.py"))["model"].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())
    # what the user asks for, groups, little time and large tables are not compared
    mm.quick(samples, settings=["steps=2", "core.depth=1"], quiet=True)
    mm.quick([{**x, "who": f"p{i % 9}"} for i, x in enumerate(samples)], group="who", **FAST)
    monkeypatch.setattr(one_call, "_speed", lambda job: 0.01)
    mm.quick(samples, minutes=0.1, quiet=True)  # 6 times 300 steps are 18 s
    monkeypatch.setattr(rules, "LINEAR_BELOW", 50)
    mm.quick(samples, **FAST)
    assert len(compared) == 1


def test_a_stop_while_models_are_compared_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fit, handled = one_call.fit, []
    monkeypatch.setattr(one_call, "fit", lambda *a, **o: handled.append(1) or type("R", (), {"finished": False})())
    with pytest.raises(KeyboardInterrupt):
        mm.quick(rows_of(lambda row: float(row @ [1.0, -2.0, 0.5])), folder=tmp_path / "run", **FAST)
    assert len(handled) == 1
    monkeypatch.setattr(one_call, "fit", fit)
    assert mm.quick(rows_of(lambda row: float(row @ [1.0, -2.0, 0.5])), folder=tmp_path / "run", **FAST).run.finished


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64, 224, 4000])
def test_pictures_of_any_size_have_few_tokens(side: int):
    (patch,) = rules.first(rules.PATCHES, min(side, rules.LARGEST_SIDE))
    assert 9 <= (min(side, rules.LARGEST_SIDE) / patch) ** 2 <= 100


def photographs(root: Path, names: tuple[str, ...] = ("cat", "dog"), side: int = 12) -> Path:
    for c, name in enumerate(names):
        for i in range(5):
            pixels = np.random.default_rng([c, i]).integers(0, 255, (side, side, 3), dtype=np.uint8)
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def test_pictures_are_augmented_and_the_program_says_how(tmp_path: Path):
    found = mm.quick(photographs(tmp_path / "p", side=80), folder=tmp_path / "run", **FAST)
    assert "augmentation of image: other sizes, angles, light and noise, mirror images (--no-augment)" in found.says
    (line,) = [line for line in (tmp_path / "run" / "script.py").read_text().split("\n") if "mm.fit" in line]
    wanted = '{"image": (augment.LongestSide(64, 16), *augment.for_pictures(smallest=16, flip=True, strength=0.3))}'
    assert f"augment.Augmented(train, {wanted})" in line
    declared = json.loads((tmp_path / "run" / "config.json").read_text())["sources"]["image -> label"]
    ours = (augment.LongestSide(64, 16), *augment.for_pictures(smallest=16, flip=True, strength=0.3))
    assert declared["Augmented"]["fields"]["image"] == json.loads(json.dumps([declaration(part) for part in ours]))
    weights = runpy.run_path(str(tmp_path / "run" / "script.py"))["model"].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())


def test_augmentation_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = photographs(tmp_path / "p")
    found = mm.quick(root, folder=tmp_path / "run", augment=False, **FAST)
    assert not [line for line in found.says if "augmentation" in line]
    assert "augment" not in (tmp_path / "run" / "script.py").read_text().split('"""')[2]
    monkeypatch.chdir(tmp_path)
    assert main(["train", "p", "--no-augment", "--set", "steps=2"]) == 0
    script = (tmp_path / "runs" / "p" / "script.py").read_text()
    assert "`multimodal train p --no-augment --set=steps=2 --folder runs/p`" in script
    assert "Augmented" not in script
    with pytest.raises(ConfigError, match="augment='no' must be True or False"):
        mm.quick(root, augment="no", **FAST)  # type: ignore[arg-type]


def test_sounds_are_augmented_and_numbers_to_answer_are_not():
    draw = np.random.default_rng(0)
    clips = [{"audio": (draw.standard_normal(2000).astype(np.float32) / 9, 8000)} for _ in range(12)]
    named = [{**clip, "label": "ab"[i % 2]} for i, clip in enumerate(clips)]
    assert "augmentation of audio: other speakers, microphones and noise (--no-augment)" in mm.quick(named, **FAST).says
    measured = [{**clip, "target": i + 0.5} for i, clip in enumerate(clips)]
    assert not [line for line in mm.quick(measured, **FAST).says if "augmentation" in line]


@pytest.mark.parametrize(
    ("seconds", "answer", "stem"), [(0.5, "label", True), (2.5, "label", False), (0.5, "number", False)]
)
def test_short_sounds_that_are_classified_are_trimmed_and_have_a_stem(seconds: float, answer: str, stem: bool):
    facts = [{"rate": 8000, "seconds": {"middle": seconds, "most": seconds}}]
    found, code = rules._sound(["audio"], facts, [], {"kind": answer})
    assert isinstance(found, AudioFrames)
    assert (found.trim_db, found.stem_channels) == ((20.0, 16) if stem else (None, 0))
    assert eval(code, {"AudioFrames": AudioFrames}) == found


@pytest.mark.parametrize(
    ("names", "colours", "fields", "kind", "right"),
    [
        (("cat", "copyright"), 0.8, 1, "label", True),
        (("cat", "dog"), 0.8, 1, "labels", True),
        (("cat", "dog"), 0.01, 1, "label", False),  # a drawing
        (("cat", "dog"), 0.8, 2, "label", False),
        (("cat", "dog"), 0.8, 1, "text", False),
        (("A", "B"), 0.8, 1, "label", False),
        (("猫", "犬"), 0.8, 1, "label", False),
        (("10", "20"), 0.8, 1, "label", False),
        (("-1.5", "none"), 0.8, 1, "label", False),
        (("turn left", "stop"), 0.8, 1, "label", False),
        (("turn_Right_2", "stop"), 0.8, 1, "label", False),
    ],
)
def test_a_mirror_image_only_where_it_is_right(
    names: tuple[str, ...], colours: float, fields: int, kind: str, right: bool
):
    seen = {"kind": "image", "grey": False, "colours": colours}
    report = DataReport(
        source="",
        saw=2,
        fields={"image": seen, "text": {"kind": "text"}} if fields == 2 else {"image": seen},
        answer={"name": "label", "kind": kind, "column": "label", "classes": list(names)},
        parts={},
    )
    assert rules.may_mirror(report) is right
    grey = replace(report, fields={"image": {**seen, "grey": True}})
    assert not rules.may_mirror(grey)


def test_photographs_have_many_colours_and_drawings_few(tmp_path: Path):
    found = mm.quick(photographs(tmp_path / "p"), **FAST)
    assert found.report.fields["image"]["colours"] > 0.9
    for c, name in enumerate(("round", "square")):
        for i in range(5):
            pixels = np.full((12, 12, 3), (200, 10 * i, 0), np.uint8)
            pixels[c : i + 4, 2:8] = (0, 0, 255)
            path = tmp_path / "d" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    found = mm.quick(tmp_path / "d", **FAST)
    assert found.report.fields["image"]["colours"] == pytest.approx(2 / 144, abs=1e-3)
    assert not [line for line in found.says if "augmentation" in line]


def test_a_held_out_part_ends_training_and_the_best_model_is_taken(tmp_path: Path):
    draw = np.random.default_rng(0)
    rows = [  # answers by chance: after the first steps the held-out loss only rises
        {"a": float(a), "b": float(b), "label": "xy"[int(draw.integers(2))], "split": "val" if i % 2 else "train"}
        for i, (a, b) in enumerate(draw.standard_normal((120, 2)))
    ]
    rows += [{**row, "a": row["a"] + 5, "split": "test"} for row in rows[:20]]
    settings = ["steps=80", "lr=0.03", "evaluate_every=8", "ema=0", "core.dropout=0"]
    found = mm.quick(rows, settings=settings, folder=tmp_path / "run", quiet=True)
    assert f"patience={rules.PATIENCE}" in (tmp_path / "run" / "script.py").read_text()
    losses = {row["step"]: row["row -> label loss"] for row in found.run.history if "row -> label loss" in row}
    assert found.run.best_step == min(losses, key=lambda step: losses[step])
    assert found.run.history[-1]["step"] < 80
    loss = mm.train.evaluate(found.model, "row -> label", found.parts["held_out"])["loss"]
    assert loss == pytest.approx(losses[found.run.best_step], rel=1e-4)


def test_the_table_of_rules_is_that_of_the_docs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "quick.md").read_text(encoding="utf-8")
    assert text.split("<!-- rules -->")[1].split("<!-- / -->")[0].strip() == rules.table()


def test_little_text_is_read_as_bytes():
    found = mm.quick([{"text": f"w {i}", "label": "ab"[i % 2]} for i in range(20)], **FAST)
    assert isinstance(found.model.packer.tokenizers["text"], TextBytes)


def test_a_spreadsheet_is_read(tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["a", "label"])
    for i in range(20):
        book.active.append([i, "yes" if i % 2 else "no"])
    book.save(tmp_path / "t.xlsx")
    found, _ = looked(tmp_path / "t.xlsx")
    assert found.samples(3) == {"row": {"a": 3}, "label": "yes"}


def test_a_data_frame_is_read():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [1.5, None] * 20, "c": ["u", "v"] * 20, "y": [0, 1, 2, 1] * 10})
    found = mm.quick(frame, write="y", **FAST)
    assert found.report.classes.keys() == {"0", "1", "2"}


def test_csv_module_agrees_on_the_parts_that_are_written(tmp_path: Path):
    path = wide(tmp_path)
    mm.quick(path, folder=tmp_path / "run", **FAST)
    with path.open(newline="") as file:
        known = {row["id"]: row for row in csv.DictReader(file)}
    texts = [(tmp_path / "run" / f"{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "test")]
    lines = [json.loads(line) for text in texts for line in text.split("\n")[:-1]]
    assert len(lines) == 59
    money = Counter(line["row"]["money"] for line in lines)
    assert money == Counter(float(row["money"].replace(",", "")) for row in known.values() if row["label"])


# from trained weights


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    folder = tmp_path_factory.mktemp("encoder")
    transformers.Dinov2Model(config).eval().save_pretrained(folder)
    transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


def test_an_encoder_with_trained_weights_is_read_once_and_stays_as_it_is(encoder: Path, tmp_path: Path):
    root = classes(tmp_path / "photos", count=10)
    found = mm.quick(root, start=str(encoder), folder=tmp_path / "run", settings=["steps=12"], quiet=True)
    weights = {name: x for name, x in found.model.state_dict().items() if "frozen_part" in name}
    loaded = mm.Tower.of(mm.pretrained(str(encoder)), kind="image").weights
    assert loaded is not None
    assert weights
    for name, tensor in loaded.items():
        (ours,) = (x for key, x in weights.items() if key.endswith("frozen_part." + name))
        assert torch.equal(ours, tensor), name
    assert any("trained weights" in line for line in found.says)
    kept = sum(path.stat().st_size for path in (tmp_path / "run" / "vectors").rglob("*") if path.is_file())
    assert kept > 20 * 32 * 4, "the vectors of the samples are kept"
    # the program trains the same
    runpy.run_path(str(tmp_path / "run" / "script.py"))
    again = mm.Model.load(tmp_path / "run" / "script" / "model").state_dict()
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    assert mm.Model.load(tmp_path / "run").predict("image -> label", image=root / "cat" / "0.png").value in (
        "cat",
        "dog",
    )


def test_trained_weights_that_do_not_fit_the_data_are_refused_by_name(encoder: Path, tmp_path: Path):
    texts = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(12)]
    with pytest.raises(ConfigError, match=r"reads image, and the data are of the kind 'text'.*MiniLM"):
        mm.quick(texts, start=str(encoder), **FAST)
    both = [{"image": np.zeros((8, 8, 3), np.uint8) + i, "text": f"w {i}", "label": "ab"[i % 2]} for i in range(12)]
    with pytest.raises(ConfigError, match="reads one kind, and the data have image, text"):
        mm.quick(both, start=str(encoder), **FAST)
    with pytest.raises(CheckpointError):
        mm.quick(texts, start=str(tmp_path), **FAST)


def test_an_encoder_is_measured_on_the_first_cell_that_is_there(encoder: Path):
    from multimodal.start.trained import trained

    picture = np.zeros((8, 8, 3), np.uint8)
    found = trained(str(encoder), {"image": {"kind": "image"}}, [{"image": None}, {"image": picture}])
    assert len(found.tower(picture)) == 1


def test_start_is_an_option_of_the_command(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = classes(tmp_path / "photos")
    options = ["--start", str(encoder), "--set", "steps=2", "--folder", str(tmp_path / "run")]
    assert main(["train", str(root), *options]) == 0
    assert "an encoder with trained weights" in capsys.readouterr().out
    assert "mm.Tower.of(mm.pretrained(" in (tmp_path / "run" / "script.py").read_text()

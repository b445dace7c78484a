"""Promise 6: a bad input is an error that names it, a broken sample is listed, and every reader accounts for all it saw."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import multimodal as mm
from multimodal.data import Batches
from multimodal.data.tables import open_table
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError
from tests import test_stream as stream
from tests.data.test_data import PACKER, READ, TEXTS, Broken, make
from tests.data.test_faults_readers import adds_up, left, rows_of, table

cells = st.text(st.characters(codec="utf-8", exclude_characters='\0\r\n\t,"'), max_size=4)
names = st.sampled_from(
    ["cat", "dog", ".hidden", "@eaDir", "a.png", "b.PNG", "._c.png", "notes.txt", "Thumbs.db", "d.wav"]
)


@pytest.mark.parametrize(
    ("error", "task", "change", "message"),
    [
        (StreamError, "text -> ctc:story", {"text": "ab", "ctc": "aaab"},
         "{sample}: CTC: 4 symbols need at least 6 rows (one each, one more between equal neighbours), but the context has 2"),
        (StreamError, "text -> ctc:story", {"text": None, "ctc": "a"}, "{sample}: every field that is read is None; give at"),
        (TaskError, "image text -> label", {"image": "-"}, "task 'image text -> label': the sample has no field 'image'"),
        (TaskError, "text -> label", {"label": "-"}, "the sample has no field 'label'"),
        (TaskError, "image -> lable", {}, "there is no task 'image -> lable'"),
        (MediaError, "text -> label", {"text": 3}, "{sample}, field 'text': TextBytes.encode: wanted text (str), not int 3"),
        (MediaError, "text -> label", {"text": ""}, "{sample}, field 'text': TextBytes.encode: str '' gave no tokens"),
        (MediaError, "text -> label", {"label": "d"}, "{sample}, field 'label': Labels.encode: 'd' is not one of"),
        (StreamError, "text -> text", {"answer": None}, "{sample}: field 'answer' is None, that is not given"),
    ],
    ids=["long target", "all None, CTC", "no image", "no label", "no task", "not text", "no text", "no class", "no answer"],
)  # fmt: skip
def test_a_bad_sample_is_named(error, task, change, message):
    packer = mm.packer.Packer(
        stream.SMALL, [*stream.TASKS, "image text -> label", "text -> text", mm.Task("text -> ctc:story", mm.CTC())]
    )
    sample = {k: v for k, v in {**stream.GOOD, **change}.items() if not isinstance(v, str) or v != "-"}
    with pytest.raises(error, match=re.escape(message.replace("{sample}", f"sample 1 of task {task!r}"))):
        packer([("text -> label", stream.GOOD), (task, sample)])


def test_broken_samples_are_left_out_and_told():
    settings = {"batch": 12, "max_bad": 9}
    batches = Batches(PACKER, {READ: Broken(TEXTS)}, **settings)
    found = [batches[step] for step in range(20)]
    assert all(batch.streams[0].samples == 12 for batch in found)  # another sample takes the place
    numbers = {int(bad.sample.split()[1]) for batch in found for bad in batch.bad}
    assert numbers == {n for n in range(50) if n % 7 == 3}
    assert found[0].bad[0].error.endswith(f"OSError: file {found[0].bad[0].sample.split()[1]} is damaged")
    assert batches[3].names == found[3].names
    strict = Batches(PACKER, {READ: Broken(TEXTS)}, batch=12)
    with pytest.raises(MediaError, match=r"cannot be fetched: OSError: file \d+ is damaged"):
        _ = [strict[step] for step in range(20)]


def test_a_run_lists_its_broken_samples_and_ends_at_one_too_many(tmp_path):
    settings = {"steps": 12, "batch": 6, "precision": "float32", "device": "cpu", "quiet": True, "checkpoint_every": 4}
    run = mm.fit(make(), {READ: Broken(TEXTS)}, **settings, max_bad=7, folder=tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad.jsonl").read_text().splitlines()]
    assert sorted(int(row["sample"].split()[1]) for row in listed) == [n for n in range(50) if n % 7 == 3]
    assert len(run.bad) == 7
    with pytest.raises(
        MediaError, match=r"3 samples are broken, listed in .*bad\.jsonl, and max_bad=2 may be; the last one"
    ):
        mm.fit(make(), {READ: Broken(TEXTS)}, **settings, max_bad=2, folder=tmp_path / "few")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(cells, max_size=4), max_size=8),
    st.sampled_from([".csv", ".tsv"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_fault_05_the_numbers_of_every_table_add_up(tmp_path: Path, rows, suffix, end):
    lines = [("," if suffix == ".csv" else "\t").join(row) for row in rows]
    text = end.join(["x" + ("," if suffix == ".csv" else "\t") + "y", *lines]) + end
    source = open_table(table(tmp_path, "t" + suffix, text))
    account, found = source.account(), rows_of(source)
    assert adds_up(account)
    assert account.saw == len(lines)
    assert account.yields == sum(isinstance(row, dict) for row in found)
    assert left(account).get("empty lines", 0) == sum(not line for line in lines)
    assert account.yields == sum(bool(line) and len(row) == 2 for line, row in zip(lines, rows, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(names, min_size=1, max_size=4), min_size=1, max_size=12))
def test_fault_06_the_numbers_of_every_folder_add_up(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    for parts in paths:
        path = root.joinpath(*parts)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    files = [os.path.relpath(os.path.join(base, name), root) for base, _, found in os.walk(root) for name in found]
    data = [
        name
        for name in files
        if name.lower().endswith((".png", ".wav"))
        and not any(part.startswith(".") or part in ("@eaDir", "Thumbs.db") for part in Path(name).parts)
    ]
    if not data:
        with pytest.raises(ConfigError, match="holds no picture or sound"):
            open_table(str(root))
        return
    account = open_table(str(root)).account()
    assert adds_up(account)
    assert (account.saw, account.yields) == (len(files), len(data))

"""What an attack on the mended code found: crafted plans and links, data that look alike, values asked for by their labels."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import multimodal as mm
from multimodal import checkpoint
from multimodal.cli import loading
from multimodal.data import write_shards
from multimodal.data.shards import Shards
from multimodal.files import part_path
from multimodal.saving import MARK, PLACE, PLAN, key
from multimodal.shapes import ConfigError, MediaError
from multimodal.train.state import write_manifest
from multimodal_tokenizers import Labels, TextBPE, TextBytes

TASK, WRITES = "text -> label", "text -> text"
PLAIN = {"steps": 2, "batch": 2, "device": "cpu", "precision": "float32", "quiet": True}
DATA = [{"text": "ab", "label": "x"}, {"text": "c", "label": "y"}]


def make() -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("x", "y"))}
    return mm.Model(tokenizers, mm.Core(width=8, depth=1, heads=2), [TASK, WRITES])


def crafted(folder: Path, before: dict, after: dict, files: dict[str, bytes]) -> None:
    """A save that seems to have been interrupted, and an index that agrees with it."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["sha256"] = after
    config.pop("sha256_of_config")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    place = folder / PLACE
    place.mkdir()
    (place / "lock").write_text(MARK, "utf-8")
    (place / PLAN).write_text(json.dumps({"before": before, "after": after}), "utf-8")
    for name, data in files.items():
        (place / key(name, after[name])).write_bytes(data)


def test_fault_83g_a_crafted_plan_writes_nothing_behind_a_link(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("mine", "utf-8")
    make().save(tmp_path / "m")
    for inside in ("link", "tokenizers"):
        os.symlink(home, tmp_path / "m" / inside)
        evil = b"echo evil"
        name = f"{inside}/.bashrc"
        crafted(tmp_path / "m", {}, {name: sha256(evil).hexdigest()}, {name: evil})
        with pytest.raises(mm.CheckpointError, match="is in the way"):  # the index names no weights any more
            make().save(tmp_path / "m")
        assert sorted(path.name for path in home.iterdir()) == [".bashrc"]
        assert (home / ".bashrc").read_text("utf-8") == "mine"
        os.unlink(tmp_path / "m" / inside)
        shutil.rmtree(tmp_path / "m")
        make().save(tmp_path / "m")


def test_fault_83h_a_crafted_plan_removes_and_replaces_no_file_of_a_users(tmp_path):
    make().save(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine", "utf-8")
    saved = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))["sha256"]
    crafted(tmp_path / "m", {"notes.txt": None}, saved, {})
    make().save(tmp_path / "m")
    evil = b"evil"
    crafted(tmp_path / "m", {"notes.txt": None}, {"notes.txt": sha256(evil).hexdigest()}, {"notes.txt": evil})
    with pytest.raises(mm.CheckpointError, match="is in the way"):
        make().save(tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text("utf-8") == "mine"


@pytest.mark.parametrize("checksum", [None, [], {}, 5])
def test_fault_83i_checksums_that_are_no_texts_make_no_checkpoint_of_ours(tmp_path, checksum):
    make().save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    config["sha256"]["weights.safetensors"] = checksum
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(mm.CheckpointError, match="this is no checkpoint"):
        make().save(tmp_path / "m")


def test_fault_53a_a_run_writes_through_no_link(tmp_path):
    mm.fit(make(), {TASK: DATA}, folder=tmp_path / "run", **PLAIN)
    (tmp_path / "precious").write_text("mine", "utf-8")
    for name in ("environment.json", "log.csv", "log.jsonl", "config.json"):
        kept = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).unlink()
        os.symlink(tmp_path / "precious", tmp_path / "run" / name)
        with pytest.raises(ConfigError, match=f"{name} is a link, and a run would write to where it leads"):
            mm.fit(make(), {TASK: DATA}, folder=tmp_path / "run", resume=True, **PLAIN)
        assert (tmp_path / "precious").read_text("utf-8") == "mine"
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).write_bytes(kept)


def test_fault_53b_what_is_kept_beside_the_configuration_of_a_run_is_moved_and_not_written_over(tmp_path):
    mm.fit(make(), {TASK: DATA}, folder=tmp_path / "run", **PLAIN)
    paper = tmp_path / "paper"
    paper.mkdir()
    (paper / "config.json").write_bytes((tmp_path / "run" / "config.json").read_bytes())
    (paper / "log.csv").write_text("mine", "utf-8")
    (paper / "curves.png").write_text("mine", "utf-8")
    mm.fit(make(), {TASK: DATA}, folder=paper, **PLAIN)
    for name in ("log.csv", "curves.png"):
        assert (tmp_path / "paper.1" / name).read_text("utf-8") == "mine"


def test_fault_07e_other_samples_of_the_same_number_are_not_taken_for_those_that_were_written(tmp_path):
    write_shards([{"text": "a"}, {"text": "b"}], tmp_path / "s")
    assert write_shards([{"text": "a"}, {"text": "b"}], tmp_path / "s").already
    with pytest.raises(ConfigError, match="was made with source"):
        write_shards([{"text": "x"}, {"text": "b"}], tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text("utf-8"))
    index["source"].pop("first")  # as earlier versions wrote it
    (tmp_path / "s" / "index.json").write_text(json.dumps(index), "utf-8")
    assert write_shards([{"text": "a"}, {"text": "b"}], tmp_path / "s").already
    assert [sample["text"] for sample in map(Shards(tmp_path / "s").__getitem__, range(2))] == ["a", "b"]
    index["source"]["encoding"] = "latin-1"  # another reading of the same file, whose name is missing by default
    (tmp_path / "s" / "index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ConfigError, match=r"was made with source.*latin-1"):
        write_shards([{"text": "a"}, {"text": "b"}], tmp_path / "s")


def test_fault_02d_the_name_that_a_part_will_get_is_not_followed_as_a_link(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    (tmp_path / "victim").write_text("mine", "utf-8")
    names = []
    real = part_path

    def known(folder, of=None):
        names.append(real(folder, of))
        if of is not None and not os.path.lexists(names[-1]):
            os.symlink(tmp_path / "victim", names[-1])
        return names[-1]

    monkeypatch.setattr("multimodal.data.shard_writer.part_path", known)
    write_shards([{"text": "a"}], tmp_path / "s")
    assert names
    assert (tmp_path / "victim").read_text("utf-8") == "mine"


class Labelled(list):
    """A list that is asked by label, as a Series of pandas is, and iterated by position."""

    def __getitem__(self, label):
        return super().__getitem__(len(self) - 1 - label)


def test_fault_37b_beginnings_are_taken_in_their_order():
    model = make().eval()
    samples = [{"text": "a"}, {"text": "b"}]
    found = model.generate(WRITES, samples, begins=Labelled(["x", "y"]), max_tokens=2)
    assert [answer.value[:1] for answer in found] == ["x", "y"]
    with pytest.raises(ConfigError, match="begins has 3 values for 2 samples"):
        model.generate(WRITES, samples, begins=np.array(["x", "y", "z"]))
    with pytest.raises(ConfigError, match="answers at once, so begin has no meaning"):
        model.generate(TASK, samples, begin=np.array([1, 2]))


def test_fault_10d_a_table_is_data_of_predict_too():
    pandas = pytest.importorskip("pandas")
    model = make().eval()
    table = pandas.DataFrame({"text": ["ab", "c"]})
    alone = [model.predict(TASK, text=text).value for text in ("ab", "c")]
    assert [answer.value for answer in model.predict(TASK, table)] == alone


def test_fault_15g_two_pieces_of_one_id_are_refused_and_no_steps_at_all_are_read(tmp_path):
    def written(spec: dict) -> Path:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(spec), "utf-8")
        return path

    spec = json.loads(TextBPE.train(["ab ba Ab"] * 3, vocab_size=258).spec)
    one = json.loads(json.dumps(spec))
    one["model"]["vocab"]["A"] = one["model"]["vocab"]["b"]
    with pytest.raises((ConfigError, MediaError), match=r"lose|change"):
        TextBPE.open(written(one))("A cat")
    none = {**spec, "pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}
    opened = TextBPE.open(written(none), lossy=True)  # the library takes it
    assert opened.vocab_size == 258


def test_fault_83j_what_the_fuzzer_found_last(tmp_path):
    write_shards([{"text": "a"}], tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text("utf-8"))
    index["shards"][0]["name"] = "\ud800.tar"
    (tmp_path / "s" / "index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ConfigError, match="can be the name of no file"):
        Shards(tmp_path / "s")
    mm.fit(make(), {TASK: DATA}, folder=tmp_path / "run", **PLAIN)
    state = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    facts = json.loads((state / "state.json").read_text("utf-8"))
    facts["recipe"]["warmup"] = "x" * 100_000
    (state / "state.json").write_text(json.dumps(facts), "utf-8")
    (state / "manifest.json").unlink()
    write_manifest(state)
    with pytest.raises(mm.CheckpointError, match=r"recipe\.warmup was 'xxx") as caught:
        mm.fit(make(), {TASK: DATA}, folder=tmp_path / "run", resume=True, **PLAIN)
    assert len(str(caught.value)) < 1000


def test_fault_01n_a_folder_called_model_in_a_checkpoint_is_not_taken_for_it_by_the_commands(tmp_path):
    make().save(tmp_path / "m")
    make().save(tmp_path / "m" / "model")  # somebody keeps another one inside
    assert loading.model_folder(tmp_path / "m") == checkpoint.model_folder(tmp_path / "m") == tmp_path / "m"

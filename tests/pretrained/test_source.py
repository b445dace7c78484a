"""Where trained weights come from: folders, files, shards, pickles, the hub, model objects; and what is said when they cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import multimodal as mm
from multimodal.pretrained import pretrained
from multimodal.pretrained import source as sources
from multimodal_tokenizers import Labels
from tests.pretrained.tiny import tiny_llama


class Harm:
    """What a pickle runs when it is opened carelessly."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_a_folder_a_file_in_it_and_shards_are_the_same_model(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "whole")
    whole = pretrained(folder)
    assert same(whole, pretrained(folder / "model.safetensors"))
    assert same(whole, mm.pretrained(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_bytes((folder / "config.json").read_bytes())
    names = sorted(tensors)
    where = {name: f"model-{1 + (i % 2)}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    assert same(whole, pretrained(parts))
    outside = {"weight_map": {**where, names[0]: "../whole/model.safetensors"}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(outside), encoding="utf-8")
    with pytest.raises(mm.CheckpointError, match="names files outside its folder"):
        pretrained(parts)


def test_a_pickle_is_read_only_when_asked_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_llama(tmp_path / "whole")
    weights = load_file(folder / "model.safetensors")
    whole = pretrained(folder, dtype=torch.float64)  # a copy, since the file goes
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(mm.CheckpointError, match=r"a pickle, which is read only with pretrained\(\.\., pickle=True\)"):
        pretrained(folder)
    assert same(whole, pretrained(folder, dtype=torch.float64, pickle=True))
    torch.save({**weights, "more": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(mm.CheckpointError, match=r"pytorch_model.bin: cannot be read: UnpicklingError"):
        pretrained(folder, pickle=True)
    assert not Path("harm").exists()


def test_what_is_not_there_or_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mm.CheckpointError, match=r"there is no folder or file './nothing'"):
        pretrained("./nothing")
    with pytest.raises(
        mm.CheckpointError, match=r"there is no folder or file 'bert', and it is no name such as 'owner/model'"
    ):
        pretrained("bert")
    with pytest.raises(
        mm.ConfigError, match=r"give a folder, a name on the hub, or a model of transformers or timm, not int"
    ):
        pretrained(7)
    with pytest.raises(mm.ConfigError, match=r"Linear is no model of transformers or timm"):
        pretrained(torch.nn.Linear(2, 2))
    folder = tiny_llama(tmp_path / "tiny")
    with pytest.raises(mm.ConfigError, match=r"is a local path, which has no revision='main'; leave it out"):
        pretrained(folder, revision="main")
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json")
    with pytest.raises(mm.CheckpointError, match=r"model.safetensors: cannot be read"):
        pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(mm.CheckpointError, match=r"there are no weights here; wanted model.safetensors"):
        pretrained(folder)
    (folder / "config.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(mm.CheckpointError, match=r"config.json: cannot be read: holds a list, wanted an object"):
        pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(mm.CheckpointError, match=r"there is no config.json here"):
        pretrained(folder)


def test_a_name_is_read_at_one_commit_which_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, asked, cut = tiny_llama(tmp_path / "snapshots" / "abc123"), [], False

    class Api:
        def model_info(self, name: str, revision: str | None = None) -> Any:
            asked.append((name, revision))
            return type("Info", (), {"sha": "abc123"})

    def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, revision))
        assert local_files_only == cut
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    loaded = pretrained("owner/tiny", revision="main")
    assert asked == [("owner/tiny", "main"), ("owner/tiny", "abc123")]
    assert (loaded.name, loaded.revision) == ("owner/tiny", "abc123")
    # without a connection what is cached counts, whose folder has the name of its commit
    cut = True
    monkeypatch.setattr(Api, "model_info", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no route to host")))
    assert pretrained("owner/tiny").revision == "abc123"
    loaded.model().save(tmp_path / "ours")
    assert mm.Model.load(tmp_path / "ours").origin["revision"] == "abc123"  # type: ignore[index]


def test_a_pickle_of_a_name_is_fetched_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = tiny_llama(tmp_path / "snapshots" / "abc123")
    weights, asked = load_file(folder / "model.safetensors"), []
    whole = pretrained(folder, dtype=torch.float64)  # a copy, since the file goes
    (folder / "model.safetensors").unlink()

    def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append("*.bin" in allow_patterns)
        if asked[-1]:
            torch.save(weights, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(mm.CheckpointError, match="there are no weights here"):
        pretrained("owner/tiny")
    assert same(whole, pretrained("owner/tiny", dtype=torch.float64, pickle=True))
    assert asked == [False, False, True]
    # where there are safetensors too, no pickle is fetched
    save_file(weights, folder / "model.safetensors")
    assert same(whole, pretrained("owner/tiny", dtype=torch.float64, pickle=True))
    assert asked == [False, False, True, False]


def test_without_a_network_a_name_that_is_not_cached_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        mm.CheckpointError, match=r"'owner/tiny' is no folder here, and could not be loaded from the hub"
    ):
        pretrained("owner/tiny")


def test_nothing_of_a_folder_is_overwritten(tmp_path: Path) -> None:
    model = pretrained(tiny_llama(tmp_path / "tiny")).model()
    with pytest.raises(mm.CheckpointError, match=r"there are files here already; choose another folder"):
        model.export("hf", tmp_path / "tiny")
    with pytest.raises(mm.ConfigError, match=r"Model.export: to='onnxx' is unknown"):
        model.export("onnxx", tmp_path / "out")


def test_a_task_by_its_pattern_takes_the_head_that_writes_its_kind(tmp_path: Path) -> None:
    loaded = pretrained(tiny_llama(tmp_path / "tiny"))
    model = loaded.model(["first:text second:text -> text", "text -> label"], {"label": Labels(("a", "b"))})
    assert model.packer.heads["first:text second:text -> text"] == model.packer.heads["text -> text"]
    assert isinstance(model.packer.heads["text -> label"], mm.Classify)
    with pytest.raises(mm.ConfigError, match=r"would share the weights of another head"):
        loaded.model([mm.Task("first:text second:text -> text", mm.NextToken())])
    with pytest.raises(mm.ConfigError, match=r"the tokenizers and tasks of this model are no longer those"):
        model.export("hf", tmp_path / "out")
    assert sources.find(tmp_path / "tiny").revision is None


def test_the_precision_of_a_file_is_given_back_or_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "half")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    tensors = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for dtype, named in ((None, "bfloat16"), (torch.float32, "float32")):
        out = pretrained(folder, dtype=dtype).model().export("hf", tmp_path / named)
        # transformers would round float32 weights to what the configuration names
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == named
        found = load_file(out / "model.safetensors")
        assert {str(x.dtype) for x in found.values()} == {f"torch.{named}"}
        assert all(torch.equal(x.bfloat16(), tensors[name]) for name, x in found.items())


def test_positions_that_would_be_turned_otherwise_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for more, message in (
        ({"rope_interleaved": True}, r"rope_interleaved=True is not supported; wanted False"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"rope_parameters have no 'low_freq_factor'"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **more}), encoding="utf-8")
        with pytest.raises(mm.CheckpointError, match=message):
            pretrained(folder)

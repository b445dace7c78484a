"""Where trained weights come from: folders, files, shards, pickles, the hub, model objects; and what is said when they cannot."""

import copy
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
from tests.stand_in_hub import NOWHERE, Hub, Repo


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
    torch.save({1: torch.zeros(2), **weights}, folder / "pytorch_model.bin")
    with pytest.raises(mm.CheckpointError, match=r"pytorch_model.bin: wanted tensors by name"):
        pretrained(folder, pickle=True)


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


def test_a_name_is_read_at_one_commit_which_is_recorded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    files = {path.name: (path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    repo = hub.repos["owner/tiny"] = Repo(private=False)
    first = repo.commit("main", {**files, "pytorch_model.bin": (b"harm", True)}, "first")
    loaded = pretrained("owner/tiny")
    assert (loaded.name, loaded.revision) == ("owner/tiny", first)
    assert same(loaded, pretrained(folder))
    assert not [path for _, path in hub.asked if path.endswith(".bin")]
    weights = {name: x * 2 for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    second = repo.commit(
        "main", {**files, "model.safetensors": ((folder / "model.safetensors").read_bytes(), True)}, "x"
    )
    assert pretrained("owner/tiny", revision="main").revision == second
    assert same(pretrained("owner/tiny"), pretrained(folder))
    assert same(pretrained("owner/tiny", revision=first), loaded)
    # without a connection what is cached counts: the newest version that was there, and each by its commit
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    assert pretrained("owner/tiny").revision == second
    assert same(pretrained("owner/tiny", revision=first), loaded)
    loaded.model().save(tmp_path / "ours")
    assert mm.Model.load(tmp_path / "ours").origin["revision"] == first  # type: ignore[index]


def test_a_pickle_of_a_name_is_fetched_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = tiny_llama(tmp_path / "snapshots" / "abc123")
    weights, asked = load_file(folder / "model.safetensors"), []
    whole = pretrained(folder, dtype=torch.float64)  # a copy, since the file goes
    (folder / "model.safetensors").unlink()

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
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
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(
        mm.CheckpointError, match=r"file/out: cannot be written \(Not a directory\); choose another folder"
    ):
        model.export("hf", tmp_path / "file" / "out")
    with pytest.raises(mm.ConfigError, match=r"Model.export: to='onnxx' is unknown"):
        model.export("onnxx", tmp_path / "out")


def test_a_full_disk_leaves_nothing(full_disk: Any, tmp_path: Path) -> None:
    model = pretrained(tiny_llama(tmp_path / "tiny")).model()
    message = r"out: cannot be written \(model.safetensors: .*make room"
    with full_disk(), pytest.raises(mm.CheckpointError, match=message):
        model.export("hf", tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny"]


def test_a_task_by_its_pattern_takes_the_head_that_writes_its_kind(tmp_path: Path) -> None:
    loaded = pretrained(tiny_llama(tmp_path / "tiny"))
    model = loaded.model(["first:text second:text -> text", "text -> label"], {"label": Labels(("a", "b"))})
    assert model.packer.heads["first:text second:text -> text"] == model.packer.heads["text -> text"]
    assert isinstance(model.packer.heads["text -> label"], mm.Classify)
    with pytest.raises(mm.ConfigError, match=r"would share the weights of another head"):
        loaded.model([mm.Task("first:text second:text -> text", mm.NextToken())])
    with pytest.raises(mm.ConfigError, match=r"export: kind 'label' was added; task 'first:text .* was added; "):
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


def in_shards(folder: Path) -> dict[str, str]:
    """Splits the weights of a folder into two files with an index; by tensor, its file."""
    tensors = load_file(folder / "model.safetensors")
    file_of = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(file_of.values()):
        save_file({name: tensors[name].clone() for name in tensors if file_of[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": file_of})
    return file_of


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    file_of = in_shards(folder)
    first, index = min(file_of), folder / "model.safetensors.index.json"
    for wrong, message in (
        (
            "/etc/passwd",
            "names files outside its folder: lm_head|names files outside its folder: model.embed_tokens.weight in",
        ),
        ("..", "names files outside its folder"),
        ("", "names files outside its folder"),
        ("a\0b", "names files outside its folder"),
        (5, "wanted the name of a file for each tensor"),
        (["x"], "wanted the name of a file for each tensor"),
        ("model-1.safetensors", rf"model-1.safetensors: it has no tensor '{first}', although the index says so"),
        ("model-2.safetensors", "model-2.safetensors: cannot be read"),
    ):
        write_json(index, {"weight_map": {**file_of, first: wrong}})
        with pytest.raises(mm.CheckpointError, match=message):
            pretrained(folder)
    for wrong in (None, [], {}, ["a"]):
        write_json(index, {"weight_map": wrong})
        with pytest.raises(mm.CheckpointError, match="wanted the name of a file for each tensor"):
            pretrained(folder)


def test_what_was_loaded_is_compared_and_copied_like_any_object(tmp_path: Path) -> None:
    loaded = pretrained(tiny_llama(tmp_path / "tiny"))
    again = copy.deepcopy(loaded)
    assert loaded == loaded != again
    assert same(loaded, again)
    assert len({loaded, again}) == 2


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    file_of = in_shards(folder)
    first = min(file_of)
    other = {name: x.clone() for name, x in load_file(folder / "model-1.safetensors").items()}
    save_file({**other, first: torch.zeros(40, 16)}, folder / "model-1.safetensors")
    with pytest.raises(mm.CheckpointError, match=rf"another file has a tensor '{first}' too"):
        pretrained(folder)


def test_values_that_no_model_can_have_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for changes, message in (
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is not supported; wanted a value such as 1e-06"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] is not supported; wanted a text"),
        ({"rope_parameters": 5}, "rope_parameters=5 is not supported; wanted fields by name"),
        ({"rope_parameters": {"rope_theta": "x"}}, "make no model: "),
        ({"hidden_size": "16"}, "its configuration and the files beside it make no model: TypeError"),
        ({"num_attention_heads": 0}, "make no model: ZeroDivisionError"),
        ({"num_attention_heads": 3}, "make no model: Core: width=16 does not give heads=3"),
        ({"rms_norm_eps": float("nan")}, "make no model: Norm: eps=nan|NaN"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, but there are only 20 tensors"),
        ({"eos_token_id": 999}, "make no model: NextToken: stop_id=999 is not among the ids 0 to 39"),
    ):
        write_json(folder / "config.json", {**config, **changes})
        with pytest.raises(mm.CheckpointError, match=message):
            pretrained(folder)
    write_json(folder / "config.json", {**config, "eos_token_id": []})
    assert pretrained(folder).tasks[0].head == mm.NextToken(start_ids=(), stop_id=1, tied=True, bias=False)


def test_files_beside_the_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    for name, data, message in (
        ("generation_config.json", b"\xff\xfe", "generation_config.json: cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: cannot be read"),
        ("tokenizer.json", b"{", "its configuration and the files beside it make no model"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(mm.CheckpointError, match=message):
            pretrained(folder)
        (folder / name).unlink()


def test_a_name_that_the_hub_cannot_have_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("own er/mod el", "a/", "owner/--x"):
        with pytest.raises(mm.CheckpointError, match="could not be loaded from the hub"):
            pretrained(name)


def test_precisions_that_cannot_be_read_or_given_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    for dtype in ("float16", torch.int8):
        with pytest.raises(mm.ConfigError, match=r"pretrained: dtype=.* must be one of torch.float32, .* or None"):
            pretrained(folder, dtype=dtype)
    tensors = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(
            {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(dtype)}, folder / "model.safetensors"
        )
        with pytest.raises(
            mm.CheckpointError, match=r"model.norm.weight is stored as torch.*; take the model before it was"
        ):
            pretrained(folder)


def test_a_file_of_two_precisions_loses_no_bit(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    tensors = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()  # the first one that is read
    save_file(tensors, folder / "model.safetensors")
    out = pretrained(folder, dtype=None).model().export("hf", tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], x.float()) for name, x in tensors.items())


def test_a_checkpoint_of_others_writes_no_file_elsewhere(tmp_path: Path) -> None:
    model = pretrained(tiny_llama(tmp_path / "tiny")).model()
    for name in ("../evil.txt", str(tmp_path / "evil.txt"), "model.safetensors"):
        model.origin = {**model.origin, "files": {name: "x"}}  # type: ignore[dict-item]
        model.save(tmp_path / "ours")
        with pytest.raises(mm.CheckpointError, match="export does not write files named"):
            mm.Model.load(tmp_path / "ours").export("hf", tmp_path / "out")
        assert not (tmp_path / "evil.txt").exists()
        assert not (tmp_path / "out").exists()

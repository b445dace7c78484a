"""What someone with pretrained weights is told: whose folder it is, what was added, what stays, and how to go on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import multimodal as mm
from multimodal.cli import main
from multimodal.pretrained import FAMILIES, pretrained
from multimodal_tokenizers import Labels, TextBytes
from tests.pretrained.tiny import CONFIG, tiny_llama

LABEL = {"label": Labels(("question", "answer"))}
COMMANDS = (
    ["predict", "--text", "a"],
    ["generate", "--text", "a"],
    ["transcribe", "beep.wav"],
    ["look", "--text", "a"],
    ["verify", "--text", "a"],
    ["serve"],
    ["export", "--to", "onnx", "--out", "out"],
    ["quantize", "--out", "out"],
    ["push", "ann/tiny", "--dry-run"],
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("theirs") / "tiny")


def changed(folder: Path, out: Path, **fields: object) -> Path:
    """A copy of a folder with other fields in its configuration."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps({**CONFIG, **fields}), encoding="utf-8")
    return out


def test_a_folder_of_another_library_is_named_with_the_way_to_a_checkpoint(theirs: Path, tmp_path: Path) -> None:
    said = r"no checkpoint of this library, but a model of another library, of type 'llama' \(family Llama\); make a checkpoint"
    with pytest.raises(mm.CheckpointError, match=said) as error:
        mm.Model.load(theirs)
    advice = str(error.value).partition("in Python: ")[2].replace("FOLDER", str(tmp_path / "ours"))
    assert eval(advice, {"mm": mm}) == tmp_path / "ours"
    assert list(mm.Model.load(tmp_path / "ours").tasks) == ["text -> text"]
    for config, said in (
        ({"model_type": "mamba"}, r"of type 'mamba', which mm.pretrained cannot read; `multimodal pretrained list`"),
        ({"vit_hidden_dim": 8, "lm_hidden_dim": 8}, r"of type 'nanovlm' \(family NanoVLM\)"),
        ({"architectures": ["Odd"]}, r"of type \['Odd'\], which mm.pretrained cannot read"),
        ({"something": 1}, r"format None, but this version reads 1"),
        ({"format": 2, "model_type": "llama"}, r"format 2, but this version reads 1; update"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(mm.CheckpointError, match=said):
            mm.Model.load(tmp_path)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_every_command_names_it(
    words: list[str], theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if words == ["serve"]:
        for package in ("starlette", "uvicorn", "python_multipart"):
            pytest.importorskip(package)
    assert main([words[0], str(theirs), *words[1:]]) == 2
    assert "of type 'llama' (family Llama); make a checkpoint of it first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_ours_is_named_where_one_of_theirs_is_wanted(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained(theirs).model().save(tmp_path / "run" / "model")
    for place in (tmp_path / "run" / "model", tmp_path / "run", tmp_path / "run" / "model" / "weights.safetensors"):
        with pytest.raises(
            mm.CheckpointError, match=r"a checkpoint of this library, .* it began with the weights of .*tiny, which"
        ):
            pretrained(place)
    mm.Model({"text": TextBytes()}, mm.Core.tiny(), ["-> text"]).save(tmp_path / "own")
    assert main(["pretrained", "check", str(tmp_path / "own")]) == 2
    err = capsys.readouterr().err
    assert "own: a checkpoint of this library, which mm.Model.load reads" in err
    assert "began" not in err


def test_what_was_added_is_named_or_left_out(theirs: Path, tmp_path: Path) -> None:
    model = pretrained(theirs).model(["text -> label"], LABEL)
    said = (
        r"export: kind 'label' was added; task 'text -> label' was added. .*What remains: .*only_original=True.*"
        r"Model.export\(\"onnx\", folder, task=..\) .*Model.save"
    )
    with pytest.raises(mm.ConfigError, match=said):
        model.export("hf", tmp_path / "out")
    out = model.export("hf", tmp_path / "out", only_original=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    with pytest.raises(mm.ConfigError, match=r"only_original is for 'hf' and 'timm'"):
        model.export("onnx", tmp_path / "onnx", only_original=True)
    with pytest.raises(mm.ConfigError, match=r"only_original=True, but this model was trained here"):
        mm.Model({"text": TextBytes()}, mm.Core.tiny(), ["-> text"]).export("hf", tmp_path / "x", only_original=True)


def test_what_was_changed_or_is_missing_is_named_by_field(theirs: Path, tmp_path: Path) -> None:
    loaded = pretrained(theirs)
    text = dataclasses.replace(loaded.tokenizers["text"], causal=False)  # type: ignore[type-var]
    core = loaded.core.replace(dropout=0.1)  # type: ignore[union-attr]
    for changes, said in (
        ({"tokenizers": {"text": text}}, r"kind 'text' was changed \(causal\)"),
        ({"core": core}, r"the core was changed \(dropout\)"),
    ):
        model = mm.override(loaded, **changes).model(["text -> label"], LABEL)
        for only in (False, True):  # what was changed cannot be left out
            with pytest.raises(mm.ConfigError, match=rf"export: .*{said}") as error:
                model.export("hf", tmp_path / "out", only_original=only)
            assert "only_original" not in str(error.value)
    with pytest.raises(mm.ConfigError, match=r"export: task 'text -> text' is missing"):
        loaded.model(["text -> label"], LABEL, keep=()).export("hf", tmp_path / "out", only_original=True)


def test_pretrained_tasks_stay_or_are_left_out(theirs: Path) -> None:
    loaded, sample = pretrained(theirs), [{"text": [5, 9, 2]}]
    whole = loaded.model(["text -> label"], LABEL)
    less = mm.Model.from_pretrained(theirs, ["text -> label"], LABEL, keep=())
    assert list(whole.tasks) == ["text -> text", "text -> label"]
    assert list(less.tasks) == ["text -> label"]
    answers = [model.predict("text -> label", sample)[0].probability for model in (whole, less)]
    assert answers[0] == answers[1]
    assert list(loaded.model(["text -> label"], LABEL, keep=["text -> text"]).tasks) == list(whole.tasks)
    with pytest.raises(mm.TaskError, match=r"keep names 'text -> txt'; .*tiny has 'text -> text'"):
        loaded.model(keep=["text -> txt"])
    with pytest.raises(mm.TaskError, match=r"keep=\(\) leaves no task; give tasks, or keep one"):
        loaded.model(keep=())


def test_a_mapping_that_lost_a_kind_is_named(theirs: Path) -> None:
    said = (
        r"tokenizers has none, and task 'text -> text' needs 'text' too; keep the others, as in tokenizers=\{\*\*loaded"
    )
    with pytest.raises(mm.TaskError, match=said):
        mm.override(pretrained(theirs), tokenizers={})


def marked(model: mm.Model) -> dict[str, str]:
    """The marks of a report, by part."""
    lines = [line.partition("  (") for line in model.report().split("\n")]
    return {line[:32].strip(): f"({mark}" for line, found, mark in lines if found}


def test_parts_with_new_weights_are_marked(theirs: Path, tmp_path: Path) -> None:
    loaded = pretrained(theirs)
    assert marked(loaded.model()) == {}
    model = loaded.model(["text -> label", "note -> text"], {**LABEL, "note": mm.Tower.of(loaded, kind="text")})
    wanted = {"tokenizer label": "(new)", "tokenizer note": "(new connector)", "head label_Classify": "(new)"}
    assert marked(model) == wanted
    # they are the parts of the weights that the file did not have
    new = {name.split(".")[1] for name in model.state_dict().keys() - loaded.weights.keys()}
    assert new == {name.split()[1] for name in wanted}
    model.save(tmp_path / "ours")
    again = mm.Model.load(tmp_path / "ours")
    assert marked(again) == wanted
    task = mm.Task("more -> text", again.packer.heads["text -> text"])
    assert marked(again.extended({"more": TextBytes()}, [task])) == {**wanted, "tokenizer more": "(new)"}
    assert "(new)" not in mm.Model(LABEL, mm.Core.tiny(), ["-> label"]).extended({"text": TextBytes()}).report()


def test_another_number_of_layers_is_named(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        mm.CheckpointError, match=r"config.json asks for 3 layers in model.layers, the weights have 2; it has"
    ):
        pretrained(changed(theirs, tmp_path / "more", num_hidden_layers=3))
    with pytest.raises(
        mm.CheckpointError, match=r"nothing uses .*asks for 1 layer in model.layers, the weights have 2$"
    ):
        pretrained(changed(theirs, tmp_path / "less", num_hidden_layers=1))
    # a tensor that is missing for another reason says nothing of layers
    out = changed(theirs, tmp_path / "other")
    tensors = load_file(out / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "0.mlp.up" not in name}, out / "model.safetensors")
    with pytest.raises(mm.CheckpointError, match=r"there is no tensor 'model.layers.0.mlp.up_proj.weight'; it has"):
        pretrained(out)


def test_a_misspelt_option_is_named_with_those_of_every_family(theirs: Path) -> None:
    said = r"no option 'dtypes'; it has none, and every family has revision, dtype, pickle; did you mean 'dtype'\?"
    with pytest.raises(mm.CheckpointError, match=said):
        pretrained(theirs, dtypes=None)


def test_names_of_classes_are_no_tokenizer(theirs: Path) -> None:
    said = r"tokenizers\['label'\] is list, .*; names of classes are multimodal_tokenizers.Labels\(\('cat', 'dog'\)\)"
    with pytest.raises(mm.ConfigError, match=said):
        pretrained(theirs).model(["text -> label"], {"label": ["cat", "dog"]})  # type: ignore[dict-item]


def test_samples_that_are_no_mappings_are_named() -> None:
    kinds = {"text": TextBytes(), "label": Labels(("a", "b"))}
    model = mm.Model(kinds, mm.Core.tiny(), ["text <-> other:text", "text -> label"])
    said = r"a sample is a mapping of fields, not str; write \{'text': \.\.\}"
    texts: Any = ["a text", "others"]
    with pytest.raises(mm.TaskError, match=said):
        model.vectors("text <-> other:text", texts)
    with pytest.raises(mm.TaskError, match=said):
        model.predict("text -> label", texts)


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrained", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Llama: model_type llama, mistral, qwen2, qwen3" in lines
    assert ["audio", "->", "text", "AutoModelForSpeechSeq2Seq"] in [line.split() for line in lines]
    assert main(["pretrained", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name for entry in found for name in entry["types"]} == {
        name for family in FAMILIES for name in family.names
    }
    for words, said in ((["check"], "give a folder with config.json"), (["list", "x"], "give nothing more")):
        assert main(["pretrained", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_sample_of_more_times_than_the_core_has_positions_is_named() -> None:
    block = (mm.layers.SelfAttention(), mm.layers.CrossAttention(), mm.layers.MLP())
    reader, writer = mm.Core.tiny().replace(learned_times=6), mm.Core.tiny().replace(learned_times=4, block=block)
    model = mm.Model({"text": TextBytes()}, mm.EncoderDecoder(reader=reader, writer=writer), ["text -> answer:text"])
    fits = {"text": "abcdef", "answer": "abc"}
    assert torch.isfinite(model.loss(model.pack("text -> answer:text", [fits])))
    for sample, said in (
        ({**fits, "text": "abcdefg"}, r"sample 1 .*: it reads 7 tokens, .* positions for 6; .*text 7, answer 4\)"),
        ({**fits, "answer": "abcd"}, r"sample 1 .*: it writes 5 tokens, .* positions for 4; .*text 6, answer 5\)"),
    ):
        with pytest.raises(mm.StreamError, match=said):
            model.pack("text -> answer:text", [fits, sample])


def test_transformers_draws_no_bars_into_the_report() -> None:
    transformers = pytest.importorskip("transformers")
    from multimodal.pretrained.gate import _without_bars

    bars = transformers.utils.logging
    assert bars.is_progress_bar_enabled()
    with _without_bars():
        assert not bars.is_progress_bar_enabled()
    assert bars.is_progress_bar_enabled()

"""The names of version 0.1: each leads to the present one, with a warning that says it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import multimodal as mm
from multimodal import old_names
from multimodal.declare import find, type_name
from multimodal_tokenizers import Labels, TextBytes

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"

PARTS = {
    "multimodal.attention.priors": "ALiBi MixingWeights PredictedWindow RelativeBias",
    "multimodal.attention.reads": "Gumbel Hard Read Soft",
    "multimodal.attention.scores": "Additive Bernoulli Cosine DotProduct Factored "
    "Gaussian General LocationBased ScaledDotProduct Score",
    "multimodal.contrast": "Contrast",
    "multimodal.core": "Core",
    "multimodal.encoder_decoder": "EncoderDecoder",
    "multimodal.flow": "FlowMatching",
    "multimodal.generate.samplers": "AtLeast Greedy MinP NoRepeat OneOf Only "
    "Repetition Sampler Temperature Then TopK TopP",
    "multimodal.heads": "CTC Classify Head NextToken",
    "multimodal.layers.attend": "CrossAttention PersistentMemory SelfAttention",
    "multimodal.layers.base": "Add Concat Gated Layer Merge Replace",
    "multimodal.layers.mlp": "MLP",
    "multimodal.layers.recurrent": "Recurrent",
    "multimodal.layers.temporal": "TemporalConv",
    "multimodal.layers.turing": "TuringMachine",
    "multimodal.masked": "Masked",
    "multimodal.masks": "Alone And Causal Chunked InTurn Not Or Prefix Prior Rule SameSample SameSegment Sum Window",
    "multimodal.pointer": "Pointer",
    "multimodal.rows": "EachRow",
    "multimodal.tokenizer": "Tokenizer",
    "multimodal.train.recipe": "Recipe",
    "multimodal_tokenizers.audio": "AudioFrames",
    "multimodal_tokenizers.codes": "Codes",
    "multimodal_tokenizers.features": "Features",
    "multimodal_tokenizers.image": "ImagePatches",
    "multimodal_tokenizers.labels": "Labels",
    "multimodal_tokenizers.text": "TextBPE TextBytes",
}
"""What checkpoints of 0.1 may name, by module."""


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in old_names.TOP.items() for n in names.split()])
def test_names_that_left_the_top(module: str, name: str):
    with pytest.warns(FutureWarning, match=rf"multimodal\.{name} is now multimodal\.{module}\.{name}; .*0\.3"):
        found = getattr(mm, name)
    assert found is getattr(importlib.import_module(f"multimodal.{module}"), name)
    assert name not in dir(mm)


@pytest.mark.parametrize("old", old_names.MODULES)
def test_modules_that_moved(old: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, f"multimodal.{old}", raising=False)
    new = f"multimodal.{old_names.MODULES[old]}"
    with pytest.warns(FutureWarning, match=rf"multimodal\.{old} is now {new}; ") as caught:
        module = importlib.import_module(f"multimodal.{old}")
    assert Path(caught[0].filename) in (Path(__file__), Path(importlib.__file__ or ""))
    there = importlib.import_module(new)
    for name in old_names.NAMES.get(old, {}):
        assert getattr(module, name) is not None
    public = [name for name in vars(there) if not name.startswith("_")]
    assert all(getattr(module, name) is getattr(there, name) for name in public)


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m, names in old_names.NAMES.items() if m not in old_names.MODULES for n in names],
)
def test_names_that_changed_in_their_module(module: str, name: str):
    path = old_names.NAMES[module][name]
    with pytest.warns(FutureWarning, match=rf"multimodal\.{module}\.{name} is now multimodal\.{path}; "):
        found = getattr(importlib.import_module(f"multimodal.{module}"), name)
    where, _, new = path.rpartition(".")
    assert found is getattr(importlib.import_module(f"multimodal.{where}"), new)


@pytest.mark.parametrize("name", [f"{module}:{cls}" for module, names in PARTS.items() for cls in names.split()])
def test_parts_that_checkpoints_name(name: str):
    found = find(name)
    assert found.__name__ == name.partition(":")[2]
    assert find(type_name(found)) is found


def test_the_warning_is_about_the_line_that_imports(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "multimodal.rows", raising=False)
    with pytest.warns(FutureWarning, match=r"multimodal\.rows is now multimodal\.heads\.each_row") as caught:
        from multimodal.rows import EachRow  # type: ignore[import-not-found]
    assert caught[0].filename == __file__
    assert EachRow is mm.EachRow


def test_modules_of_a_package_that_moved(monkeypatch: pytest.MonkeyPatch):
    for name in ("mixture", "mixture.memory", "conformance", "conformance.tokenizers"):
        monkeypatch.delitem(sys.modules, f"multimodal.{name}", raising=False)
    with pytest.warns(FutureWarning) as caught:
        found = importlib.import_module("multimodal.mixture.memory")
    new = {str(warning.message).partition(";")[0] for warning in caught}
    assert "multimodal.mixture.memory is now multimodal.zoo.mixture.memory" in new
    assert found.Mixture is mm.zoo.mixture.Mixture
    with pytest.warns(FutureWarning) as caught:
        importlib.import_module("multimodal.conformance.tokenizers")
    new = {str(warning.message).partition(";")[0] for warning in caught}
    assert "multimodal.conformance.tokenizers is now multimodal.check.tokenizers" in new
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("multimodal.conformance.nothing")


def test_flags_of_a_head_of_ones_own():
    with pytest.warns(FutureWarning, match=r"Draws\.continuous is now Draws\.draws_features"):

        class Draws(mm.heads.FlowMatching):
            continuous = True

    assert Draws.draws_features
    assert Draws.measures == ("loss",)

    class Plots(mm.heads.NextToken):
        draws_features = False

        def draw(self) -> str:  # type: ignore[override]  # of something else
            return "a picture"

    assert not Plots.draws_features
    with pytest.raises(
        mm.ConfigError, match=r"Points: points=True is of version 0\.1; .* overrides source and next_logits"
    ):

        class Points(mm.heads.NextToken):
            points = True


def test_what_was_never_there_is_an_attribute_error():
    for module in ("multimodal", "multimodal.look", "multimodal.masks"):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = importlib.import_module(module).nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("multimodal.nothing")


def test_old_members_of_classes():
    model = mm.Model({"label": Labels(("a", "b"))}, mm.Core.tiny(), ["-> label"])
    with pytest.warns(FutureWarning, match=r"Model\.resting is now Model\.inference_mode"), model.resting():
        assert not model.training
    with pytest.warns(FutureWarning, match=r"Model\.chooses is now Model\.learns_from_rewards"):
        assert not model.chooses
    info = mm.masks.MaskInfo(*(torch.arange(3) for _ in range(4)))
    with pytest.warns(FutureWarning, match=r"MaskInfo\.free is now MaskInfo\.bidirectional"):
        assert info.free is info.bidirectional
    engine = mm.Engine(mm.Model({"text": TextBytes()}, mm.Core.tiny(), ["text -> text"]), rows=3, capacity=8)
    with pytest.warns(FutureWarning, match=r"Engine\.free is now Engine\.free_rows"):
        assert engine.free == 3
    with pytest.warns(FutureWarning, match=r"Writes\.writes is now Writes\.autoregressive"):

        class Writes(mm.heads.NextToken):
            writes = False

    assert not Writes.autoregressive


def test_the_changelog_has_a_table_of_them():
    text = CHANGELOG.read_text(encoding="utf-8")
    table = text[text.index("| 0.1 | 0.2 |") :]
    for module, names in old_names.TOP.items():
        for name in names.split():
            assert f"`mm.{name}`" in table, name
            assert f"`mm.{module}.`" in table or f"mm.{module}.{name}" in table
    for old, new in old_names.MODULES.items():
        assert f"| `multimodal.{old}` | `multimodal.{new}` |" in table
    for module, names in old_names.NAMES.items():
        for old, new in names.items():
            assert f"| `multimodal.{module}.{old}` | `multimodal.{new}` |" in table

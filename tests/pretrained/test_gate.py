"""`multimodal pretrained check`: it passes what is right, and finds what is not."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.cli import main
from multimodal.pretrained import FAMILIES, Pretrained, family_of, gate, pretrained
from multimodal.shapes import CheckpointError
from tests.pretrained.compared import saved
from tests.pretrained.test_nanovlm import saved as saved_nanovlm

transformers = pytest.importorskip("transformers")

BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 71, **BLOCKS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**WORDS, "num_key_value_heads": 2}
GEMMA = {**TEXT, "head_dim": 8}
MODERN = {**WORDS, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2}
PICTURE = {**BLOCKS, "image_size": 224, "patch_size": 32}
DINO = {name: value for name, value in PICTURE.items() if name != "intermediate_size"}
EYE = {**BLOCKS, "image_size": 32, "patch_size": 8}
SOUND = {**BLOCKS, "max_length": 128, "num_mel_bins": 32}
T5 = {"vocab_size": 71, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPEECH = {
    "vocab_size": 90,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 3,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
# the vector of the first ones is the state of the highest id, that of the others the one of this id
CLIP_TEXT = {**WORDS, "eos_token_id": 2}
CLIP = {"text_config": {**WORDS, "eos_token_id": 60}, "vision_config": EYE, "projection_dim": 20}
SIGLIP = {"text_config": {**WORDS, "projection_size": 32}, "vision_config": EYE}
PALI = {
    "text_config": {"model_type": "gemma", **GEMMA},
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **EYE},
    "projection_dim": 32,
    "hidden_size": 32,
    "vocab_size": 71,
    "image_token_index": 70,
}
SMOL = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": EYE, "scale_factor": 2, "image_token_id": 70}

# class, class of the configuration, the configuration, and by what is compared a parameter that it depends on
MODELS: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "attention_bias": True}, {"logits": "layers.1.self_attn.v_proj.bias"}),
    ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 4}, {"logits": "model.norm.weight"}),
    ("Qwen2ForCausalLM", "Qwen2Config", TEXT, {"logits": "layers.1.self_attn.v_proj.bias"}),
    ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}, {"logits": "layers.1.self_attn.q_norm.weight"}),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, {"logits": "layers.1.post_feedforward_layernorm.weight"}),
    (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 71, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        {"logits": "h.1.attn.c_proj.bias"},
    ),
    ("BertModel", "BertConfig", WORDS, {"states": "encoder.layer.1.output.LayerNorm.bias"}),
    (
        "BertForMaskedLM",
        "BertConfig",
        WORDS,
        {"logits": "predictions.bias", "states": "layer.1.output.LayerNorm.bias"},
    ),
    ("BertForSequenceClassification", "BertConfig", WORDS, {"logits": "classifier.bias"}),
    ("ModernBertModel", "ModernBertConfig", MODERN, {"states": "final_norm.weight"}),
    ("ModernBertForMaskedLM", "ModernBertConfig", MODERN, {"logits": "decoder.bias", "states": "final_norm.weight"}),
    ("ModernBertForSequenceClassification", "ModernBertConfig", MODERN, {"logits": "classifier.bias"}),
    ("T5ForConditionalGeneration", "T5Config", T5, {"logits": "decoder.final_layer_norm.weight"}),
    ("T5EncoderModel", "T5Config", T5, {"states": "encoder.final_layer_norm.weight"}),
    ("ViTModel", "ViTConfig", PICTURE, {"states": "layernorm.bias", "vectors": "pooler.dense.bias"}),
    ("ViTForImageClassification", "ViTConfig", PICTURE, {"logits": "classifier.bias"}),
    ("DeiTModel", "DeiTConfig", PICTURE, {"states": "layernorm.bias", "vectors": "pooler.dense.bias"}),
    ("DeiTForImageClassification", "DeiTConfig", PICTURE, {"logits": "classifier.bias"}),
    ("Dinov2Model", "Dinov2Config", DINO, {"states": "layernorm.bias"}),
    ("Dinov2ForImageClassification", "Dinov2Config", DINO, {"logits": "classifier.bias"}),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, {"states": "layernorm.bias"}),
    (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        DINO,
        {"logits": "classifier.bias"},
    ),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {**PICTURE, "num_register_tokens": 2}, {"states": "norm.bias"}),
    ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, {"logits": "encoder.layers.0.fc2.bias"}),
    ("WhisperForAudioClassification", "WhisperConfig", SPEECH, {"logits": "projector.bias"}),
    ("ASTModel", "ASTConfig", SOUND, {"states": "layernorm.bias"}),
    ("ASTForAudioClassification", "ASTConfig", SOUND, {"logits": "classifier.dense.bias"}),
    (
        "CLIPModel",
        "CLIPConfig",
        CLIP,
        {
            "logits of pairs": "logit_scale",
            "vectors of a picture": "vision_model.post_layernorm.bias",
            "vectors of 5 tokens": "text_model.final_layer_norm.bias",
        },
    ),
    (
        "CLIPVisionModel",
        "CLIPVisionConfig",
        EYE,
        {"states": "layers.1.mlp.fc2.bias", "vectors": "post_layernorm.bias"},
    ),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", EYE, {"vectors": "post_layernorm.bias"}),
    ("CLIPTextModel", "CLIPTextConfig", CLIP_TEXT, {"states": "final_layer_norm.bias"}),
    ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_TEXT, {"vectors": "text_projection.weight"}),
    (
        "SiglipModel",
        "SiglipConfig",
        SIGLIP,
        {
            "logits of pairs": "logit_bias",
            "vectors of a picture": "vision_model.head.mlp.fc2.bias",
            "vectors of 5 tokens": "text_model.head.bias",
        },
    ),
    ("SiglipVisionModel", "SiglipVisionConfig", EYE, {"states": "post_layernorm.bias", "vectors": "head.mlp.fc2.bias"}),
    ("SiglipTextModel", "SiglipTextConfig", WORDS, {"states": "final_layer_norm.bias", "vectors": "head.bias"}),
    ("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", PALI, {"logits": "multi_modal_projector.linear.bias"}),
    ("SmolVLMForConditionalGeneration", "SmolVLMConfig", SMOL, {"logits": "vision_model.post_layernorm.bias"}),
    ("Idefics3ForConditionalGeneration", "Idefics3Config", SMOL, {"logits": "vision_model.post_layernorm.bias"}),
]
TIMM = {
    "classes": ("vit_tiny_patch16_224", {"num_classes": 5}, {"logits": "vit.head.bias"}),
    "encoder": ("vit_tiny_patch16_224", {"num_classes": 0}, {"states": "vit.norm.bias"}),
    "pool": ("vit_base_patch16_siglip_224", {"num_classes": 0}, {"vectors": "vit.attn_pool.mlp.fc2.bias"}),
    "two tokens": ("deit_tiny_distilled_patch16_224", {"num_classes": 0}, {"states": "vit.norm.bias"}),
}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4}


def built(kind: str, config: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


def with_fault(monkeypatch: pytest.MonkeyPatch, name: str, by: float = 1e-3) -> None:
    """Every other number of a parameter of theirs, whose name ends like this, is off by so much."""
    real = gate._theirs

    def theirs(*given: Any) -> Any:
        module = deepcopy(real(*given))
        found = [x for full, x in module.named_parameters() if f".{full}".endswith(f".{name}")]
        if found:
            found[-1].data.view(-1)[::2] += by
        return module

    monkeypatch.setattr(gate, "_theirs", theirs)


def check(source: Any, faults: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes, and if one of these parameters is off, all rows fail whose case begins so; but for those of texts alone."""
    rows = gate.compare(source)
    print(max(max(row.packed, row.alone) for row in rows))
    assert all(row.passed for row in rows), rows
    for what, name in faults.items():
        with monkeypatch.context() as patch:
            with_fault(patch, name)
            found = [row for row in gate.compare(source) if row.case.startswith(what)]
        assert found, what
        own = [row for row in found if "picture" in row.case] or found
        assert not any(row.passed for row in own), (name, found)


def check_export(loaded: Pretrained, folder: Path, out: Path) -> None:
    """What the Auto classes load of an exported folder is what they load of the first one, to the last bit."""
    loaded.model().export("hf", out)
    family = family_of("here", loaded.origin["config"])
    for task in loaded.tasks:
        modules = []
        for where in (folder, out):
            torch.manual_seed(0)  # of weights that a folder lacks, such as a pooler
            modules.append(gate._theirs(loaded, where, family.peer(task.pattern, loaded.origin["tensors"]) or ""))
        (first, again), configs = [m.state_dict() for m in modules], [m.config.to_dict() for m in modules]  # type: ignore[operator, union-attr]
        assert first.keys() == again.keys()
        assert all(torch.equal(x, again[name]) for name, x in first.items())
        for config in configs:
            config["_name_or_path"] = ""
        assert configs[0] == configs[1]


@pytest.mark.parametrize(("kind", "config", "settings", "faults"), MODELS, ids=[f"{m[0]}-{m[3]}" for m in MODELS])
def test_what_is_right_passes_and_a_small_fault_is_found(
    kind: str,
    config: str,
    settings: dict[str, Any],
    faults: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(built(kind, config, settings), tmp_path / "theirs")
    check(folder, faults, monkeypatch)
    check_export(pretrained(folder), folder, tmp_path / "out")


@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm_beside_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    architecture, settings, faults = TIMM[name]
    module = timm.create_model(architecture, **settings, **SMALL)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    check(module, faults, monkeypatch)


def test_all_models_that_can_be_read_are_compared_but_those_that_no_library_has() -> None:
    def model_type(config: str) -> str:
        return getattr(transformers, config).model_type

    compared = {model_type(config) for _, config, _, _ in MODELS}
    compared |= {"timm:VisionTransformer", "timm:VisionTransformerDistilled"}
    assert {name for family in FAMILIES for name in family.names} - compared == {"nanovlm"}


def llama(folder: Path) -> Path:
    return saved(built("LlamaForCausalLM", "LlamaConfig", TEXT), folder / "llama")


def test_the_command_prints_the_largest_differences(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama(tmp_path)
    assert main(["pretrained", "check", str(folder / "model.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok") == 2
    assert "logits of 17 tokens of text after 1 tokens of text" in printed
    assert printed.endswith("passed\n")
    assert main(["pretrained", "check", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    with_fault(monkeypatch, "model.norm.weight")
    assert main(["pretrained", "check", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("TOO LARGE") == 2
    assert printed.endswith("failed: more than 0.0001\n")


def test_what_was_not_checked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"not checked: no known library computes 'image text -> text' of .*'nanovlm'",
    ):
        gate.compare(saved_nanovlm(tmp_path / "nanovlm"))
    folder = llama(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        CheckpointError, match=r"not checked: .* needs AutoModelForCausalLM .*: pip install --upgrade 'transformers>=5'"
    ):
        gate.compare(folder)


def test_a_model_object_is_compared_too(tmp_path: Path) -> None:
    folder = saved(built("CLIPModel", "CLIPConfig", CLIP), tmp_path / "clip")
    rows = gate.compare(transformers.CLIPModel.from_pretrained(folder))
    assert len(rows) == 6
    assert all(row.passed for row in rows)
    with pytest.raises(
        CheckpointError, match="not checked: this is the text tower alone; leave part out to check both"
    ):
        gate.compare(folder, part="text")


def test_a_folder_of_timm_is_compared_with_a_new_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64)
    folder = pretrained(module).model().export("timm", tmp_path / "tiny")
    check(folder, {"logits": "vit.head.bias"}, monkeypatch)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=2, num_heads=4)
    folder = pretrained(other).model().export("timm", tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"not checked: depth, heads, head_width differ from timm's vit_tiny_patch16_224"
    ):
        gate.compare(folder)


@pytest.mark.parametrize("what", ["logits", "states"])
def test_differences_are_of_the_right_sample(what: gate.What, tmp_path: Path) -> None:
    """Samples of other lengths lie in another order in the stream than they were given."""
    model = pretrained(llama(tmp_path)).model()
    samples = [{"text": list(range(1, n)), **({"answer": [1, 2]} if what == "logits" else {})} for n in (12, 4, 9)]
    together = gate.computed(model, "text -> text", samples, what)
    for sample, found in zip(samples, together, strict=True):
        (alone,) = gate.computed(model, "text -> text", [sample], what)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)

"""Llama, SmolLM2, Mistral, Qwen2.5 and Qwen3 against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import multimodal as mm
from multimodal.pretrained import pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    check_writing,
    largest,
    refused,
    saved,
    text_logits,
    their_logits,
    unlike_itself,
)

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
}
IDS = [[5, 9, 2, 70, 1, 0, 33], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20, 33]]


def build(name: str, **more: Any) -> Any:
    kind, settings = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, IDS, text_logits, their_logits(module, IDS))
    check_round_trip(tmp_path, tmp_path / "theirs")


@pytest.mark.parametrize("name", ["llama 3.1", "mistral", "qwen3"])
def test_what_is_written_is_what_transformers_writes(name: str, tmp_path: Path) -> None:
    module = build(name)
    saved(module, tmp_path)
    unlike_itself(module, module.model.norm.weight)
    module.save_pretrained(tmp_path)
    given = {"input_ids": torch.tensor([IDS[1]])}
    check_writing(module, given, pretrained(tmp_path), "text -> text", {"text": IDS[1]})


def test_a_model_object_is_the_same_as_its_folder(tmp_path: Path) -> None:
    for name in ("llama", "qwen2 tied"):
        module = build(name)
        folder = pretrained(saved(module, tmp_path / name))
        loaded = pretrained(module)
        assert (loaded.core, loaded.tasks, loaded.tokenizers) == (folder.core, folder.tasks, folder.tokenizers)
        assert loaded.weights.keys() == folder.weights.keys()
        assert all(torch.equal(loaded.weights[key], x) for key, x in folder.weights.items())
        assert largest(text_logits(loaded, IDS), their_logits(module, IDS)) < TOLERANCE
        with torch.no_grad():  # it is a copy
            module.model.norm.weight += 1
        assert torch.equal(loaded.weights["core.norm.weight"], folder.weights["core.norm.weight"])


def test_any_small_change_is_found(tmp_path: Path) -> None:
    for name, tensors, core in (
        ("llama with biases", ["model.layers.1.self_attn.v_proj.bias", "model.layers.2.mlp.down_proj.bias"], {}),
        ("qwen3", ["model.layers.0.self_attn.q_norm.weight"], {"norm": mm.core.Norm(eps=1e-3)}),
        ("llama", ["model.norm.weight"], {"rotary_base": (9000.0, 100.0, 100.0), "norm": mm.core.Norm(eps=1e-4)}),
    ):
        module = build(name)
        given = saved(module, tmp_path / name)
        wanted = their_logits(module, IDS)
        check_mutations(given, lambda loaded, wanted=wanted: largest(text_logits(loaded, IDS), wanted), tensors, core)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("llama"), tmp_path)
    refused({"attention_sinks": 4}, given, r"has attention_sinks, which this version does not know")
    refused({"hidden_act": "mish"}, given, r"hidden_act='mish' is not supported; there are silu")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    refused({"rope_parameters": yarn}, given, r"rope_type='yarn' is not supported; there are 'default'")
    refused({"model_type": "llamaa"}, given, r"models of type 'llamaa' are not supported")
    refused(
        {"intermediate_size": 64},
        given,
        r"gate_proj.weight \(48, 32\), .*up_proj.weight \(48, 32\): the configuration needs .* \(128, 32\)",
    )
    refused({"num_hidden_layers": 4}, given, r"there is no tensor 'model.layers.3")
    refused({"num_hidden_layers": 2}, given, r"nothing uses the tensor 'model.layers.2")


def test_the_default_size_of_a_small_model(tmp_path: Path) -> None:
    """SmolLM2-135M's width and heads, at a depth of 2 and with a small vocabulary."""
    settings = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    module = build("smollm2", **settings, num_hidden_layers=2)
    assert largest(text_logits(pretrained(saved(module, tmp_path)), IDS), their_logits(module, IDS)) < TOLERANCE


def test_fields_mean_what_they_mean_to_each_family(tmp_path: Path) -> None:
    """The same field of a window, and the one of several names of rotary settings that counts, differ by family."""
    window, linear = {"sliding_window": 4}, {"rope_type": "linear", "factor": 4.0}
    for name, changes in (
        ("llama", {**window, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
        ("llama", {"rope_scaling": linear}),
        ("llama", {"rope_scaling": {**linear, "rope_theta": 70.0}, "rope_theta": 50.0}),
        ("mistral", {"use_sliding_window": False, "max_window_layers": 2}),
        ("qwen2", {"layer_types": None, "use_sliding_window": None}),
        ("qwen2", {"layer_types": None, "max_window_layers": None}),
    ):
        given = saved(build(name), tmp_path / name)
        path = given / "config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
        module = transformers.AutoModelForCausalLM.from_pretrained(given)
        assert largest(text_logits(pretrained(given), IDS), their_logits(module, IDS)) < TOLERANCE, changes


def test_a_missing_field_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    for name, stop, window in (("mistral", 2, 4096), ("qwen2", 0, None)):
        given = saved(build(name), tmp_path / name)
        path = given / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for field in ("eos_token_id", "bos_token_id", "sliding_window", "layer_types", "use_sliding_window"):
            config.pop(field, None)
        path.write_text(json.dumps(config), encoding="utf-8")
        loaded = pretrained(given)
        attention: Any = loaded.core.blocks[0][0]
        head: Any = loaded.tasks[0].head
        assert (head.stop_id, attention.mask) == (stop, None if window is None else mm.masks.Window(window))
        theirs = transformers.AutoConfig.from_pretrained(given)
        assert (theirs.eos_token_id or 0, theirs.sliding_window) == (stop, window)


def test_a_head_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    given = saved(build("llama").model, tmp_path / "untied")
    with pytest.raises(mm.CheckpointError, match="it was saved without its head, and tie_word_embeddings=False says"):
        pretrained(given)
    module = build("smollm2")
    given = saved(module.model, tmp_path / "tied")
    assert largest(text_logits(pretrained(given), IDS), their_logits(module.eval(), IDS)) < TOLERANCE

"""Gemma 3 against transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from multimodal.attention import DotProduct
from multimodal.norm import Norm
from multimodal.positions import Rotary
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

FULL, SLIDING = "full_attention", "sliding_attention"
SMALL = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "layer_types": [SLIDING, FULL, SLIDING],
}
LINEAR = {
    FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 100.0},
}
CASES: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "scaled positions": {"rope_parameters": LINEAR},
    "cap and no windows": {"final_logit_softcapping": 3.0, "layer_types": [FULL] * 3, "attention_bias": True},
    "untied": {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "head_dim": 8, "query_pre_attn_scalar": 8},
    # its width and heads
    "270m": {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
    },
}
IDS = [[5, 9, 2, 70, 1, 0, 33], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20, 33]]


def build(name: str) -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**SMALL, **CASES[name]}))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, IDS, text_logits, their_logits(module, IDS))
    check_round_trip(tmp_path, tmp_path / "theirs")


def test_what_is_written_is_what_transformers_writes(tmp_path: Path) -> None:
    module = build("gemma3")
    saved(module, tmp_path)
    unlike_itself(module, module.model.norm.weight)
    module.save_pretrained(tmp_path)
    given = {"input_ids": torch.tensor([IDS[1]])}
    check_writing(module, given, pretrained(tmp_path), "text -> text", {"text": IDS[1]})


def test_an_older_configuration_means_the_same(tmp_path: Path) -> None:
    """It has its two bases, its scaling and the pattern of its layers in fields of their own."""
    given = saved(build("scaled positions"), tmp_path)
    path = given / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = [SLIDING, FULL, SLIDING]
    path.write_text(json.dumps(config))
    new = pretrained(given)
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del config[name]
    config |= {
        "rope_theta": 500.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    path.write_text(json.dumps(config))
    assert pretrained(given).core == new.core


def test_a_text_that_is_read_begins_with_a_token_of_its_own(tmp_path: Path) -> None:
    module = build("gemma3")
    given = saved(module, tmp_path)
    words = ["<pad>", "<eos>", "<bos>", *"abcdefgh"]
    hf = HFTokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 2)])
    hf.save(str(given / "tokenizer.json"))
    model = pretrained(given).model()
    stream = model.pack("text -> text", [{"text": "abc", "answer": "de"}])
    assert stream.content["text"].tolist() == [2, 3, 4, 5, 6, 7]
    ids = torch.tensor([[2, 3, 4, 5]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = module.generate(ids, **options)[0, 4:]
    answer = model.generate("text -> text", text="abc", max_tokens=4)
    assert answer.tokens is not None
    assert answer.tokens.content.tolist() == wanted.tolist()


def test_any_small_change_is_found(tmp_path: Path) -> None:
    module = build("gemma3")
    given = saved(module, tmp_path)
    wanted = their_logits(module, IDS)
    names = ["self_attn.k_norm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    loaded = pretrained(given)
    settings = {"norm": Norm(eps=1e-3, around_one=True), "score": DotProduct(scale=0.2)}
    tensors = [f"model.layers.1.{name}.weight" for name in names]
    check_mutations(given, lambda loaded: largest(text_logits(loaded, IDS), wanted), tensors, settings)
    core: Any = loaded.core
    near, far, _ = core.blocks
    for which, base in ((0, 9e3), (1, 9e5)):
        attention = [near[0], far[0]]
        attention[which] = dataclasses.replace(attention[which], rotary=Rotary(base=(base, 100.0, 100.0)))  # type: ignore[call-arg]
        blocks = ((attention[0], near[1]), (attention[1], far[1]), (attention[0], near[1]))
        other = dataclasses.replace(loaded, core=core.replace(block=blocks))
        assert largest(text_logits(other, IDS), wanted) > TOLERANCE, base


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("gemma3"), tmp_path)
    refused({"attention_sinks": 4}, given, r"has attention_sinks, which this version does not know")
    refused({"attn_logit_softcapping": 50.0}, given, r"attn_logit_softcapping=50.0 is not supported")
    refused({"use_bidirectional_attention": True}, given, r"use_bidirectional_attention=True is not supported")
    refused({"layer_types": [FULL, "chunked", FULL]}, given, r"layer_types has 'chunked'; there are full_attention")
    yarn = {FULL: {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0}}
    refused({"rope_parameters": yarn}, given, r"rope_type='yarn' is not supported; there are 'default'")
    refused({"model_type": "gemma3"}, given, r"models of type 'gemma3' are not supported")
    refused({"num_hidden_layers": 2}, given, r"layer_types has 3 layers, but there are 2")
    fewer = {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}
    refused(fewer, given, r"nothing uses the tensor 'model.layers.2")

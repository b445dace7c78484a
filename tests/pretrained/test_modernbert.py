"""ModernBERT against transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.masks import Window
from multimodal.norm import Norm
from multimodal.positions import Rotary
from multimodal.pretrained import Pretrained, pretrained
from multimodal.shapes import CheckpointError
from tests.pretrained.compared import (
    TOLERANCE,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    largest,
    refused,
    saved,
    states_or_logits,
    uneven,
)

transformers = pytest.importorskip("transformers")

FULL, SLIDING = "full_attention", "sliding_attention"
SMALL = {
    "vocab_size": 71,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "local_attention": 6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1152, "num_hidden_layers": 2}
BASES = {FULL: {"rope_type": "default", "rope_theta": 900.0}, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
NAMES = {0: "bad", 1: "good", 2: "neither"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("Model", {}),
    "other bases": ("Model", {"rope_parameters": BASES, "layer_types": [SLIDING, FULL, FULL, SLIDING]}),
    "base": ("Model", BASE),
    "filling": ("ForMaskedLM", {}),
    "filling, untied": ("ForMaskedLM", {"tie_word_embeddings": False, "decoder_bias": False, "classifier_bias": True}),
    "classes by the first": ("ForSequenceClassification", {"id2label": NAMES}),
    "classes by the mean": (
        "ForSequenceClassification",
        {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "relu"},
    ),
}
IDS = [[5, 9, 2, 70, 1, 0, 33], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20, 33]]


def build(name: str, **more: Any) -> Any:
    kind, settings = CASES[name]
    config = transformers.ModernBertConfig(**{**SMALL, **settings, **more})
    return getattr(transformers, f"ModernBert{kind}")(config)


def ours(loaded: Pretrained, ids: list[list[int]] = IDS) -> list[torch.Tensor]:
    return states_or_logits(loaded, "text", ids)


def theirs(module: Any, ids: list[list[int]] = IDS) -> list[torch.Tensor]:
    with torch.inference_mode():
        found = [module(torch.tensor([x])) for x in ids]
    return [x.logits[0] if "logits" in x else x.last_hidden_state[0] for x in found]


@pytest.mark.parametrize("name", CASES)
def test_states_and_logits_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, IDS, ours, theirs(module))
    check_round_trip(tmp_path, tmp_path / "theirs")
    again = type(module).from_pretrained(tmp_path / "out").eval()
    assert largest(theirs(again), theirs(module)) < 1e-6


def test_an_older_configuration_means_the_same(tmp_path: Path) -> None:
    given = saved(build("other bases", layer_types=[FULL, SLIDING, FULL, SLIDING]), tmp_path)
    path = given / "config.json"
    config, new = json.loads(path.read_text()), pretrained(given)
    for name in ("rope_parameters", "layer_types"):
        del config[name]
    config |= {"global_rope_theta": 900.0, "local_rope_theta": 50.0, "global_attn_every_n_layers": 2}
    path.write_text(json.dumps(config))
    assert pretrained(given).core == new.core


def test_any_small_change_is_found(tmp_path: Path) -> None:
    for name, prefix, more in (("modernbert", "", []), ("filling", "model.", ["decoder.bias"])):
        module = build(name)
        given = saved(module, tmp_path / name)
        wanted = theirs(module)
        tensors = [
            "embeddings.norm.weight",
            "layers.1.attn_norm.weight",
            "layers.0.mlp_norm.weight",
            "final_norm.weight",
        ]
        check_mutations(
            given,
            lambda loaded, wanted=wanted: largest(ours(loaded), wanted),
            [prefix + tensor for tensor in tensors],
            {"norm": Norm(eps=1e-3, centred=True)},
            uneven(32),
        )
        check_mutations(given, lambda loaded, wanted=wanted: largest(ours(loaded), wanted), more, {})
    loaded = pretrained(given)
    core: Any = loaded.core
    changes: list[dict[str, Any]] = [
        {"rotary": Rotary(base=(9e3, 100.0, 100.0))},
        {"mask": Window(3)},
        {"mask": Window(5)},
    ]
    for change in changes:
        blocks = list(core.blocks)
        blocks[1] = (dataclasses.replace(blocks[1][0], **change), blocks[1][1])
        other = dataclasses.replace(loaded, core=core.replace(block=tuple(blocks)))
        assert largest(ours(other), wanted) > TOLERANCE, change


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("modernbert"), tmp_path / "modernbert")
    refused({"attention_sinks": 4}, given, r"has attention_sinks, which this version does not know")
    refused({"hidden_activation": "mish"}, given, r"hidden_activation='mish' is not supported; there are silu")
    refused({"norm_bias": True}, given, r"norm_bias=True is not supported")
    refused(
        {"classifier_pooling": "last"}, given, r"classifier_pooling='last' is not supported; wanted 'cls' or 'mean'"
    )
    refused({"layer_types": [FULL] * 3}, given, r"wanted full_attention or sliding_attention for each of 4 layers")
    refused({"num_hidden_layers": 3, "layer_types": [FULL] * 3}, given, r"nothing uses the tensor 'layers.3")


def test_outputs_that_are_no_classes_of_a_text_are_refused(tmp_path: Path) -> None:
    """Of other heads the tensors have the names of a classifier's."""
    settings = {**SMALL, "num_labels": 3}
    config = transformers.ModernBertConfig(**settings)
    given = saved(transformers.ModernBertForTokenClassification(config), tmp_path / "tokens")
    with pytest.raises(CheckpointError, match="but a ModernBertForTokenClassification is none"):
        pretrained(given)
    refused(
        {"architectures": ["ModernBertForQuestionAnswering"]}, given, "but a ModernBertForQuestionAnswering is none"
    )
    whole = {"architectures": ["ModernBertForSequenceClassification"]}
    refused({**whole, "problem_type": "regression"}, given, "3 outputs with problem_type='regression' are scores")
    refused({**whole, "id2label": {"0": "score"}}, given, "1 outputs with problem_type=None are scores")
    refused({**whole, "id2label": None, "num_labels": 10**12}, given, "num_labels=1000000000000 is more than 1048576")

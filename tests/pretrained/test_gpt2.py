"""GPT-2 against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import multimodal as mm
from multimodal.norm import Norm
from multimodal.pretrained import pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    changed,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    check_writing,
    largest,
    refused,
    saved,
    text_logits,
    their_logits,
    uneven,
    unlike_itself,
)

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 71, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "bos_token_id": 0}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"eos_token_id": 0},
    "untied": {"eos_token_id": 3, "tie_word_embeddings": False, "n_inner": 48, "activation_function": "relu"},
    "small": {"n_embd": 768, "n_head": 12, "n_layer": 1, "eos_token_id": 0},
}
IDS = [[5, 9, 2, 70, 1, 0, 33], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20, 33]]


def build(name: str) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SMALL, **CASES[name]}))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, IDS, text_logits, their_logits(module, IDS))
    check_round_trip(tmp_path, tmp_path / "theirs")


def test_what_is_written_is_what_transformers_writes(tmp_path: Path) -> None:
    module = build("gpt2")
    saved(module, tmp_path)
    unlike_itself(module, module.transformer.ln_f.weight)
    module.save_pretrained(tmp_path)
    given = {"input_ids": torch.tensor([IDS[1]])}
    check_writing(module, given, pretrained(tmp_path), "text -> text", {"text": IDS[1]})
    with pytest.raises(
        mm.StreamError, match=r"sample 0 of task 'text -> text': it has 25 tokens, .* positions for 24; shorten it"
    ):
        text_logits(pretrained(tmp_path), [[1] * 25])


def test_a_folder_without_a_head_and_with_stored_masks(tmp_path: Path) -> None:
    """The files of the first GPT-2 have neither a prefix nor a head, and hold the causal mask of each block."""
    module = build("gpt2")
    given = saved(module, tmp_path)
    stored = load_file(given / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in stored.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(24, 24).tril()}, given / "model.safetensors", {"format": "pt"})
    assert largest(text_logits(pretrained(given), IDS), their_logits(module, IDS)) < TOLERANCE


def test_any_small_change_is_found(tmp_path: Path) -> None:
    module = build("gpt2")
    given = saved(module, tmp_path)
    wanted = their_logits(module, IDS)
    norm = Norm(eps=1e-3, centred=True, bias=True)
    check_mutations(
        given,
        lambda loaded: largest(text_logits(loaded, IDS), wanted),
        ["transformer.h.1.ln_2.bias", "transformer.h.2.mlp.c_proj.bias", "transformer.wpe.weight"],
        {"norm": norm},
        uneven(32),
    )
    with changed(given, "transformer.h.0.attn.c_attn.bias"):
        assert largest(text_logits(pretrained(given), IDS), wanted) > TOLERANCE


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("gpt2"), tmp_path)
    refused({"attention_sinks": 4}, given, r"has attention_sinks, which this version does not know")
    refused({"activation_function": "mish"}, given, r"activation_function='mish' is not supported; there are silu")
    refused({"scale_attn_by_inverse_layer_idx": True}, given, r"scale_attn_by_inverse_layer_idx=True is not supported")
    refused({"n_layer": 4}, given, r"there is no tensor 'transformer.h.3")
    refused({"n_layer": 2}, given, r"nothing uses the tensor 'transformer.h.2")
    refused({"n_inner": 64}, given, r"c_fc.weight \(32, 128\): the configuration needs .* \(64, 32\)")

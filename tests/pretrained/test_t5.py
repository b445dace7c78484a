"""T5 against transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, processors

from multimodal.attention import BucketedBias
from multimodal.norm import Norm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    check_mutations,
    check_round_trip,
    largest,
    logits_by_sample,
    refused,
    saved,
    states_by_sample,
)

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 71,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("ForConditionalGeneration", {}),
    "version 1.1": ("ForConditionalGeneration", {**GATED, "num_decoder_layers": 2, "layer_norm_epsilon": 1e-5}),
    "heads that do not divide": ("ForConditionalGeneration", {**GATED, "num_heads": 3, "d_kv": 16}),
    "small": ("ForConditionalGeneration", {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 1}),
    "encoder": ("EncoderModel", {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
}
IDS = [[5, 9, 2, 70, 4, 8, 33, 1], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20, 33, 9, 1]]
ANSWERS = [[4, 60, 22, 31, 9, 9, 8, 17, 18, 19, 20, 21], [9]]


def build(name: str) -> Any:
    kind, settings = CASES[name]
    return getattr(transformers, f"T5{kind}")(transformers.T5Config(**{**SMALL, **settings}))


def ours(loaded: Pretrained, which: tuple[int, ...] = (0, 1)) -> list[torch.Tensor]:
    """The logits of a decoder, or the states of an encoder."""
    model = loaded.model()
    if "text -> text" in model.tasks:
        return logits_by_sample(model, "text -> text", [{"text": IDS[i], "answer": ANSWERS[i]} for i in which])
    return states_by_sample(model, "text <-> other:text", [{"text": IDS[i], "other": None} for i in which])


def theirs(module: Any, which: tuple[int, ...] = (0, 1)) -> list[torch.Tensor]:
    with torch.inference_mode():
        if not hasattr(module, "lm_head"):
            return [module(torch.tensor([IDS[i]])).last_hidden_state[0] for i in which]
        written = [torch.tensor([[0, *ANSWERS[i]]]) for i in which]
        return [
            module(torch.tensor([IDS[i]]), decoder_input_ids=x).logits[0] for i, x in zip(which, written, strict=True)
        ]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_states_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    wanted = theirs(module)
    # of the largest value: T5's scores have no scale, and float32 rounds them otherwise on each CPU (theirs is 3e-5 from float64)
    allowed = TOLERANCE * max(1.0, *(float(x.abs().max()) for x in wanted))
    assert largest(ours(loaded), wanted) < allowed
    for one in ((0,), (1,)):
        assert largest(ours(loaded, one), theirs(module, one)) < allowed
    check_round_trip(tmp_path, tmp_path / "theirs")


def test_a_matrix_of_its_own_behind_the_decoder(tmp_path: Path) -> None:
    """As in the files of version 1.1, whose head is not the table of the tokens."""
    module = build("version 1.1")
    given = saved(module, tmp_path / "theirs")
    head = torch.randn(71, 32)
    stored = {**load_file(given / "model.safetensors"), "lm_head.weight": head}
    save_file(stored, given / "model.safetensors", {"format": "pt"})
    module.lm_head.weight = torch.nn.Parameter(head)
    assert largest(ours(pretrained(given)), theirs(module)) < TOLERANCE
    check_round_trip(tmp_path, given)


@pytest.mark.parametrize("name", ["t5", "version 1.1"])
def test_what_is_written_is_what_transformers_writes(name: str, tmp_path: Path) -> None:
    module = build(name)
    model = pretrained(saved(module, tmp_path)).model()
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
    }
    wanted = module.generate(torch.tensor([IDS[1]]), **options)[0, 1:].tolist()
    wanted = wanted[: wanted.index(1)] if 1 in wanted else wanted
    assert len(wanted) > 3, "the case does not exercise anything"
    assert model.generate("text -> text", text=IDS[1], max_tokens=12).value == wanted


def test_a_text_that_is_read_ends_with_a_token_of_its_own(tmp_path: Path) -> None:
    module = build("t5")
    given = saved(module, tmp_path)
    words = ["<pad>", "</s>", "<unk>", *"abcdefgh"]
    hf = HFTokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    hf.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    hf.save(str(given / "tokenizer.json"))
    model = pretrained(given).model()
    stream = model.pack("text -> text", [{"text": "abc", "answer": "de"}])
    assert stream.content["text"].tolist() == [3, 4, 5, 1, 0, 6, 7]
    assert stream.readings["text -> text"].target.tolist() == [6, 7, 1]  # type: ignore[union-attr]
    encoder = saved(build("encoder"), tmp_path / "encoder")
    vectors = pretrained(encoder).model().vectors("text <-> other:text", [{"text": x} for x in IDS])
    states = theirs(build("encoder").from_pretrained(encoder).eval())
    wanted = torch.stack([F.normalize(x.mean(0), dim=0) for x in states])
    torch.testing.assert_close(vectors, wanted, atol=TOLERANCE, rtol=0.0)


def test_any_small_change_is_found(tmp_path: Path) -> None:
    module = build("t5")
    given = saved(module, tmp_path)
    wanted = theirs(module)
    stored = load_file(given / "model.safetensors")
    # of some of the ranges, since a softmax does not see what is added to all
    few = torch.zeros(8, 4)
    few[3] = few[6] = 1e-2
    biases = [f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")]
    assert set(biases) < set(stored)
    check_mutations(given, lambda loaded: largest(ours(loaded), wanted), biases, {}, few)
    names = ["decoder.block.1.layer.1.layer_norm.weight", "encoder.block.2.layer.1.layer_norm.weight"]
    check_mutations(given, lambda loaded: largest(ours(loaded), wanted), names, {})
    loaded = pretrained(given)
    core: Any = loaded.core
    for part in ("reader", "writer"):
        one = getattr(core, part)
        other = core.replace(**{part: one.replace(norm=Norm(eps=1e-3))})
        assert largest(ours(dataclasses.replace(loaded, core=other)), wanted) > TOLERANCE, part
        attention = dataclasses.replace(
            one.block[0], prior=BucketedBias(buckets=8, reach=20, directed=part == "reader")
        )
        other = core.replace(**{part: one.replace(block=(attention, *one.block[1:]))})
        assert largest(ours(dataclasses.replace(loaded, core=other)), wanted) > TOLERANCE, part


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("t5"), tmp_path)
    refused({"attention_sinks": 4}, given, r"has attention_sinks, which this version does not know")
    refused({"feed_forward_proj": "mish"}, given, r"feed_forward_proj='mish' is not supported; there are silu")
    refused({"feed_forward_proj": "sparse-relu"}, given, r"feed_forward_proj='sparse'-relu is not supported")
    refused({"num_layers": 4, "num_decoder_layers": 3}, given, r"there is no tensor 'encoder.block.3")
    refused({"num_decoder_layers": 2}, given, r"nothing uses the tensor 'decoder.block.2")
    config = json.loads((given / "config.json").read_text())
    assert config["scale_decoder_outputs"]

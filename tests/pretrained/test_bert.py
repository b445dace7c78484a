"""BERT and MiniLM against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

import multimodal as mm
from multimodal.norm import Norm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    changed,
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

SMALL = {
    "vocab_size": 71,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "relu": ("BertModel", {"hidden_act": "relu", "layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "minilm": ("BertModel", MINILM),
    "filling": ("BertForMaskedLM", {}),
    "as it was trained": ("BertForPreTraining", {}),
    "classes": ("BertForSequenceClassification", {"id2label": {0: "bad", 1: "good", 2: "neither"}}),
    "unnamed classes": ("BertForSequenceClassification", {}),
}
IDS = [[5, 9, 2, 70, 1, 0, 33], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20, 33]]
PAIR = "text <-> other:text"


def build(name: str, **more: Any) -> Any:
    kind, settings = CASES[name]
    return getattr(transformers, kind)(transformers.BertConfig(**{**SMALL, **settings, **more}))


def ours(loaded: Pretrained, ids: list[list[int]] = IDS) -> list[torch.Tensor]:
    return states_or_logits(loaded, "text", ids)


def theirs(module: Any, ids: list[list[int]] = IDS) -> list[torch.Tensor]:
    with torch.inference_mode():
        found = [module(torch.tensor([x])) for x in ids]
    names = ("logits", "prediction_logits", "last_hidden_state")
    return [next(x[name] for name in names if name in x)[0] for x in found]


@pytest.mark.parametrize("name", CASES)
def test_states_and_logits_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, IDS, ours, theirs(module))
    check_round_trip(tmp_path, tmp_path / "theirs")
    assert not loaded.unused
    again = type(module).from_pretrained(tmp_path / "out").eval()
    assert largest(theirs(again), theirs(module)) < 1e-6


def test_vectors_are_the_mean_of_the_states(tmp_path: Path) -> None:
    module = build("minilm")
    model = pretrained(saved(module, tmp_path)).model()
    wanted = torch.stack([F.normalize(x.mean(0), dim=0) for x in theirs(module)])
    torch.testing.assert_close(model.vectors(PAIR, [{"text": x} for x in IDS]), wanted, atol=TOLERANCE, rtol=0.0)
    other = model.vectors(PAIR, [{"other": x} for x in IDS])
    torch.testing.assert_close(other, wanted, atol=TOLERANCE, rtol=0.0)


def wordpiece() -> HFTokenizer:
    """A tokenizer of BERT's kind with a small vocabulary."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "the",
        "cat",
        "##s",
        "##t",
        "sat",
    ]
    hf = HFTokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    hf.normalizer = normalizers.BertNormalizer(lowercase=True)
    hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    hf.add_special_tokens(words[:5])
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    hf.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    return hf


def test_texts_are_framed_and_classes_are_named(tmp_path: Path) -> None:
    module, hf = build("classes"), wordpiece()
    given = saved(module, tmp_path)
    hf.save(str(given / "tokenizer.json"))
    loaded = pretrained(given)
    texts = ["The cats sat", "a cat"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hf, pad_token="[PAD]")
    batch = fast(texts, padding=True, return_tensors="pt")
    assert [loaded.tokenizers["text"](text).content.tolist() for text in texts] == [
        fast(text)["input_ids"] for text in texts
    ]
    with torch.inference_mode():
        wanted = module(**batch).logits.softmax(-1)
    for text, probability in zip(texts, wanted.tolist(), strict=True):
        found = loaded.model().predict("text -> label", text=text).probability
        assert found == pytest.approx(dict(zip(("bad", "good", "neither"), probability, strict=True)), abs=TOLERANCE)


def test_a_text_of_more_tokens_than_places_is_refused(tmp_path: Path) -> None:
    model = pretrained(saved(build("bert"), tmp_path)).model()
    assert model.vectors(PAIR, [{"text": [5] * 24}]).shape == (1, 32)
    said = r"sample 1 of task .text <-> other:text.: it has 25 tokens, .* positions for 24; shorten it, .*by field: text 25\)"
    with pytest.raises(mm.StreamError, match=said):
        model.vectors(PAIR, [{"text": [5] * 24}, {"text": [5] * 25}])
    # the other side is named too, and what the core says of a stream is the same advice
    with pytest.raises(mm.StreamError, match=r"sample 0 .*\(tokens by field: other 26\)"):
        model.vectors(PAIR, [{"other": [5] * 26}])
    model.packer.most_times = None
    with pytest.raises(
        mm.StreamError, match=r"25 tokens, more than learned_times=24; shorten it, because positions that were"
    ):
        model.vectors(PAIR, [{"text": [5] * 25}])


def test_any_small_change_is_found(tmp_path: Path) -> None:
    for name, prefix, more in (("bert", "", []), ("classes", "bert.", ["bert.pooler.dense.bias"])):
        module = build(name)
        given = saved(module, tmp_path / name)
        wanted = theirs(module)
        tensors = ["embeddings.token_type_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"]
        tensors += ["encoder.layer.0.attention.output.dense.bias", "embeddings.position_embeddings.weight"]
        check_mutations(
            given,
            lambda loaded, wanted=wanted: largest(ours(loaded), wanted),
            [prefix + tensor for tensor in tensors] + more,
            {"norm": Norm(eps=1e-3, centred=True, bias=True)},
            uneven(32),
        )
        with changed(given, f"{prefix}encoder.layer.2.attention.self.value.bias"):
            assert largest(ours(pretrained(given)), wanted) > TOLERANCE


def test_the_pooler_comes_back(tmp_path: Path) -> None:
    given = saved(build("bert"), tmp_path / "theirs")
    pretrained(given).model().export("hf", tmp_path / "out")
    out, first = load_file(tmp_path / "out" / "model.safetensors"), load_file(given / "model.safetensors")
    assert torch.equal(out["pooler.dense.weight"], first["pooler.dense.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((given / "config.json").read_text())


def test_the_first_names_of_norms(tmp_path: Path) -> None:
    module = build("as it was trained")
    given = saved(module, tmp_path / "theirs")
    stored = load_file(given / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in stored.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in old.items()}
    assert len(set(old) - set(stored)) == 16
    save_file(old, given / "model.safetensors", {"format": "pt"})
    assert largest(ours(pretrained(given)), theirs(module)) < TOLERANCE
    check_round_trip(tmp_path, given)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("bert"), tmp_path / "bert")
    refused({"attention_sinks": 4}, given, r"has attention_sinks, which this version does not know")
    refused({"hidden_act": "mish"}, given, r"hidden_act='mish' is not supported; there are silu")
    refused({"position_embedding_type": "relative_key"}, given, r"position_embedding_type='relative_key' is not supp")
    refused({"is_decoder": True}, given, r"is_decoder=True is not supported")
    refused({"num_hidden_layers": 4}, given, r"there is no tensor 'encoder.layer.3")
    refused({"num_hidden_layers": 2}, given, r"nothing uses the tensor 'encoder.layer.2")
    untied = transformers.BertConfig(**SMALL, tie_word_embeddings=False)
    untied_folder = saved(transformers.BertForMaskedLM(untied), tmp_path / "untied")
    refused({}, untied_folder, r"tie_word_embeddings=False is not supported")
    answering = saved(transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL)), tmp_path / "answering")
    with pytest.raises(mm.CheckpointError, match=r"nothing uses the tensor 'qa_outputs"):
        pretrained(answering)

"""Text as the tokenizers of trained models give it: their ids, with what they add around a text, padding, and scaled tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import multimodal as mm
from multimodal.check import tokenizer_checks
from multimodal.declare import declaration, rebuild
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import TextBPE, TextBytes

CORPUS = [
    "the cat sat on the mat, and that was that.",
    "A photo of a dog; it doesn't bark! 12 dogs do, 3 don't.",
    "Grüße aus Köln: the theme of the thesis is 'theses'",
    "the quick brown fox jumps over the lazy dog",
] * 10
TEXTS = [
    "the cat",
    "A photo of a dog!",
    "12 dogs, 3 cats: it doesn't matter.",
    " the   theme ",
    "Grüße aus Köln",
    "zebra <s> qu",
]


def trained(model: Any, trainer: Any, before: Any, normalizer: Any = None) -> dict[str, Any]:
    """The file's part "model" of a small tokenizer."""
    hf = HFTokenizer(model)
    hf.pre_tokenizer = before
    if normalizer is not None:
        hf.normalizer = normalizer
    hf.train_from_iterator(CORPUS, trainer)
    return json.loads(hf.to_str())["model"]


def byte_level() -> dict[str, Any]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]


def bert() -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    )
    return transformers().BertTokenizer(vocab=model["vocab"])


def t5() -> Any:
    model = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
    )
    return transformers().T5Tokenizer(vocab=[tuple(pair) for pair in model["vocab"]], extra_ids=0)


def clip() -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    before = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = trained(models.BPE(end_of_word_suffix="</w>"), trainer, before, normalizers.Lowercase())
    return transformers().CLIPTokenizer(vocab=model["vocab"], merges=merges(model))


def roberta() -> Any:
    model = byte_level()
    vocab = model["vocab"] | {
        name: len(model["vocab"]) + i for i, name in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    }
    return transformers().RobertaTokenizer(vocab=vocab, merges=merges(model))


def llama() -> Any:
    model = byte_level()
    hf = HFTokenizer(models.BPE(vocab=model["vocab"], merges=merges(model)))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.add_special_tokens(["<|begin_of_text|>"])
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", len(model["vocab"]))]
    )
    hf.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return transformers().PreTrainedTokenizerFast(tokenizer_object=hf)


def gemma() -> Any:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=names, show_progress=False)
    before = pre_tokenizers.Split(" ", "merged_with_previous")
    model = trained(models.BPE(byte_fallback=True), trainer, before, normalizers.Replace(" ", "▁"))
    return transformers().GemmaTokenizer(vocab=model["vocab"], merges=merges(model), add_bos_token=True)


def transformers() -> Any:
    return pytest.importorskip("transformers")


FAMILIES = {"bert": bert, "t5": t5, "clip": clip, "roberta": roberta, "llama": llama, "gemma": gemma}


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_trained_models(family: str) -> None:
    theirs = FAMILIES[family]()
    spec = theirs.backend_tokenizer.to_str()
    plain, mine = TextBPE(spec, lossy=True), TextBPE(spec, lossy=True, template=True)
    for text in TEXTS:
        if "<s>" in text and family == "roberta":
            continue  # in ours nothing in a text is special
        assert plain(text).content.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert mine(text).content.tolist() == theirs(text)["input_ids"]
        assert len(mine(text)) > len(plain(text)) > 0
        assert mine.decode(mine(text)) == plain.decode(plain(text))


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_texts_come_back_without_what_was_added(family: str) -> None:
    mine = TextBPE(FAMILIES[family]().backend_tokenizer.to_str(), template=True)
    for text in TEXTS:
        tokens = mine(text)
        assert mine.decode(tokens) == text
        assert isinstance(mine.decode(Tokens(tokens.content[:1], tokens.position_NA[:1])), str)
    with pytest.raises(MediaError, match="gave no tokens"):
        mine("")
    assert len(mine("", empty=True)) == 0


def made(pad: int | None = 300) -> str:
    """A byte-level tokenizer.json with <s> text </s> and padding, by the library alone."""
    model = byte_level()
    hf = HFTokenizer(models.BPE(vocab=model["vocab"], merges=merges(model)))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.add_special_tokens(["<s>", "</s>", "<pad>"])
    ids = {name: hf.token_to_id(name) for name in ("<s>", "</s>", "<pad>")}
    single = "<s> <s> $A </s>"
    hf.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, ids[name]) for name in ("<s>", "</s>")]
    )
    if pad is not None:
        hf.enable_padding(pad_id=ids["<pad>"], pad_token="<pad>")
    return hf.to_str()


def test_template_and_padding_without_transformers() -> None:
    spec = made()
    hf = HFTokenizer.from_str(spec)
    start, end, pad = (hf.token_to_id(name) for name in ("<s>", "</s>", "<pad>"))
    plain, mine = TextBPE(spec)("the cat").content.tolist(), TextBPE(spec, template=True, pad_to=12)
    hf.enable_padding(length=12, pad_id=pad, pad_token="<pad>")
    assert mine("the cat").content.tolist() == hf.encode("the cat").ids
    assert mine("the cat").content.tolist() == [start, start, *plain, end, *[pad] * (9 - len(plain))]
    assert mine.decode(mine("the cat")) == "the cat"
    assert mine.length == 12
    assert mine.token_names(mine("the cat"))[:3] == ["<s>", "<s>", "the"]
    assert mine.token_names(mine("the cat"))[-1] == "<pad>"
    assert TextBPE(spec, pad_to=12).decode(TextBPE(spec, pad_to=12)("the cat")) == "the cat"
    # what is written token by token has nothing around it, and the same ids
    framed = TextBPE(spec, template=True)
    assert framed.written == TextBPE(spec)
    assert mine.written is mine
    model = mm.Model({"text": framed}, mm.Core(width=16, depth=1, heads=2), ["text -> text"])
    stream = model.pack("text -> text", [{"text": "the cat", "answer": "the cat"}])
    assert stream.content["text"].tolist() == [start, start, *plain, end, *plain]
    assert stream.readings["text -> text"].target.tolist() == [*plain, framed.vocab_size]  # type: ignore[union-attr]
    # what a model writes: once, not as often as it is there
    assert mine.decode(Tokens(torch.tensor([start, *plain, end, end]), mine.places(len(plain) + 3))) == "<s>the cat</s>"


def test_padding_as_siglip_pads() -> None:
    """Its padding token is its end of text, and it always has 64 tokens."""
    theirs = t5()
    theirs.pad_token = theirs.eos_token
    mine = TextBPE(theirs.backend_tokenizer.to_str(), lossy=True, template=True, pad_to=64, pad_id=theirs.eos_token_id)
    plain = TextBPE(mine.spec, lossy=True)
    for text in TEXTS[:5]:
        assert mine(text).content.tolist() == theirs(text, padding="max_length", max_length=64)["input_ids"]
        assert mine.decode(mine(text)) == plain.decode(plain(text))


def test_a_text_that_ends_like_padding_is_refused() -> None:
    plain = TextBPE.train(CORPUS, vocab_size=300)
    mine = TextBPE(plain.spec, pad_to=16, pad_id=int(plain("!").content))
    assert mine.decode(mine("the cat")) == "the cat"
    with pytest.raises(MediaError, match=r"would lose str '!'"):
        mine("the cat!")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_to": 12}, r"pad_id=None of pad_to=12 is no id of 0\.\.348; give that"),
        ({"pad_to": 12, "pad_id": 403}, "pad_id=403 of pad_to=12 is no id"),
        ({"pad_to": 0}, "pad_to=0 must be a number of tokens"),
        ({"pad_to": 12.0}, "pad_to=12.0 must be"),
        ({"pad_id": 3}, "pad_id=3 without pad_to"),
        ({"pad_to": 12, "pad_id": 3, "causal": True}, "pad_to=12 with causal=True"),
    ],
)
def test_wrong_settings_of_padding(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^TextBPE: {message}"):
        TextBPE(made(pad=None), **settings)


def test_what_cannot_be_padded_or_framed(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^TextBPE.encode: .* gives 9 tokens, more than pad_to=4; shorten it first"):
        TextBPE(made(), template=True, pad_to=4)("the cat\n\n\n\n")
    with pytest.raises(ConfigError, match=r"^TextBPE: template=True, but this tokenizer.json adds nothing"):
        TextBPE(TextBPE.train(CORPUS, vocab_size=300).spec, template=True)
    (tmp_path / "tokenizer.json").write_text(made())
    opened = TextBPE.open(tmp_path / "tokenizer.json", template=True, pad_to=9, scale=2.0)
    assert (opened.template, opened.pad_to, opened.scale) == (True, 9, 2.0)


def test_scale_is_of_what_is_looked_up_and_not_of_the_weights() -> None:
    transformers()
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for scale in (1.0, math.sqrt(320)):
        table = TextBytes(scale=scale).embed(320).bfloat16()
        assert isinstance(table, torch.nn.Embedding)
        theirs = Gemma3TextScaledWordEmbedding(256, 320, 0, embed_scale=scale).bfloat16()
        theirs.load_state_dict(table.state_dict())
        ids = torch.arange(256)
        assert torch.equal(table(ids), theirs(ids))
        assert torch.equal(table.weight[ids] * torch.tensor(scale).bfloat16(), table(ids))
    assert 0.015 < float(TextBytes().embed(320).weight.detach().std()) < 0.025


def test_through_a_checkpoint() -> None:
    for tokenizer in (TextBPE(made(), template=True, pad_to=12, scale=3.0), TextBytes(scale=4.0)):
        assert rebuild(json.loads(json.dumps(declaration(tokenizer))), tokenizer.files()) == tokenizer
    old = TextBPE.from_config({"causal": True, "lossy": False}, {"tokenizer.json": made().encode()})
    assert old == TextBPE(made(), causal=True)
    assert TextBytes.from_config({"causal": True}) == TextBytes(causal=True)


CHECKED = [
    (tokenizer, check)
    for tokenizer in (
        TextBPE(made(), template=True, scale=2.0),
        TextBPE(made(), template=True, causal=True),
        TextBPE(made(), pad_to=40),
    )
    for check in tokenizer_checks(tokenizer, ["the cat sat", "a dog", "12 dogs: Köln!", "that"])
]


@pytest.mark.parametrize(("tokenizer", "check"), CHECKED, ids=[f"{i}-{c}" for i, (_, c) in enumerate(CHECKED)])
def test_promises(tokenizer: Any, check: Any) -> None:
    check()


def test_special_tokens_are_read_only_where_they_are_allowed() -> None:
    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator(
        ["hello there"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    hf.add_special_tokens(["<|end|>"])
    number, text = hf.token_to_id("<|end|>"), "hi<|end|>there"
    assert number not in TextBPE(hf.to_str())(text).content.tolist()
    chat = TextBPE(hf.to_str(), specials=True)
    assert chat(text).content.tolist() == hf.encode(text).ids
    assert chat(text).content.tolist().count(number) == 1
    assert chat.decode(chat(text)) == text
    assert TextBPE.from_config(chat.config(), chat.files()) == chat

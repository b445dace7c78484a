"""Text told while it is written: against the decoding of everything at once, and a search for stop strings in the whole text."""

import random
from collections.abc import Sequence

import pytest
import torch

import multimodal as mm
from multimodal.generate.detokenizer import Detokenizer
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import TextBPE, TextBytes

TEXTS = [
    "Grüße aus Köln, ça va? 東京 😀👩‍👩‍👧 ok",
    "😀😀😀",
    "ä",
    "plain words, plain words, plain words",
    "e\u0301 𝄞 \ufffd ?",
]
TOKENIZERS = {
    "bytes": TextBytes(),
    "bpe": TextBPE.train(TEXTS * 3, vocab_size=290),
    "bpe, mixed pieces": TextBPE.train(["ü😀", "😀ü", "Köln 東京"] * 9, vocab_size=275),
}


def whole(tokenizer: mm.Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(Tokens(torch.tensor(list(ids), dtype=torch.long), tokenizer.places(len(ids))))


def tell(tokenizer: mm.Tokenizer, ids: Sequence[int], stops: Sequence[str] = (), sizes: Sequence[int] = (1,)):
    """Push ids in parts of these sizes; the pieces, and what `stopped` said in the end."""
    detokenizer, pieces, at = Detokenizer(tokenizer, stops), [], 0
    for i in range(len(ids)):
        size = sizes[i % len(sizes)]
        pieces.append(detokenizer.push(list(ids[at : at + size])))
        at += size
        assert detokenizer.text == "".join(pieces)
        if detokenizer.stopped or at >= len(ids):
            break
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces, detokenizer.stopped


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2, 5)], ids=str)
def test_pieces_together_are_the_text(name, text, sizes):
    tokenizer = TOKENIZERS[name]
    pieces, stopped = tell(tokenizer, tokenizer(text).content.tolist(), sizes=sizes)
    assert "".join(pieces) == text
    assert not stopped
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_is_written_is_told_as_it_is_decoded_in_the_end(name):
    """Random ids, many of which are no text: broken characters, beginnings of characters, pieces that begin and end inside one."""
    tokenizer = TOKENIZERS[name]
    draw = random.Random(0)
    size = tokenizer.vocab_size or 0
    bytes_of_emoji = tokenizer("😀ü東").content.tolist()
    odd = 0
    for _ in range(250):
        pool = [draw.randrange(size) for _ in range(3)] + bytes_of_emoji
        ids = draw.choices(pool, k=draw.randrange(1, 30))
        pieces, _ = tell(tokenizer, ids)
        assert "".join(pieces) == whole(tokenizer, ids)
        odd += "\ufffd" in whole(tokenizer, ids)
    assert odd > 20
    for ids in (b"\xff\xf0\x9f\x98\x80", b"\xff\xff\xff\xff\xff\xf0\x9f\x98\x80", b"\xf0\x9f\xf0\x9f\xf0\x9f\x98\x80"):
        if name == "bytes":
            assert "".join(tell(tokenizer, list(ids))[0]) == ids.decode(errors="replace")


def test_a_character_is_told_once_it_is_whole_and_not_later():
    pieces, _ = tell(TextBytes(), list("aü😀b".encode()))
    assert pieces == ["a", "", "ü", "", "", "", "😀", "b", ""]


def test_a_tail_that_never_becomes_a_character_is_told_at_the_end():
    pieces, _ = tell(TextBytes(), list("a😀".encode())[:-1])
    assert pieces == ["a", "", "", "", "\ufffd"]


def first_stop(tokenizer: mm.Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int] | None:
    """Decode everything anew after every token; the text before the first stop string that has come, and after how many tokens."""
    for count in range(1, len(ids) + 1):
        text = whole(tokenizer, ids[:count])
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], count
    return None


STOPS = [
    ("b",),
    ("ab",),
    ("ab", "abc"),
    ("abc", "b"),
    ("aab", "ba"),
    ("ü",),
    ("aü", "ba"),
    ("abab", "bb"),
    ("cab", "c"),
]


@pytest.mark.parametrize("stops", STOPS, ids=str)
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_stop_strings_cut_where_a_search_of_the_whole_text_finds_them(stops, name):
    tokenizer = {"bytes": TextBytes(), "bpe": TextBPE.train(["abc ab aab üab cab"] * 4, vocab_size=264)}[name]
    draw = random.Random(1)
    outcomes = set()
    for _ in range(60):
        ids = tokenizer("".join(draw.choices("aabcü", k=draw.randrange(1, 12)))).content.tolist()
        expected = first_stop(tokenizer, ids, stops)
        pieces, stopped = tell(tokenizer, ids, stops)
        assert stopped == (expected is not None)
        assert "".join(pieces) == (whole(tokenizer, ids) if expected is None else expected[0])
        assert not any(stop in "".join(pieces) for stop in stops)
        outcomes.add(stopped)
        if expected is not None:  # at once, not a token later
            assert len(pieces) == expected[1] + 1
    assert outcomes == {True, False}


def test_what_may_become_a_stop_string_is_held_back_and_told_when_it_does_not():
    detokenizer = Detokenizer(TextBytes(), ("END", "ENOUGH"))
    pieces = [detokenizer.push([byte]) for byte in b"xENENOxEN"]
    assert pieces == ["x", "", "", "EN", "", "", "ENOx", "", ""]
    assert detokenizer.finish() == "EN"
    assert detokenizer.text == "xENENOxEN"


def test_the_same_token_is_decoded_only_a_few_times():
    decoded = 0

    class Counting(TextBytes):
        def decode(self, tokens: Tokens) -> str:
            nonlocal decoded
            decoded += len(tokens)
            return super().decode(tokens)

    detokenizer = Detokenizer(Counting(), ())
    ids = ("lang😀" * 60).encode() + b"\xff" * 300
    text = "".join(detokenizer.push([byte]) for byte in ids) + detokenizer.finish()
    assert text == ids.decode(errors="replace")
    assert decoded < 64 * len(ids)  # a bound that does not grow with the text


TASK = "text -> text"


class Scripted:
    """Makes a model write these ids, whatever it is; the head is asked once a token for all rows."""

    def __init__(self, model: mm.Model, ids: Sequence[int]) -> None:
        self.ids, self.at, self.size = [*ids, model.packer.tokenizers["text"].vocab_size], 0, 0
        linear = model.readout(TASK).linear
        self.size = linear.out_features
        linear.register_forward_hook(self.say)

    def say(self, module, args, out):
        logits = torch.full_like(out, -5.0)
        logits[:, self.ids[min(self.at, len(self.ids) - 1)]] = 5.0
        self.at += 1
        return logits


def writing(text: str | bytes, name: str = "bytes") -> mm.Model:
    tokenizer = TOKENIZERS[name]
    model = mm.Model({"text": tokenizer}, mm.Core(width=16, depth=1, heads=2), [TASK]).eval()
    ids = list(text) if isinstance(text, bytes) else tokenizer(text).content.tolist()
    Scripted(model, ids)
    return model


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS[:2])
def test_a_stream_tells_what_generate_gives(name, text):
    pieces = list(writing(text, name).stream(TASK, text="q", max_tokens=200))
    assert "".join(p.text for p in pieces) == text
    assert pieces[-1].prediction is not None
    assert pieces[-1].prediction.value == text == writing(text, name).generate(TASK, text="q", max_tokens=200).value
    assert [p.prediction for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert len(pieces) >= 3  # told while it was written


@pytest.mark.parametrize(
    ("stop", "value", "ended"),
    [
        ("two", "one ", "stop string"),
        (("three", "thr"), "one two ", "stop string"),
        ("e", "on", "stop string"),
        ("one", "", "stop string"),
        ("four", "one two three", "stop"),
        ("threes", "one two three", "stop"),
        (("x", " two"), "one", "stop string"),
    ],
)
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_stop_strings_of_generate(name, stop, value, ended):
    answer = writing("one two three", name).generate(TASK, text="q", stop=stop)
    assert (answer.value, answer.ended, answer.complete) == (value, ended, True)
    pieces = list(writing("one two three", name).stream(TASK, text="q", stop=stop))
    assert "".join(p.text for p in pieces) == value


def test_a_stop_string_that_never_comes_leaves_max_tokens_to_end_it():
    answer = writing("one two three").generate(TASK, text="q", stop="twx", max_tokens=6)
    assert (answer.value, answer.ended, answer.complete) == ("one tw", "max_tokens", False)
    pieces = list(writing("one two three").stream(TASK, text="q", stop="twx", max_tokens=6))
    assert [p.text for p in pieces] == ["o", "n", "e", " ", "tw"]  # held back, and told at the end


def test_a_begin_is_told_first_and_may_share_a_stop_string_but_not_hold_one():
    model = writing("ree")
    pieces = list(model.stream(TASK, text="q", begin="one th"))
    assert pieces[0].text.startswith("one th")
    assert "".join(p.text for p in pieces) == "one three"
    answer = writing("ree").generate(TASK, text="q", begin="one th", stop="three")
    assert (answer.value, answer.ended) == ("one ", "stop string")
    with pytest.raises(ConfigError, match=r"sample 0 of task 'text -> text': begin already holds one of stop=\('n',\)"):
        writing("ree").generate(TASK, text="q", begin="one th", stop="n")


def test_beams_tell_their_text_at_the_end(lively):
    model = lively(mm.Model({"text": TextBytes()}, mm.Core(width=16, depth=1, heads=2), [TASK]))
    pieces = list(model.stream(TASK, text="q", beams=3, max_tokens=4))
    assert pieces[-1].prediction is not None
    assert "".join(p.text for p in pieces) == pieces[-1].prediction.value != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ""}, "generate: a stop string is empty"),
        ({"stop": ("a", "")}, "generate: a stop string is empty"),
        ({"stop": "a", "beams": 2}, r"generate: beams=2 with stop=\('a',\); use one of them"),
    ],
    ids=str,
)
def test_bad_stop_strings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        writing("a").generate(TASK, text="q", **options)


def byte_fallback() -> TextBPE:
    """A tokenizer like Llama's: letters of a small alphabet, bytes for all others, and blanks as a letter."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {c: 256 + i for i, c in enumerate("abc▁")}
    hf = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hf.decoder = decoders.Sequence(parts)
    return TextBPE(hf.to_str())


@pytest.mark.parametrize("text", ["ab😀a", "a€b", "日本語", "日本語" * 12 + "abc 日本", "a b", "😀😀"])
def test_characters_that_a_decoder_holds_back_by_runs_of_bytes(text):
    tokenizer = byte_fallback()
    letters = {c: 256 + i for i, c in enumerate("abc ")}
    ids = [i for c in text for i in ([letters[c]] if c in letters else c.encode())]
    detokenizer = Detokenizer(tokenizer, ())
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == text
    stopping = Detokenizer(tokenizer, (text[-1],))
    pushed = "".join(stopping.push([i]) for i in ids)
    assert stopping.stopped
    assert pushed == text[: text.index(text[-1])]

"""Text as UTF-8 bytes (no files, the default), or as byte-pair encoding with Hugging Face's tokenizers."""

import json
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn

from multimodal.files import write_atomic
from multimodal.old_names import warn
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens, describe

BYTES = 256


def _checked(value: Any, who: str) -> str:
    if not isinstance(value, str):
        raise MediaError(f"{who}.encode: wanted text (str), not {describe(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MediaError(
            f"{who}.encode: {describe(value)} is not valid Unicode: a lone surrogate at {error.start}"
        ) from error
    return value


@dataclass(frozen=True)
class TextBytes(Tokenizer):
    """UTF-8 bytes: any text of any language, exactly, with a vocabulary of 256.

    causal: whether a token that is read attends only to earlier ones.
    scale: factor of the embedded vectors.
    """

    causal: bool = False
    scale: float = 1.0
    vocab_size = BYTES
    text = True

    def encode(self, value: Any) -> Tokens:
        ids = list(_checked(value, "TextBytes").encode("utf-8"))
        return Tokens(torch.tensor(ids, dtype=torch.long), self.places(len(ids)))

    def decode(self, tokens: Tokens) -> str:
        return bytes(tokens.content.tolist()).decode("utf-8", errors="replace")

    def embed(self, width: int) -> nn.Module:
        return Table(BYTES, width, self.scale)


@dataclass(frozen=True)
class TextBPE(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained, saved and loaded as a `tokenizer.json`.

    Make one with `TextBPE.train(texts, vocab_size=8192)` or `TextBPE.open("tokenizer.json")`. Whatever the
    file says, no part of a text is a special token (unless `specials`), nothing is cut off, and encoding is deterministic.

    spec: the content of tokenizer.json.
    causal: whether a token that is read attends only to earlier ones.
    lossy: whether texts may be changed or lose characters; if not, such a text is refused.
    template: whether the tokens that the file puts around a text are added, such as [CLS] and [SEP]; `decode` drops them. A text
        that is written token by token has none of them, since it has its own start and stop.
    pad_to: the number of tokens of every text, filled up with padding that is read like the rest; a longer text is refused.
    pad_id: the id of padding; None: the one that the file names.
    scale: factor of the embedded vectors; the table of weights is without it.
    ids: number of ids, at least those of the file, since some models have a larger table; None: those of the file.
    specials: whether "<|im_end|>" in a text is the file's token of this name, as the prompt of a chat needs it. Then whoever
        writes a text can write such tokens; by default they are read as the characters they consist of.
    """

    spec: str = field(repr=False)
    causal: bool = False
    lossy: bool = False
    template: bool = False
    pad_to: int | None = None
    pad_id: int | None = None
    scale: float = 1.0
    ids: int | None = None
    specials: bool = False
    text = True

    def __post_init__(self) -> None:
        own = _hf_from(self.spec)[1]  # raises now, not at the first text
        if self.ids is not None and self.ids < own:
            raise ConfigError(f"TextBPE: ids={self.ids}, but this tokenizer.json has {own}; give at least as many")
        if self.template and not any(_template(self.spec)):
            raise ConfigError("TextBPE: template=True, but this tokenizer.json adds nothing to a text; take it off")
        if self.pad_to is None:
            if self.pad_id is not None:
                raise ConfigError(f"TextBPE: pad_id={self.pad_id} without pad_to; give the number of tokens too")
            return
        if type(self.pad_to) is not int or self.pad_to < 1:
            raise ConfigError(f"TextBPE: pad_to={self.pad_to!r} must be a number of tokens, or None")
        if self.causal:
            raise ConfigError(
                f"TextBPE: pad_to={self.pad_to} with causal=True: no earlier token reads padding; leave it out"
            )
        pad = self._padding
        if type(pad) is not int or not 0 <= pad < self.vocab_size:
            raise ConfigError(
                f"TextBPE: pad_id={pad} of pad_to={self.pad_to} is no id of 0..{self.vocab_size - 1}; give that of padding"
            )

    @property
    def vocab_size(self) -> int:
        return _hf_from(self.spec)[1] if self.ids is None else self.ids

    @property
    def length(self) -> int | None:
        return self.pad_to

    @property
    def written(self) -> Tokenizer:
        return replace(self, template=False) if self.template and self.pad_to is None else self

    @property
    def _hf(self) -> HFTokenizer:
        return _hf_from(self.spec, self.specials)[0]

    @property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids before and after those of a text."""
        return _template(self.spec) if self.template else ([], [])

    @property
    def _padding(self) -> int | None:
        if self.pad_to is None or self.pad_id is not None:
            return self.pad_id
        return (json.loads(self.spec).get("padding") or {}).get("pad_id")

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, words: str | None = None, causal: bool = False) -> Self:
        r"""Learn merges from texts; the same texts give the same pieces.

        words: a regular expression whose matches are the words that no piece reaches beyond; None: GPT-2's, where letters, digits
        and punctuation never share a piece. r"\s?\S+|\s" ends words at white space only.
        """
        if vocab_size < 256:
            raise ConfigError(f"TextBPE.train: vocab_size={vocab_size} is less than the 256 bytes it starts from")
        if isinstance(texts, str):
            raise ConfigError("TextBPE.train: texts is one text; give a list of texts")
        hf = HFTokenizer(models.BPE())
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
        if words is not None:
            split = pre_tokenizers.Split(_regex(words), "isolated")
            in_bytes = pre_tokenizers.Sequence([split, in_bytes])
        hf.pre_tokenizer = in_bytes
        hf.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        with _no_panics("TextBPE.train: these texts"):
            hf.train_from_iterator(
                texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
            )
        return cls(hf.to_str(), causal)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        causal: bool = False,
        lossy: bool = False,
        template: bool = False,
        pad_to: int | None = None,
        pad_id: int | None = None,
        scale: float = 1.0,
    ) -> Self:
        """Read any tokenizer.json, and try it on texts of many scripts. The settings are those of the class.

        lossy: accept a file that changes texts or loses characters, such as one without an unknown token or with one for many. What
        the file's own normaliser does to case and Unicode forms counts as no change. BPE dropout is switched off with a warning.

        Raises:
            ConfigError: no tokenizer.json; or it changes texts, with examples, and `lossy` was not given.
        """
        path = Path(path)
        if not path.is_file():
            raise MediaError(f"TextBPE.open: there is no file {str(path)!r}")
        try:
            opened = cls(path.read_text(encoding="utf-8"), causal, lossy, template, pad_to, pad_id, scale)
        except ValueError as error:
            raise ConfigError(f"TextBPE.open: cannot read {str(path)!r}: {error}") from error
        if dropout := _dropout(opened.spec):
            warnings.warn(
                f"TextBPE.open: {str(path)!r} has a BPE dropout of {dropout:g}; it is switched off, so that a text always gives "
                "the same tokens",
                stacklevel=2,
            )
        if not lossy and (changed := _changed(opened.spec)):
            text, back = next(iter(changed.items()))
            lost = sorted({c for t, b in changed.items() for c in t if c not in b and not c.isspace()})
            shown = f"; it loses {' '.join(lost[:40])}{' ..' if len(lost) > 40 else ''}" if lost else ""
            raise ConfigError(
                f"TextBPE.open: {str(path)!r} changes {len(changed)} of {len(PROBES)} texts, such as {text!r} into {back!r}"
                f"{shown}; take another file, or open it with lossy=True if that does not matter"
            )
        return opened

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        write_atomic(Path(path), self.spec)

    def write(self, value: Any, path: str | Path | None = None) -> Path:
        if path is not None:
            return super().write(value, path)
        warn("TextBPE.write(path)", "TextBPE.save(path)", 1)
        self.save(value)
        return Path(value)

    @property
    def writes_files(self) -> bool:
        return False  # texts are written as any others

    def encode(self, value: Any) -> Tokens:
        with _no_panics(f"TextBPE.encode: {describe(value)}"):
            ids = self._hf.encode(_checked(value, "TextBPE"), add_special_tokens=False).ids
        ids = self._framed(ids, value) if ids else ids
        # padding may be the id of a piece of text, which would then be lost at the end of a text
        if not self.lossy and not (_is_exact(self.spec) and self.pad_to is None):
            back = self._text(ids)
            if not _same(self._hf, value, back):
                raise MediaError(
                    f"TextBPE.encode: {describe(value)} would lose {describe(_lost(value, back))}, for which this tokenizer.json "
                    f"has no tokens: it comes back as {describe(back)}; open the file with lossy=True if that does not matter"
                )
        return Tokens(torch.tensor(ids, dtype=torch.long), self.places(len(ids)))

    def _framed(self, ids: list[int], value: str) -> list[int]:
        """The ids of a text with the template's around them and padding behind."""
        before, after = self._around
        ids = [*before, *ids, *after]
        if self.pad_to is None:
            return ids
        if len(ids) > self.pad_to:
            raise MediaError(
                f"TextBPE.encode: {describe(value)} gives {len(ids)} tokens, more than pad_to={self.pad_to}; shorten it first"
            )
        return ids + [self._padding or 0] * (self.pad_to - len(ids))

    def decode(self, tokens: Tokens) -> str:
        return self._text(tokens.content.tolist())

    def _text(self, ids: list[int]) -> str:
        before, after = self._around
        if self.pad_to is not None:
            while ids and ids[-1] == self._padding:
                ids = ids[:-1]
        if before and ids[: len(before)] == before:
            ids = ids[len(before) :]
        if after and ids[-len(after) :] == after:
            ids = ids[: -len(after)]
        with _no_panics("TextBPE.decode: these tokens"):
            return self._hf.decode(ids, skip_special_tokens=False)

    def token_names(self, tokens: Tokens) -> list[str]:
        before, after = self._around
        added = {*before, *after, self._padding}
        names = zip(tokens.content.tolist(), super().token_names(tokens), strict=True)
        return [(self._hf.id_to_token(i) or name) if i in added else name for i, name in names]

    def embed(self, width: int) -> nn.Module:
        return Table(self.vocab_size, width, self.scale)

    def wanted(self, value: str) -> str:
        back = self.decode(self(value, empty=True))
        return back if _same(self._hf, value, back) else value

    def config(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spec"}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.spec.encode("utf-8")}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        if "tokenizer.json" not in (files or {}):
            raise CheckpointError("TextBPE: its file tokenizer.json is missing")
        assert files is not None
        spec = files["tokenizer.json"].decode("utf-8")
        if "lossy" not in config:  # a checkpoint from before this setting keeps its behaviour
            config = {**config, "lossy": bool(_changed(spec))}
        return cls(spec, **config)


class Table(nn.Embedding):
    """A table of vectors; `scale` multiplies what is looked up, and not `weight`, which a head may share."""

    def __init__(self, count: int, width: int, scale: float) -> None:
        super().__init__(count, width)
        nn.init.normal_(self.weight, std=0.02)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        found_ND = super().forward(input)
        # rounded to the precision of the weights first, as models do that were trained with it
        return found_ND if self.scale == 1.0 else found_ND * self.weight.new_full((), self.scale)


@contextmanager
def _no_panics(what: str) -> Iterator[None]:
    """Turns panics of the Rust library (of a regular expression, say), which are no Exceptions, into MediaErrors.

    Raises:
        MediaError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 offers no class to import
            raise
        message = " ".join(str(error).split())[:300]
        raise MediaError(f"{what}: the tokenizer gives up ({message}); its rules do not work for this") from error


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"TextBPE.train: words={pattern!r} is no regular expression: {error}") from error


@lru_cache(maxsize=16)
def _hf_from(spec: str, specials: bool = False) -> tuple[HFTokenizer, int]:
    """The library's tokenizer, and the number of its ids (a file may skip some)."""
    try:
        with _no_panics("TextBPE"):
            hf = HFTokenizer.from_str(spec)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"TextBPE: this is no tokenizer.json: {str(error)[:500]}") from error
    if getattr(hf.model, "dropout", None):
        hf.model.dropout = None  # encoding is the same for the same text
    hf.encode_special_tokens = not specials  # "<eos>" in a text is five characters; the file has no such setting
    hf.no_truncation()  # a text is never cut in silence
    hf.no_padding()
    return hf, max(hf.get_vocab().values(), default=-1) + 1


@lru_cache(maxsize=16)
def _template(spec: str) -> tuple[list[int], list[int]]:
    """The ids that the file's post-processor puts before and after those of a text.

    Raises:
        ConfigError: it does something else with them.
    """
    hf = _hf_from(spec)[0]
    for text in PROBES:
        with _no_panics("TextBPE"):
            plain, framed = hf.encode(text, add_special_tokens=False).ids, hf.encode(text)
        if plain:
            start = framed.special_tokens_mask.index(0) if 0 in framed.special_tokens_mask else 0
            before, after = framed.ids[:start], framed.ids[start + len(plain) :]
            if framed.ids == [*before, *plain, *after]:
                return before, after
            break
    raise ConfigError("TextBPE: template=True, but what this tokenizer.json adds does not stand around the text")


PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "AbC dEf GHI",
    "0123456789 3.14 -7 1,000",
    "a  b   c",
    " before and after ",
    "one\ntwo\n\nthree\tfour",
    "(a) [b] {c} <d> \"e\" 'f' a/b a\\b #h @i $5 50% x_y x-y x=y ~ ` ^ * + & | ; : ! ? . ,",
    "ÄÖÜ äöü ß Éé Ññ Øø Łł Çç Ğğ",
    "Ελληνικά",
    "Русский Українська",
    "עברית",
    "العربية",
    "हिन्दी",
    "বাংলা தமிழ்",
    "ไทย",
    "ქართული Հայերեն አማርኛ",
    "hug 日本 pug",
    "ひらがな カタカナ 漢字",
    "中文，简体和繁體。",
    "한국어",
    "e\u0301 n\u0303 o\u0308",
    "€ £ ¥ © ° ½ → ∑ “quoted” – …",
    "🙂 👩\u200d🚀 🇩🇪 👍🏽",
    "<s> </s> <eos> <unk> [UNK] [CLS] <|endoftext|>",
)
"""Texts that every opened tokenizer.json is tried on: scripts, white space, digits, marks, and text like special tokens."""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _same(hf: HFTokenizer, text: str, back: str) -> bool:
    """Whether decoding restored a text: exactly, or up to case and Unicode forms if the file declares a normaliser."""
    return back == text or (hf.normalizer is not None and _folded(back) == _folded(text))


def _lost(text: str, back: str) -> str:
    """The part of a text that decoding did not restore, without the equal beginning and end."""
    start = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    ends = zip(text[start:][::-1], back[start:][::-1], strict=False)
    most = min(len(text), len(back)) - start
    return text[start : len(text) - next((i for i, (a, b) in enumerate(ends) if a != b), most)]


@lru_cache(maxsize=16)
def _changed(spec: str) -> dict[str, str]:
    """{probe: decoded text} for the probes that decoding does not restore."""
    if twins := _twins(spec):  # which of the two comes back differs from process to process
        return twins
    if _is_exact(spec):
        return {}
    hf = _hf_from(spec)[0]
    with _no_panics("TextBPE"):
        backs = {
            text: hf.decode(hf.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) for text in PROBES
        }
    return {text: back for text, back in backs.items() if not _same(hf, text, back)}


def _twins(spec: str) -> dict[str, str]:
    """{piece: other} of two pieces with one id, of which a text would lose one; empty if there are none."""
    vocabulary = (json.loads(spec).get("model") or {}).get("vocab")
    piece_of: dict[int, str] = {}
    for piece, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if number in piece_of:
            return {piece: piece_of[number]}
        piece_of[number] = piece
    return {}


@lru_cache(maxsize=16)
def _is_exact(spec: str) -> bool:
    """Whether the file restores any text by construction, as ours do: byte-level, with a token for each byte."""
    made = json.loads(spec)
    steps = made.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    model, decoder = made.get("model") or {}, made.get("decoder") or {}
    return (
        made.get("normalizer") is None
        and not made.get("added_tokens")
        and model.get("type") == "BPE"
        and not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
        and decoder.get("type") == "ByteLevel"
        and len(steps) > 0
        and steps[-1].get("type") == "ByteLevel"
        and not steps[-1].get("add_prefix_space")
        and all(step.get("type") == "Split" and step.get("behavior") == "Isolated" for step in steps[:-1])
        and set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab := model.get("vocab", {}))
        and len(set(vocab.values())) == len(vocab)  # two pieces of one id would come back as one of them
    )


def _dropout(spec: str) -> float:
    """The BPE dropout of the file: the share of merges that are skipped at random."""
    return (json.loads(spec).get("model") or {}).get("dropout") or 0.0

"""Text as UTF-8 bytes (no files, the default) and as byte-pair pieces on Hugging Face's tokenizers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from multimodal.files import put
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens, at_times, describe


def _checked(value: Any, who: str) -> str:
    if not isinstance(value, str):
        raise MediaError(f"{who}.encode: wanted text (str), not {describe(value)}")
    if not value:
        raise MediaError(f"{who}.encode: the text is empty; to leave a field out of a sample, give None")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MediaError(
            f"{who}.encode: {describe(value)} is not valid Unicode: a lone surrogate at {error.start}"
        ) from error
    return value


def _tokens(ids: list[int]) -> Tokens:
    return Tokens(torch.tensor(ids), at_times(torch.arange(len(ids), dtype=torch.float32)))


@dataclass(frozen=True)
class TextBytes(Tokenizer):
    """UTF-8 bytes: any text of any language, exactly, with a vocabulary of 256."""

    causal: bool = False
    vocab_size = 256
    text = True

    def encode(self, value: Any) -> Tokens:
        return _tokens(list(_checked(value, "TextBytes").encode("utf-8")))

    def decode(self, tokens: Tokens) -> str:
        return bytes(tokens.content.tolist()).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class TextBPE(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained, saved and loaded as a `tokenizer.json`.

    Make one with `TextBPE.train(texts, vocab_size=8192)` or `TextBPE.open("tokenizer.json")`. Nothing in a text is taken
    for a special token.
    """

    spec: str = field(repr=False)  # the whole text of tokenizer.json
    causal: bool = False
    text = True

    def __post_init__(self) -> None:
        _hf_from(self.spec)  # complain now, not at the first text

    @property
    def vocab_size(self) -> int:
        return _hf_from(self.spec)[1]

    @property
    def _hf(self) -> HFTokenizer:
        return _hf_from(self.spec)[0]

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
        hf.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        )
        return cls(hf.to_str(), causal)

    @classmethod
    def open(cls, path: str | Path, *, causal: bool = False) -> Self:
        """Read a tokenizer.json, ours or anybody's."""
        path = Path(path)
        if not path.is_file():
            raise MediaError(f"TextBPE.open: there is no file {str(path)!r}")
        try:
            return cls(path.read_text(encoding="utf-8"), causal)
        except ValueError as error:
            raise ConfigError(f"TextBPE.open: cannot read {str(path)!r}: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        put(Path(path), self.spec)

    def encode(self, value: Any) -> Tokens:
        return _tokens(self._hf.encode(_checked(value, "TextBPE"), add_special_tokens=False).ids)

    def decode(self, tokens: Tokens) -> str:
        return self._hf.decode(tokens.content.tolist(), skip_special_tokens=False)

    def config(self) -> dict[str, Any]:
        return {"causal": self.causal}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.spec.encode("utf-8")}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        if "tokenizer.json" not in (files or {}):
            raise CheckpointError("TextBPE: its file tokenizer.json is missing")
        assert files is not None
        return cls(files["tokenizer.json"].decode("utf-8"), **config)


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"TextBPE.train: words={pattern!r} is no regular expression: {error}") from error


@lru_cache(maxsize=16)
def _hf_from(spec: str) -> tuple[HFTokenizer, int]:
    """The library's tokenizer, and how many ids it needs (files of other makers may skip some)."""
    try:
        hf = HFTokenizer.from_str(spec)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"TextBPE: this is no tokenizer.json: {error}") from error
    hf.encode_special_tokens = True  # "<eos>" in a text is five characters; the file does not keep this setting
    hf.no_truncation()  # a text is never cut in silence
    hf.no_padding()
    return hf, max(hf.get_vocab().values(), default=-1) + 1

"""The tokenizers of trained text models."""

from collections.abc import Mapping
from typing import Any

from multimodal.pretrained.family import Settings
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import Ids, TextBPE

TOKENIZER = "tokenizer.json"


def text_tokenizer(settings: Settings, files: Mapping[str, bytes], *, causal: bool = True, **options: Any) -> Tokenizer:
    """The tokenizer of tokenizer.json, with as many ids as the model has; without that file, one whose values are lists of ids."""
    vocab = settings.need("vocab_size")
    if TOKENIZER not in files:
        return Ids(vocab, causal, **{name: options[name] for name in ("scale",) if name in options})
    spec = files[TOKENIZER].decode("utf-8")
    return TextBPE(spec, causal=causal, lossy=True, ids=vocab, **options)

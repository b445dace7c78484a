"""What text families share: tokenizers, and the heads of text encoders."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from multimodal.heads import EachRow
from multimodal.heads.pool import Transformed
from multimodal.pretrained.family import Pair, Settings, same
from multimodal.shapes import CheckpointError
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import Ids, TextBPE

TOKENIZER = "tokenizer.json"


def adds_tokens(files: Mapping[str, bytes]) -> bool:
    """Whether tokenizer.json adds special tokens to a text, such as one at its beginning."""
    return (
        TOKENIZER in files
        and HFTokenizer.from_str(files[TOKENIZER].decode("utf-8")).num_special_tokens_to_add(is_pair=False) > 0
    )


def text_tokenizer(settings: Settings, files: Mapping[str, bytes], *, causal: bool = True, **options: Any) -> Tokenizer:
    """The tokenizer in tokenizer.json, with the vocabulary size of the model; without that file, `Ids`."""
    vocab = settings.need("vocab_size")
    if TOKENIZER not in files:
        return Ids(vocab, causal, **{name: options[name] for name in ("scale",) if name in options})
    spec = files[TOKENIZER].decode("utf-8")
    return TextBPE(spec, causal=causal, lossy=True, ids=vocab, **options)


def check_head(settings: Settings, *, tied: bool, bare: bool) -> None:
    """Raise a CheckpointError if a model that generates text was saved without its head, and the head is not tied to the embedding.

    bare: whether it was saved without its head.
    """
    if bare and not tied:
        raise CheckpointError(
            f"{settings.where}: it was saved without its head, and tie_word_embeddings=False says that the embedding table is not "
            "the head, so it cannot generate text; save the model with its head"
        )


def transformed_pairs(transform: Transformed, ours: str, dense: str, norm: str) -> list[Pair]:
    """The pairs of a linear layer and of the norm after it, if declared. dense, norm: their names of both."""
    found = [same(f"{ours}.dense.linear.{part}", f"{dense}.{part}") for part in ("weight", "bias")]
    found = found if transform.bias else found[:1]
    if transform.last_norm is not None:
        parts = ("weight", "bias") if transform.last_norm.bias else ("weight",)
        found += [same(f"{ours}.last_norm.{part}", f"{norm}.{part}") for part in parts]
    return found


def mlm_head_pairs(head: EachRow, dense: str, norm: str, weight: str, bias: str) -> list[Pair]:
    """The pairs of the masked-language-modelling head of "text -> text". weight, bias: their names of its last linear layer."""
    ours = "readouts.text_EachRow"
    assert head.transform is not None
    found = transformed_pairs(head.transform, f"{ours}.pool", dense, norm)
    found += [same(f"{ours}.linear.bias", bias)] if head.bias else []
    return found if head.tied else [*found, same(f"{ours}.linear.weight", weight)]

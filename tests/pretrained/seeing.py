"""What the tests of vision-language models share: pictures, and logits of answers about them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.pretrained import Pretrained
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal.tower import Tower
from multimodal_tokenizers import ClassTokens, ImagePatches, TextBPE

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 2,
}
TEXT = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLACEHOLDER = 70  # the id of their prompts that stands for a token of a picture


def pixels(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A normalised picture (3, rows, columns), as their models read it."""
    return torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image_tokens(loaded: Pretrained, pixels_CYX: Tensor) -> Tokens:
    """The tokens of a normalised picture at its own size."""
    return unfitted(loaded.tokenizers["image"])(pixels_CYX / 2 + 0.5)


def unfitted(tower: Tokenizer, mean: float = 0.5, std: float = 0.5) -> Tower:
    """The tower for pictures of any size."""
    assert isinstance(tower, Tower)
    inner = tower.tokenizer
    assert isinstance(inner, ClassTokens)
    assert isinstance(inner.of, ImagePatches)
    return replace(tower, tokenizer=replace(inner, of=replace(inner.of, fit=None, mean=mean, std=std)))


def check_pixels(tower: Tokenizer, value: Any, wanted_CYX: Tensor) -> None:
    """The tower reads a picture of 16 x 16 pixels, in patches of 2, as these numbers."""
    assert isinstance(tower, Tower)
    found_NF = tower.inner_tokens(tower(value)).content
    wanted_NF = wanted_CYX.unflatten(1, (8, 2)).unflatten(3, (8, 2)).permute(1, 3, 0, 2, 4).reshape(64, 12)
    torch.testing.assert_close(found_NF, wanted_NF, rtol=0, atol=1e-6)


def answer_logits(logits_TV: Tensor, answer: Sequence[int]) -> Tensor:
    """Of the logits of a whole sample, those of what is written: from the last token that was read on."""
    return logits_TV[-len(answer) - 1 :]


def levels(*size: int, seed: int = 0) -> Any:
    """A picture of 8-bit levels (rows, columns, 3), smooth as photographs are."""
    rows, columns = torch.meshgrid(torch.linspace(0, 9, size[0]), torch.linspace(0, 7, size[1]), indexing="ij")
    noise = torch.rand(*size, 3, generator=torch.Generator().manual_seed(seed)) * 60
    picture = torch.stack([rows.sin() * 90 + 90, columns.cos() * 90 + 90, (rows + columns).sin() * 90 + 90], -1) + noise
    return picture.clamp(0, 255).to(torch.uint8).numpy()


def text_tokenizer(*specials: str) -> Any:
    """A small tokenizer of transformers with these special tokens, of which the first pads and the second ends."""
    from tokenizers import Tokenizer

    transformers = pytest.importorskip("transformers")
    hf = Tokenizer.from_str(TextBPE.train(["where is the cat", "what is the dog"] * 9, vocab_size=300).spec)
    hf.add_special_tokens(list(specials))
    named = {"bos_token": "<bos>"} if "<bos>" in specials else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=hf, pad_token=specials[0], eos_token=specials[1], **named
    )

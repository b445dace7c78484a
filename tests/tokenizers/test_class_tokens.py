"""Learned tokens before others, and learned positions that are resized to the grid of each value."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal.check import tokenizer_checks
from multimodal.declare import declaration, rebuild
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Places
from multimodal_tokenizers import ClassTokens, ImagePatches, Labels, SpectrogramPatches, TextBytes, WhisperFrames

PATCHES = ImagePatches(patch=4, channels=1, position="rotary")
PICTURES = [
    torch.rand(1, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate([(8, 12), (16, 8)])
]
CASES: list[ClassTokens] = [
    ClassTokens(PATCHES),
    ClassTokens(PATCHES, 2, 1, (2, 2), "antialiased"),
    ClassTokens(PATCHES, 3, turns=1.0),
    ClassTokens(PATCHES, 0, table=(3, 2), resample="bilinear"),
    ClassTokens(PATCHES, 0, table=(2, 3), resample="nearest"),
    ClassTokens(ImagePatches(patch=4, channels=1), 2, 2),
]


@pytest.mark.parametrize("check", [c for case in CASES for c in tokenizer_checks(case, PICTURES)], ids=str)
def test_promises(check: Any) -> None:
    check()


def rows(tokenizer: ClassTokens, values: list[Tensor], width: int = 8) -> tuple[Any, Tensor]:
    module = tokenizer.embed(width)
    tokens = [tokenizer(value) for value in values]
    return module, module(torch.cat([t.content for t in tokens]), Places.of(tokens, tokenizer.step))


def test_rows_are_the_formula() -> None:
    tokenizer = ClassTokens(PATCHES, 2, 1, (2, 3))
    module, found = rows(tokenizer, PICTURES)
    parts = []
    for picture in PICTURES:
        grid = tuple(side // 4 for side in picture.shape[1:])
        table = module.positions_ND[1:].reshape(1, 2, 3, 8).permute(0, 3, 1, 2)
        table = F.interpolate(table, grid, mode="bicubic") if grid != (2, 3) else table
        places = table.permute(0, 2, 3, 1).reshape(-1, 8)
        first = module.tokens_ND + torch.stack([module.positions_ND[0], torch.zeros(8)])
        parts += [first, module.of(PATCHES(picture).content) + places]
    torch.testing.assert_close(found, torch.cat(parts), atol=1e-6, rtol=0)
    # the second picture has another grid, so that the table was resized; and the ways to do it differ
    other, again = rows(ClassTokens(PATCHES, 2, 1, (2, 3), "antialiased"), PICTURES)
    other.load_state_dict(module.state_dict())
    tokens = [tokenizer(value) for value in PICTURES]
    again = other(torch.cat([t.content for t in tokens]), Places.of(tokens, tokenizer.step))
    assert (again - found)[:8].abs().max() < 1e-6 < 1e-4 < (again - found).abs().max()


def test_places_of_learned_tokens_and_turns() -> None:
    tokens = ClassTokens(PATCHES, 2, turns=0.5)(PICTURES[0])
    third = torch.pi / 3 * 2
    wanted = [[0, 0, 0], [1, 0, 0]] + [[2, y, x] for y in (-torch.pi / 2, torch.pi / 2) for x in (-third, 0.0, third)]
    torch.testing.assert_close(tokens.position_NA, torch.tensor(wanted))
    plain = ClassTokens(PATCHES, 1)(PICTURES[0])
    assert plain.position_NA[1:].tolist() == (PATCHES(PICTURES[0]).position_NA + torch.tensor([1.0, 0, 0])).tolist()
    assert not plain.content[0].any()
    assert torch.equal(plain.content[1:], PATCHES(PICTURES[0]).content)
    assert ClassTokens(PATCHES).token_names(plain)[:2] == ["class token", "row 0, column 0"]


def test_sound_and_text_may_have_learned_tokens_too() -> None:
    sound = SpectrogramPatches(frames=66, mels=36, cut=True)
    tokenizer = ClassTokens(sound, 2, 2, sound.grid)
    wave = torch.randn(16000, generator=torch.Generator().manual_seed(0)).numpy()
    module, found = rows(tokenizer, [(wave, 16000)])  # type: ignore[list-item]
    assert sound.grid == (3, 6)
    patches = module.of(sound((wave, 16000)).content)
    wanted = torch.cat([module.tokens_ND, patches]) + module.positions_ND
    assert wanted.shape == (20, 8)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    text = ClassTokens(TextBytes())
    assert text("ab").content.tolist() == [0, *TextBytes()("ab").content.tolist()]
    model = mm.Model({"text": text, "label": Labels(("a", "b"))}, mm.Core.tiny(), ["text -> label"])
    stream = model.pack("text -> label", [{"text": "ab"}], answers=False)
    embed: Any = model.embeds["text"]
    wanted = torch.cat([embed.tokens_ND, embed.of(TextBytes()("ab").content)])
    read: list[Tensor] = []
    with torch.inference_mode():
        hook = model.core.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        model.logits(stream)
        hook.remove()
    torch.testing.assert_close(read[0][:3], wanted)


def test_declaration_and_errors() -> None:
    for case in CASES:
        assert rebuild(json.loads(json.dumps(declaration(case)))) == case
    for settings, message in (
        ({"of": 3}, r"of is 3, not a Tokenizer"),
        ({"of": Labels(("a",))}, r"of=Labels has classes or files"),
        ({"of": PATCHES, "placed": 2}, r"placed=2 is more than count=1"),
        ({"of": PATCHES, "count": -1}, r"count=-1 must be a whole number, 0 or more"),
        ({"of": PATCHES, "table": (0, 2)}, r"table=\(0, 2\) is not rows and columns"),
        ({"of": PATCHES, "resample": "cubic"}, r"resample='cubic' must be one of bicubic, antialiased, bilinear"),
        ({"of": PATCHES, "turns": 1.0, "table": (2, 2)}, r"turns=1.0 must be above 0, and needs table=None"),
    ):
        with pytest.raises(ConfigError, match=f"^ClassTokens: {message}"):
            ClassTokens(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the embedding of WhisperFrames depends on places"):
        ClassTokens(WhisperFrames()).embed(8)
    with pytest.raises(ConfigError, match=r"can be read but not written"):
        ClassTokens(PATCHES).places(1)
    with pytest.raises(MediaError, match=r"^ClassTokens.encode: ImagePatches.encode: image is 2x2 pixels"):
        ClassTokens(PATCHES)(torch.zeros(1, 2, 2))


def test_the_nearest_cell_of_the_table_is_that_of_idefics() -> None:
    """Compared with fractions of whole numbers where float32 is exact, and with its rounding where it is not."""
    for have, rows, columns in ((4, 8, 2), (8, 8, 4), (8, 2, 16)):
        tokenizer = ClassTokens(PATCHES, 0, table=(have, have), resample="nearest")
        module: Any = tokenizer.embed(6)
        tokens = tokenizer(torch.rand(1, 4 * rows, 4 * columns))
        found = module(tokens.content, Places.of([tokens], tokenizer.step)) - module.of(tokens.content)
        cells = [i * have // rows * have + j * have // columns for i in range(rows) for j in range(columns)]
        torch.testing.assert_close(found, module.positions_ND[cells], rtol=0, atol=1e-6)
    # 12 / 19 as a multiple of 1 / 19 lies below the edge of cell 12
    tokenizer = ClassTokens(PATCHES, 0, table=(19, 19), resample="nearest")
    module = tokenizer.embed(6)
    tokens = tokenizer(torch.rand(1, 76, 76))
    found = module(tokens.content, Places.of([tokens], tokenizer.step)) - module.of(tokens.content)
    rows_of = [i - (i == 12) for i in range(19)]
    cells = [i * 19 + j for i in rows_of for j in rows_of]
    torch.testing.assert_close(found, module.positions_ND[cells], rtol=0, atol=1e-6)

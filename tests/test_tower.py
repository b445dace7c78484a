"""Towers: an inner core as the embedding of a kind; exact in any pack, trained from the start, saved, frozen in part."""

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multimodal as mm
from multimodal.attention import Layout, Span
from multimodal.check import check_tokenizer
from multimodal.heads.pool import Attended, Mean
from multimodal.masks import MaskInfo
from multimodal.tokenizer import Places
from multimodal.tower import Connector, Dropped, Linear, MLPConnector, PixelShuffle, Pooled, Tower, Unchanged
from multimodal_tokenizers import AudioFrames, Ids, ImagePatches, Labels, TextBytes, WhisperFrames

CORE = mm.Core(width=24, depth=2, heads=2)
PATCHES = ImagePatches(patch=2, channels=1, position="rotary")
POOLS = Attended(heads=2, hidden=16)
CONNECTORS: list[Connector] = [
    Linear(),
    MLPConnector(hidden=20, activation="gelu_tanh"),
    PixelShuffle(2),
    PixelShuffle(2, MLPConnector()),
    Dropped(3),
    Dropped(2, PixelShuffle(2)),
    Pooled(30),
    Pooled(30, POOLS, MLPConnector(bias=False)),
]


@dataclass(frozen=True)
class Marked(mm.Tokenizer):
    """Pictures with `count` tokens before their patches, as a class token and registers are."""

    count: int
    feature_size = PATCHES.feature_size
    lossy = True

    def encode(self, value: Any) -> mm.Tokens:
        tokens = PATCHES.encode(value)
        content_NF = torch.cat([torch.arange(self.count * 4).reshape(-1, 4) / 7, tokens.content])
        marks_NA = torch.zeros(self.count, 3)
        marks_NA[:, 0] = torch.arange(self.count)
        position_NA = tokens.position_NA + torch.tensor([self.count, 0, 0])
        return mm.Tokens(content_NF, torch.cat([marks_NA, position_NA]))


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 1), dtype=np.uint8) for size in sizes]


def inner(connector: Connector) -> mm.Tokenizer:
    return Marked(connector.count) if isinstance(connector, Dropped) else PATCHES


def states_alone(tower: Tower, module: Any, value: Any) -> tuple[mm.Tokens, Tensor]:
    """The inner tokens of one value, and the states of the inner core that has read it as a sample of its own."""
    tokens = tower.tokenizer(value)
    n, free = len(tokens), not tower.tokenizer.causal
    zero = torch.zeros(n, dtype=torch.int32)
    layout = Layout((Span(n if free else 0, n, n),), MaskInfo(zero, torch.arange(n).int(), zero + free, zero))
    content = tokens.content
    position_NA = tokens.position_NA / torch.tensor(tower.tokenizer.step)
    some = (content, Places.of([tokens], tower.tokenizer.step)) if hasattr(module.embed, "reads_places") else (content,)
    return tokens, module.core(module.embed(*some), position_NA, layout)


def wanted_rows(tower: Tower, module: Any, value: Any) -> Tensor:
    """The rows of a value, worked out by loops."""
    _, state_TD = states_alone(tower, module.frozen_part, value)
    connector = tower.connector
    if isinstance(connector, Dropped):
        state_TD, connector = state_TD[connector.count :], connector.then
    if isinstance(connector, Pooled):
        pool = connector.pool
        return module.connector(pool.pool(state_TD, [len(state_TD)], module.frozen_part.pool))
    if isinstance(connector, PixelShuffle):
        side, (rows, columns) = connector.side, (x // 2 for x in value.shape[:2])
        at = {(r, c): state_TD[r * columns + c] for r in range(rows) for c in range(columns)}
        squares = [
            torch.cat([at[r + i, c + j] for i in range(side) for j in range(side)])
            for r in range(0, rows, side)
            for c in range(0, columns, side)
        ]
        state_TD = torch.stack(squares)
    return module.connector(state_TD)


@pytest.mark.parametrize("connector", CONNECTORS, ids=str)
def test_rows_are_those_of_the_inner_core_alone_whatever_else_is_in_the_pack(connector: Connector) -> None:
    tower = Tower(inner(connector), CORE, connector)
    module = tower.embed(16)
    with torch.no_grad():
        for weight in module.parameters():
            weight += torch.randn_like(weight) * 0.2
    values = pictures((8, 12), (4, 8), (8, 12), (12, 8))
    tokens = [tower(value) for value in values]
    places = Places.of(tokens, tower.step)
    rows_ND = module(torch.cat([x.content for x in tokens]), places)
    wanted = [wanted_rows(tower, module, value) for value in values]
    assert [len(x) for x in tokens] == [len(x) for x in wanted]
    assert torch.cat(wanted).std() > 0.05
    torch.testing.assert_close(rows_ND, torch.cat(wanted), rtol=0, atol=1e-5)
    alone = torch.cat([module(x.content, Places.of([x], tower.step)) for x in tokens])
    torch.testing.assert_close(alone, rows_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize("connector", CONNECTORS, ids=str)
def test_content_holds_the_inner_tokens(connector: Connector) -> None:
    tower = Tower(inner(connector), CORE, connector)
    (value,) = pictures((8, 4))
    tokens, wanted = tower(value), tower.tokenizer(value)
    assert torch.equal(tower.inner_tokens(tokens).content, wanted.content)
    assert torch.equal(tower.inner_tokens(tokens).position_NA, wanted.position_NA)


def test_time_is_an_index_unless_the_inner_tokens_have_times() -> None:
    tokens = Tower(PATCHES, CORE, PixelShuffle(2))(pictures((8, 12))[0])
    assert tokens.position_NA.tolist() == [[i, i // 3, i % 3] for i in range(6)]
    sound = Tower(AudioFrames(), CORE)
    wave = np.sin(np.arange(4000) / 5).astype(np.float32)
    assert torch.equal(sound((wave, 16000)).position_NA, AudioFrames()((wave, 16000)).position_NA)


KINDS: dict[str, tuple[Tower, list[Any]]] = {
    "linear": (Tower(PATCHES, CORE), pictures((4, 6), (8, 8), (6, 4))),
    "squares": (Tower(PATCHES, CORE, PixelShuffle(2)), pictures((4, 8), (8, 8), (8, 4))),
    "sines": (Tower(ImagePatches(patch=2, channels=1), CORE, PixelShuffle(2)), pictures((4, 8), (8, 8), (8, 4))),
    "dropped": (Tower(Marked(2), CORE, Dropped(2)), pictures((4, 6), (8, 8), (6, 4))),
    "pooled": (Tower(PATCHES, CORE, Pooled(16)), pictures((4, 6), (8, 8), (6, 4))),
    "attended": (Tower(PATCHES, CORE, Pooled(16, POOLS)), pictures((4, 6), (8, 8), (6, 4))),
    "text": (Tower(TextBytes(), CORE, MLPConnector()), ["one tower", "two", "three of them"]),
    "ids": (Tower(Ids(9, causal=True), CORE, Linear(), causal=True), [[1, 2, 3], [8, 0, 0, 4], [7]]),
    "sound": (
        Tower(WhisperFrames(mels=8, pad_seconds=None), CORE),
        [(np.random.default_rng(i).normal(size=900 + 700 * i).astype(np.float32) * 0.1, 16000) for i in range(3)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_conformance(kind: str) -> None:
    tower, values = KINDS[kind]
    check_tokenizer(tower, values)


def test_gradients_reach_the_tower_and_it_learns() -> None:
    shapes = Labels(("dark", "bright"))
    model = mm.Model(
        {"image": Tower(PATCHES, CORE, PixelShuffle(2)), "shade": shapes}, mm.Core.tiny(), ["image -> shade"]
    )
    dark, bright = np.full((8, 8, 1), 20, np.uint8), np.full((8, 4, 1), 230, np.uint8)
    samples = [{"image": dark, "shade": "dark"}, {"image": bright, "shade": "bright"}]
    before = {name: x.clone() for name, x in model.named_parameters()}
    mm.fit(model, {"image -> shade": samples}, steps=20, batch=2, quiet=True)
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    still = [name for name in before if name.startswith("embeds.image") and name not in moved]
    assert still == []
    assert [x.value for x in model.predict("image -> shade", samples)] == ["dark", "bright"]


def base() -> mm.Model:
    """A model of pictures whose core a tower takes."""
    model = mm.Model({"image": PATCHES, "label": Labels(("a", "b"))}, CORE, ["image -> label"], seed=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return model


def test_a_tower_of_a_model_starts_with_its_weights_and_a_checkpoint_has_them(tmp_path: Path) -> None:
    given = base()
    tower = Tower.of(given, PixelShuffle(2), kind="image")
    text = TextBytes(causal=True)
    model = mm.Model({"image": tower, "text": text}, mm.Core.tiny(), ["image -> text"])
    found = model.state_dict()
    for name, x in given.state_dict().items():
        if name.startswith("core."):
            assert torch.equal(found[f"embeds.image.frozen_part.{name}"], x)
        if name.startswith("embeds.image."):
            assert torch.equal(found[name.replace("embeds.image", "embeds.image.frozen_part.embed")], x)
    image = pictures((8, 8))[0]
    answer = model.generate("image -> text", image=image, max_tokens=4, temperature=1.0)
    model.save(tmp_path / "saved")
    assert "weights" not in (tmp_path / "saved" / "config.json").read_text().replace("weights.safetensors", "")
    again = mm.Model.load(tmp_path / "saved")
    assert again.packer.tokenizers == {"image": tower, "text": text}
    assert all(torch.equal(x, found[name]) for name, x in again.state_dict().items())
    assert again.generate("image -> text", image=image, max_tokens=4, temperature=1.0).value == answer.value
    # a language model gets eyes: both parts are trained
    writer = mm.Model({"text": text}, mm.Core.tiny(), ["text -> text"], seed=5)
    seeing = writer.extended({"image": tower}, ["image text -> text"])
    assert all(torch.equal(seeing.state_dict()[name], x) for name, x in writer.state_dict().items())
    of_tower = [name for name in found if name.startswith("embeds.image.frozen_part")]
    assert all(torch.equal(seeing.state_dict()[name], found[name]) for name in of_tower)


def test_two_layers_are_their_formula() -> None:
    for connector, act in (
        (MLPConnector(hidden=20, activation="gelu_tanh"), partial(F.gelu, approximate="tanh")),
        (MLPConnector(bias=False), F.gelu),
    ):
        module: Any = connector.build(24, 16)
        hidden = connector.hidden or 16
        assert [tuple(x.shape) for x in module.parameters() if x.dim() == 2] == [(hidden, 24), (16, hidden)]
        assert (module.up.bias is not None) == connector.bias
        vector_NF = torch.randn(5, 24)
        wanted = F.linear(
            act(F.linear(vector_NF, module.up.weight, module.up.bias)), module.down.weight, module.down.bias
        )
        torch.testing.assert_close(module(vector_NF), wanted)


def test_the_inner_part_computes_what_the_model_computes_that_it_came_from() -> None:
    given, values = base().eval(), pictures((8, 12), (4, 8))
    tower = Tower.of(given, kind="image")
    module: Any = tower.embed(16).eval()
    tokens = [tower(value) for value in values]
    with torch.inference_mode():
        stream = given.pack("image -> label", [{"image": value} for value in values], answers=False)
        spans = [span.total for span in stream.layout.spans]
        by_place = given(stream).split(spans)
        found = module.frozen_part(torch.cat([t.content for t in tokens]), Places.of(tokens, tower.step))
    wanted = sorted((x[: len(x) - 1] for x in by_place), key=len, reverse=True)  # without the learned token of the head
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=0)


def test_the_kind_of_a_tower_is_the_only_one_or_that_of_pictures_or_sounds() -> None:
    text, sound = TextBytes(), AudioFrames()
    several = mm.Model({"text": text, "image": PATCHES}, CORE, ["image -> text"])
    assert Tower.of(several) == Tower.of(several, kind="image")
    alone = mm.Model({"words": TextBytes(causal=True)}, CORE, ["-> words"])
    assert Tower.of(alone).tokenizer == TextBytes(causal=True)
    for kinds in ({"text": text, "words": text}, {"text": text, "image": PATCHES, "audio": sound}):
        with pytest.raises(
            mm.ConfigError, match=f"kind=None is none of its kinds, which are {', '.join(kinds)}; name one"
        ):
            Tower.of(mm.Model(kinds, CORE, ["-> text"]))


def test_weights_do_not_travel_to_data_workers() -> None:
    tower = Tower.of(base(), kind="image")
    assert tower.weights
    assert pickle.loads(pickle.dumps(tower)).weights is None
    assert pickle.loads(pickle.dumps(tower)) == tower


def test_a_changed_tower_has_its_trained_weights_and_its_declaration_has_none() -> None:
    tower = Tower.of(base(), kind="image")
    changed = mm.override(tower, causal=True)
    assert changed.weights is tower.weights
    assert "weights" not in changed.config()
    with pytest.raises(mm.ConfigError, match="its weights do not fit its core"):
        mm.override(tower, core=tower.core.replace(depth=tower.core.depth + 1)).embed(16)


def test_features_may_be_cached_and_the_inner_part_frozen() -> None:
    tower = Tower(PATCHES, CORE, PixelShuffle(2, MLPConnector()))
    module: Any = tower.embed(16)
    tokens = [tower(value) for value in pictures((8, 12), (4, 8))]
    content, places = torch.cat([x.content for x in tokens]), Places.of(tokens, tower.step)
    features_NF = module.frozen_part(content, places)
    assert features_NF.shape == (8, 4 * CORE.width)
    assert torch.equal(module.connector(features_NF), module(content, places))
    assert isinstance(module.connector, nn.Module)


def test_in_half_precision_positions_are_exact() -> None:
    tower = Tower(PATCHES, CORE)
    model = mm.Model({"image": tower, "label": Labels(("a", "b"))}, mm.Core.tiny(), ["image -> label"])
    wide = pictures((4, 1200))[0]
    wanted = model.logits(model.pack("image -> label", [{"image": wide, "label": "a"}]))["image -> label"]
    half = model.to(torch.bfloat16)
    got = half.logits(half.pack("image -> label", [{"image": wide, "label": "a"}]))["image -> label"]
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_unchanged_rows_are_the_states_themselves() -> None:
    model = mm.Model(
        {"image": Tower(PATCHES, CORE, Unchanged()), "label": Labels(("a", "b"))},
        mm.Core(width=CORE.width, depth=0, heads=1, last_norm=False),
        [mm.Task("image -> label", mm.Classify(pool=Mean()))],
    )
    tower: Any = model.packer.tokenizers["image"]
    value = pictures((6, 8))[0]
    with torch.no_grad():
        stream = model.pack("image -> label", [{"image": value}], answers=False)
        _, state_TD = states_alone(tower, model.embeds["image"].frozen_part, value)
        torch.testing.assert_close(model(stream), state_TD)
    with pytest.raises(mm.ConfigError, match=r"Unchanged: vectors are .* wide and the stream 10; make them equal"):
        tower.embed(10)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(mm.MediaError, match=r"Tower.encode: PixelShuffle: side=2 does not divide 3 rows x 4 columns"):
        Tower(PATCHES, CORE, PixelShuffle(2))(pictures((6, 8))[0])
    with pytest.raises(mm.MediaError, match=r"Pooled: a value has 12 inner tokens, more than most=4"):
        Tower(PATCHES, CORE, Pooled(4))(pictures((6, 8))[0])
    with pytest.raises(mm.MediaError, match=r"Dropped: 1 tokens cannot carry count=3 others"):
        Tower(Marked(3), CORE, Dropped(3))(pictures((2, 2))[0])
    with pytest.raises(mm.MediaError, match=r"PixelShuffle: 14 tokens are no whole grid"):
        Tower(Marked(2), CORE, PixelShuffle(2))(pictures((6, 8))[0])
    with pytest.raises(mm.ConfigError, match=r"then=Pooled.* would group tokens a second time"):
        PixelShuffle(2, Pooled(4))
    with pytest.raises(mm.ConfigError, match=r"Tower.of: kind='sound' is none of its kinds, which are image, label"):
        Tower.of(base(), kind="sound")
    with pytest.raises(mm.ConfigError, match=r"Tower: core=.* is no Core"):
        Tower(PATCHES, 3)  # type: ignore[arg-type]

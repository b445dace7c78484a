"""Declarations go through JSON and come back equal; names lead to classes without running anybody's code."""

import importlib.metadata
import json
import sys
from dataclasses import dataclass, field

import pytest

import multimodal as mm
from multimodal import declare
from multimodal.attention import Cosine, ScaledDotProduct
from multimodal.declare import Declared, declaration, find, override, rebuild, type_name
from multimodal.masks import Not
from multimodal.shapes import CheckpointError, ConfigError
from multimodal_tokenizers import Labels


@dataclass(frozen=True)
class Inner(Declared):
    size: int = 1


@dataclass(frozen=True)
class Outer(Declared):
    name: str
    parts: tuple[Inner, ...] = ()
    nested: tuple[tuple[int, ...], ...] = ()
    free: dict | None = None
    rate: float = 0.5
    derived: int = field(init=False, default=3)


def trip(part: Declared) -> object:
    return rebuild(json.loads(json.dumps(declaration(part))))


MASK = (mm.masks.SameSample() & (mm.masks.Causal() | mm.masks.Prefix()) & ~mm.masks.Window(4)) | mm.masks.SameSegment()

PARTS = [
    Outer("a"),
    Outer("ä", (Inner(2), Inner(3)), ((1, 2), (), (3,)), {"x": [1, {"y": None}]}, 1e-30),
    MASK,
    mm.Core.tiny(),
    mm.Core(width=48, depth=1, heads=4, kv_heads=2, rotary_split=(1, 1, 0), mask=MASK, score=Cosine(), dropout=0.1),
    mm.Classify(label_smoothing=0.1),
    mm.NextToken(),
    mm.CTC(),
    Labels(("b", "a"), several=True),
]


@pytest.mark.parametrize("part", PARTS, ids=range(len(PARTS)))
def test_there_and_back(part: Declared) -> None:
    assert trip(part) == part
    assert type(trip(part)) is type(part)


def test_rules_keep_their_structure() -> None:
    assert trip(MASK) != trip(
        (mm.masks.SameSample() & (mm.masks.Causal() | mm.masks.Prefix()) & ~mm.masks.Window(5)) | mm.masks.SameSegment()
    )
    assert trip(~mm.masks.Window(4)) == Not(mm.masks.Window(4))
    assert trip(mm.Core.tiny().replace(score=Cosine())) != mm.Core.tiny()
    assert mm.Core.tiny().score == ScaledDotProduct()


def test_what_is_written() -> None:
    assert declaration(mm.masks.Window(4)) == {"type": "multimodal.masks:Window", "config": {"size": 4}}
    assert declaration(mm.masks.Window(4) & mm.masks.Causal())["config"]["right"] == {
        "type": "multimodal.masks:Causal",
        "config": {},
    }
    assert "derived" not in declaration(Outer("a"))["config"]


def test_unknown_setting() -> None:
    with pytest.raises(CheckpointError, match=r"^Window has no setting 'sise'; it has size; did you mean 'size'\?$"):
        rebuild({"type": "multimodal.masks:Window", "config": {"sise": 4}})


def test_override() -> None:
    assert override(Inner(), size=5) == Inner(5)
    with pytest.raises(
        ConfigError, match=r"^Core has no setting 'widht'; it has width, depth, .*; did you mean 'width'\?$"
    ):
        mm.Core.tiny().replace(widht=3)
    with pytest.raises(ConfigError, match="heads=5"):  # a copy is checked as the first one was
        mm.Core.tiny().replace(heads=5)


def test_names() -> None:
    assert type_name(mm.Core) == "multimodal.core:Core"
    assert find("multimodal.core:Core") is mm.Core
    assert find(type_name(Inner)) is Inner


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "builtins:eval", "antigravity:Core", "this:Zen", "", "multimodal.core"]
)
def test_names_that_nobody_offers_are_not_imported(name: str) -> None:
    module = name.split(":")[0]
    was_imported = module in sys.modules
    with pytest.raises(CheckpointError) as raised:
        find(name)
    assert str(raised.value).startswith(f"{name!r} is not installed: install the package")
    assert "multimodal_tokenizers.labels:Labels" in str(raised.value)
    assert "import the module that defines it first (on the command line: --plugin)" in str(raised.value)
    assert (module in sys.modules) == was_imported


def test_each_group_of_entry_points_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installed package offers is found in any group that starts with 'multimodal.', and nowhere else."""
    points = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, value, group)
        for name, value, group in (
            ("Offered", "multimodal.core:Core", "multimodal.heads"),
            ("Wrong", "fractions:Fraction", "multimodal.parts"),
            ("Other", "decimal:Decimal", "console_scripts"),
        )
    )
    monkeypatch.setattr(declare, "_defined", {})
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: points)
    assert find("multimodal.core:Core") is mm.Core
    with pytest.raises(
        CheckpointError, match=r"'decimal:Decimal' is not installed: .*Installed are: fractions:Fraction, multi"
    ):
        find("decimal:Decimal")
    with pytest.raises(CheckpointError, match="'fractions:Fraction' is no declaration"):
        find("fractions:Fraction")


def test_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declare, "_defined", dict(declare._defined))
    declare.alias("__main__:Inner", Inner)
    assert find("__main__:Inner") is Inner
    with pytest.raises(mm.ConfigError, match=r"'multimodal\.core:Core' is the name of .*Core, which is there"):
        declare.alias("multimodal.core:Core", Inner)  # a name that is taken stays what it was
    assert find("multimodal.core:Core") is mm.Core

"""Learning rates by depth: the scales are timm's, and a step is as much shorter as they say."""

import re

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay

import multimodal as mm
from multimodal.model_parts import depths
from multimodal.train.optimizer import make_optimizer, rate_scales
from multimodal_tokenizers import ImagePatches, Labels

TASK, DEPTH = "image -> label", 4
CPU = torch.device("cpu")


def make(core=None) -> mm.Model:
    core = core or mm.Core(width=32, depth=DEPTH, heads=2)
    return mm.Model({"image": ImagePatches(patch=4), "label": Labels(("a", "b"))}, core, [TASK])


def part_of_vit(name: str) -> str:
    """'block 2', 'embedding', 'norm' or 'head', from timm's name of a parameter."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return f"block {block[1]}" if block else "embedding" if name.startswith("patch_embed") else name.split(".")[0]


def part_of_ours(name: str) -> str:
    block = re.match(r"core\.blocks\.(\d+)\.", name)
    where = {"embeds": "embedding", "readouts": "head", "core": "norm"}
    return f"block {block[1]}" if block else where[name.split(".")[0]]


@pytest.mark.parametrize("decay", [0.75, 0.5])
def test_the_scales_are_those_of_timm(decay):
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=DEPTH, embed_dim=32, num_heads=2, img_size=32, patch_size=4, num_classes=2
    )
    names = {id(p): name for name, p in vit.named_parameters()}
    theirs: dict[str, set[float]] = {}
    for group in param_groups_layer_decay(vit, layer_decay=decay):
        for parameter in group["params"]:
            theirs.setdefault(part_of_vit(names[id(parameter)]), set()).add(group["lr_scale"])
    # the class token and the table of positions are of timm's model alone: here they are the head's, and rotations
    theirs.pop("cls_token"), theirs.pop("pos_embed")
    ours: dict[str, set[float]] = {}
    for name, scale in rate_scales(make(), decay).items():
        ours.setdefault(part_of_ours(name), set()).add(scale)
    assert ours.keys() == theirs.keys() == {"embedding", "norm", "head", *(f"block {i}" for i in range(DEPTH))}
    assert {part: max(scales) for part, scales in ours.items()} == pytest.approx(
        {part: max(scales) for part, scales in theirs.items()}
    )
    assert all(len(scales) == 1 for scales in (*ours.values(), *theirs.values()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_step_of_each_part_is_as_long_as_its_scale(optimizer):
    """The first step of AdamW is lr for every weight; Muon's has the same length for matrices of one shape."""
    model, lr, decay = make(), 1e-3, 0.5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    samples = [{"image": torch.rand(3, 8, 8), "label": "ab"[i % 2]} for i in range(4)]
    settings = {"steps": 1, "batch": 4, "device": "cpu", "precision": "float32", "clip": 0.0, "quiet": True}
    run = mm.fit(model, {TASK: samples}, **settings, lr=lr, layer_decay=decay, optimizer=optimizer, weight_decay=0.0)
    assert run.last("lr") == lr
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("attention.out.weight") or "blocks" not in name:
            step = float((parameter.detach() - before[name]).abs().max())
            found[part_of_ours(name)] = max(found.get(part_of_ours(name), 0.0), step)
    by_adamw = {name: step for name, step in found.items() if not (optimizer == "muon" and name.startswith("block"))}
    scales = {part_of_ours(name): scale for name, scale in rate_scales(model, decay).items()}
    assert set(scales.values()) == {0.5**i for i in range(DEPTH + 2)}
    for part, step in by_adamw.items():
        assert step == pytest.approx(lr * scales[part], rel=0.02), part
    for i in range(DEPTH - 1):
        assert found[f"block {i}"] / found[f"block {i + 1}"] == pytest.approx(
            decay, rel=0.3 if optimizer == "muon" else 0.02
        )


def test_parameters_of_one_scale_and_decay_share_a_group():
    groups = make_optimizer(make(), mm.Recipe(layer_decay=0.8), CPU).param_groups
    pairs = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert len(set(pairs)) == len(pairs)
    assert {scale for scale, _ in pairs} == {0.8**i for i in range(DEPTH + 2)}
    plain = make_optimizer(make(), mm.Recipe(), CPU).param_groups
    assert [(group["lr_scale"], group["weight_decay"]) for group in plain] == [(1.0, 0.0), (1.0, 0.05)]


def test_a_writer_goes_on_counting_after_its_reader():
    core = mm.EncoderDecoder(reader=mm.Core(width=32, depth=2, heads=2), writer=mm.Core(width=32, depth=3, heads=2))
    model = mm.Model({"image": ImagePatches(patch=4), "label": Labels(("a", "b"))}, core, [TASK])
    found, highest = depths(model)
    assert highest == 6
    assert found["core.reader.blocks.1.layers.0.norm.weight"] == found["core.reader.norm.weight"] == 2
    assert found["core.writer.blocks.0.layers.0.norm.weight"] == 3
    assert found["core.writer.norm.weight"] == 5
    assert {found[name] for name in found if name.startswith("readouts")} == {6}


def test_what_a_core_adds_to_embedded_tokens_is_as_deep_as_they_are():
    core = mm.Core(width=32, depth=2, heads=2, learned_times=40, learned_fields=2, first_norm=True)
    found, _ = depths(mm.Model({"image": ImagePatches(patch=4), "label": Labels(("a", "b"))}, core, [TASK]))
    first = [name for name in found if name.startswith(("core.times", "core.fields", "core.first_norm"))]
    assert len(first) == 3
    assert {found[name] for name in first} == {0}
    assert found["core.norm.weight"] == 2

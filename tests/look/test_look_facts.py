"""Embeddings, analogies, sparse autoencoders, parameter counts and ROME: against brute force, planted truth and formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.layers import Attention
from multimodal.look.embeddings import angles, near_orthogonal, neighbour_table, neighbours, welch_bound
from multimodal.look.parameter_count import count_parameters, value_map, value_maps
from multimodal.zoo.analogies import analogy
from multimodal.zoo.fact_editing import edit_fact, localise, mean_ablated, parts, right_answers, second_moment
from multimodal.zoo.sparse_autoencoder import SparseAutoencoder, recovered
from multimodal_tokenizers import Labels, TextBytes


def test_analogies_and_neighbours_are_those_of_brute_force():
    table = np.random.default_rng(0).normal(size=(30, 5))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    table_VD = torch.tensor(table)
    questions = [(1, 2, 3), (4, 5, 6), (0, 29, 7)]
    expected = []
    for a, b, c in questions:
        aim = unit[b] - unit[a] + unit[c]
        ranked = sorted((i for i in range(30) if i not in (a, b, c)), key=lambda i: -(unit[i] @ aim))
        expected.append(ranked[:2])
    a, b, c = torch.tensor(questions).unbind(1)
    assert analogy(table_VD, a, b, c, k=2).tolist() == expected
    assert analogy(table_VD, 1, 2, 3).tolist() == expected[0][:1]
    found, cosines = neighbours(table_VD, [8, 9], 3)
    for word, row, cos in zip((8, 9), found.tolist(), cosines.tolist(), strict=True):
        ranked = sorted((i for i in range(30) if i != word), key=lambda i: -(unit[i] @ unit[word]))
        assert row == ranked[:3]
        np.testing.assert_allclose(cos, unit[row] @ unit[word], atol=1e-5)
    assert neighbour_table(table_VD, [8], [f"w{i}" for i in range(30)], 1).startswith("w8")
    with pytest.raises(mm.ConfigError, match=r"ids 30 do not all lie in 0\.\.29"):
        analogy(table_VD, 30, 1, 2)
    with pytest.raises(mm.ConfigError, match=r"k=28 must lie in 1\.\.27"):
        analogy(table_VD, 0, 1, 2, k=28)


def test_angles_and_bounds():
    square_VD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert angles(square_VD) == pytest.approx((90, 180), abs=1e-3)
    turns = torch.arange(3) * 2 * math.pi / 3  # three directions of the plane reach Welch's bound
    star_VD = torch.stack([turns.cos(), turns.sin()], 1)
    assert abs(math.cos(math.radians(angles(star_VD)[0]))) == pytest.approx(welch_bound(3, 2), abs=1e-5)
    generator = torch.Generator().manual_seed(7)
    drawn = F.normalize(torch.randn(16, 50, generator=generator), dim=-1)
    cos = (drawn @ drawn.T).abs() - torch.eye(16)
    first = next(i for i in range(1, 16) if float(cos[i, :i].max()) > 0.25)
    assert near_orthogonal(50, 0.25, seed=7) == first
    with pytest.raises(mm.ConfigError, match="stayed within"):
        near_orthogonal(4096, 0.9, most=20)


def test_a_sparse_autoencoder_finds_planted_directions():
    generator = torch.Generator().manual_seed(0)
    true_ND = F.normalize(torch.randn(10, 6, generator=generator), dim=-1)
    share_NF = torch.rand(4000, 10, generator=generator) * (torch.rand(4000, 10, generator=generator) < 0.05)
    centre_D = torch.randn(6, generator=generator)
    state_ND = 5 * share_NF[share_NF.sum(1) > 0] @ true_ND + centre_D
    found = SparseAutoencoder.train_on(state_ND, 20, steps=600, batch=256, lr=1e-2)
    assert recovered(found.directions_FD, true_ND) >= 0.9
    assert recovered(torch.randn(20, 6, generator=generator), true_ND) < 0.3
    with torch.no_grad():
        error = (found(state_ND) - state_ND).square().sum() / (state_ND - state_ND.mean(0)).square().sum()
        assert float(error) < 0.1
        assert float((found.encode(state_ND) > 0).float().mean()) < 0.3
    torch.testing.assert_close(found.directions_FD.norm(dim=1), torch.ones(20))
    with pytest.raises(mm.ConfigError, match="steps=0"):
        SparseAutoencoder.train_on(state_ND, 3, steps=0)


def test_roles_count_every_parameter_once():
    tokenizers = {"text": TextBytes(), "label": Labels(("a", "b"))}
    two = mm.EncoderDecoder(
        reader=mm.Core(width=32, depth=1, heads=2), writer=mm.Core(width=32, depth=2, heads=4, kv_heads=2)
    )
    many = (
        mm.layers.SelfAttention(score=mm.attention.General()),
        mm.layers.PersistentMemory(slots=5),
        mm.layers.Recurrent(),
        mm.layers.MLP(),
    )
    for core in (mm.Core.tiny(), two, mm.Core(width=32, depth=2, heads=2, block=many)):
        model = mm.Model(tokenizers, core, ["text -> label", "text -> text"])
        assert count_parameters(model).total == sum(p.numel() for p in model.parameters())
        declared = count_parameters(core, vocab=10)
        assert declared.total - declared.counts["embedding"] - declared.counts["heads"] == core.parameters
        assert declared.counts["embedding"] == declared.counts["heads"] == 10 * core.width
    counts = count_parameters(mm.Core(width=32, depth=2, heads=4, kv_heads=2)).counts
    assert counts["attention query"] == counts["attention output"] == 2 * 32 * 32
    assert counts["attention key"] == counts["attention value"] == 2 * 32 * 16
    assert "attention score and prior" in count_parameters(mm.Core(width=32, depth=2, heads=2, block=many)).counts


def test_gpt_3_is_counted_without_its_weights():
    core = mm.Core(width=12_288, depth=96, heads=96)
    table = count_parameters(core, vocab=50_257)
    assert table.attention == 57_982_058_496
    assert table.counts["MLP"] == 115_964_116_992
    assert table.counts["embedding"] + table.counts["heads"] == 1_235_116_032
    assert table.total - table.counts["norms"] == 175_181_291_520
    assert count_parameters(core, vocab=50_257, tied=True).total == table.total - 617_558_016
    assert value_maps(core) == (150_994_944, 1_572_864)
    assert "66.20%" in str(table)


def test_a_heads_values_are_one_map_of_low_rank():
    torch.manual_seed(0)
    core = mm.Core(width=24, depth=1, heads=4, kv_heads=2, block=(mm.layers.SelfAttention(),)).build()
    attention = next(m for m in core.modules() if isinstance(m, Attention))
    maps = [value_map(attention, head) for head in range(4)]
    x_D = torch.randn(24)
    value_GK = attention.qkv(x_D)[-12:].view(2, 6)
    for head, one in enumerate(maps):
        alone = torch.zeros(4, 6)
        alone[head] = value_GK[head // 2]
        torch.testing.assert_close(one @ x_D, attention.out(alone.flatten()))
        assert int(torch.linalg.matrix_rank(one)) == 6


TASK = "first last -> sport"
NAMES, SPORTS = tuple("abcdefgh"), ("golf", "judo", "polo", "chess")


@pytest.fixture(scope="module")
def knowing() -> tuple[mm.Model, list[dict[str, str]]]:
    random = np.random.default_rng(0)
    data = [{"first": a, "last": b, "sport": str(random.choice(SPORTS))} for a in NAMES for b in NAMES]
    tokenizers = {"first": Labels(NAMES), "last": Labels(NAMES), "sport": Labels(SPORTS)}
    model = mm.Model(tokenizers, mm.Core(width=48, depth=2, heads=2), [TASK])
    mm.fit(model, {TASK: data}, steps=60, batch=64, lr=5e-3, weight_decay=0.0, quiet=True, device="cpu")
    return model, data


def test_right_answers_are_those_of_predict(knowing):
    model, data = knowing
    wrong = [{**sample, "sport": "judo"} for sample in data]
    answers = model.predict(TASK, data)
    expected = [answer.value == "judo" for answer in answers]
    assert 0 < sum(expected) < 64
    assert right_answers(model, TASK, wrong, batch=10).tolist() == expected
    assert right_answers(model, TASK, model.pack(TASK, wrong)).tolist() == expected


def test_a_mean_ablated_part_adds_the_same_everywhere(knowing):
    model, data = knowing
    assert list(parts(model)) == ["block 1 attention", "block 1 mlp", "block 2 attention", "block 2 mlp"]
    body = parts(model)["block 2 attention"].body
    outputs: list[torch.Tensor] = []
    hook = body.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with model.inference_mode():
        model(model.pack(TASK, data))
    hook.remove()
    with mean_ablated(model, ["block 2 attention"], TASK, data), model.inference_mode():
        recorded: list[torch.Tensor] = []
        hook = body.register_forward_hook(lambda module, inputs, output: recorded.append(output))
        model(model.pack(TASK, data[:3]))
        hook.remove()
    torch.testing.assert_close(recorded[0], outputs[0].mean(0).expand(9, -1), atol=1e-5, rtol=1e-4)
    shares = localise(model, TASK, data)
    assert shares["whole"] == 1.0
    assert min(shares.values()) < 0.8
    assert right_answers(model, TASK, data).all()
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(mm.ConfigError, match="no part 'block 9'"), mean_ablated(model, ["block 9"], TASK, data):
        pass


def test_an_edit_changes_one_fact_by_rank_one_and_can_be_undone(knowing):
    model, data = knowing
    moment_FF = second_moment(model, TASK, data)
    keys: list[torch.Tensor] = []
    matrix = parts(model)["block 2 mlp"].body.down
    hook = matrix.register_forward_pre_hook(lambda module, inputs: keys.append(inputs[0]))
    stream = model.pack(TASK, data)
    with model.inference_mode():
        model(stream)
    hook.remove()
    key_NF = keys[0][stream.readings[TASK].row_N].double()
    torch.testing.assert_close(moment_FF, key_NF.T @ key_NF / 64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = {**data[5], "sport": next(s for s in SPORTS if s != data[5]["sport"])}
    edit = edit_fact(model, TASK, wanted, moment_FF=moment_FF)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["core.blocks.1.layers.1.body.down.weight"]
    change_DF = matrix.weight.detach() - before[changed[0]]
    torch.testing.assert_close(change_DF, torch.outer(edit.left_D, edit.right_F), atol=1e-5, rtol=1e-3)
    assert int(torch.linalg.matrix_rank(change_DF, rtol=1e-3)) == 1
    first = key_NF[stream.readings[TASK].samples.index(5)].float()
    torch.testing.assert_close(change_DF @ first, edit.left_D, atol=1e-3, rtol=1e-3)  # k is mapped to v exactly
    assert model.predict(TASK, first=wanted["first"], last=wanted["last"]).value == wanted["sport"]
    right = right_answers(model, TASK, [*data[:5], *data[6:]])
    assert float(right.float().mean()) > 0.9
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_edits_refuse_what_they_cannot_change(knowing):
    model, data = knowing
    with pytest.raises(mm.StreamError, match=r"moment_FF is \(3, 3\), but the matrix reads 128 features"):
        edit_fact(model, TASK, data[0], moment_FF=torch.eye(3))
    with pytest.raises(mm.ConfigError, match="'block 1 attention' is no MLP of this model"):
        second_moment(model, TASK, data, part="block 1 attention")

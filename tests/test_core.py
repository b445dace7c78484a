"""The core: its formulas, its declaration, one block and a whole stack against the same mathematics written plainly."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import multimodal as mm
from multimodal.attention import ALiBi, BucketedBias, Cosine, Gumbel, Layout, plan_attention
from multimodal.core import Transformer, recompute
from multimodal.layers import MLP, Context, Gated, Recurrent, SelfAttention
from multimodal.masks import PREFIX_LM, Window
from multimodal.positions import rotary_frequencies
from multimodal.shapes import ConfigError, ShapeError

PRESETS = {  # millions of parameters that each one's docstring promises
    "tiny": 0.2,
    "small": 1.2,
    "medium": 10.6,
    "base": 85,
    "large": 300,
    "xl_1b": 1200,
    "xxl_7b": 7000,
}


def preset(name: str) -> mm.Core:
    return getattr(mm.Core, name)()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_counted_exactly(name):
    with torch.device("meta"):
        real = sum(p.numel() for p in preset(name).build().parameters())
    assert preset(name).parameters == real
    assert real == pytest.approx(PRESETS[name] * 1e6, rel=0.06)


def test_every_preset_is_in_the_table():
    made = {n for n, f in vars(mm.Core).items() if isinstance(f, classmethod)}
    assert made == set(PRESETS)


def test_a_shared_prior_has_one_table(lay):
    """All layers use the table of the first; it is stored once, gets the gradients of all, and is copied with the model."""
    core = mm.Core(width=16, depth=3, heads=2, rotary_split=(0, 0, 0), prior=BucketedBias(8, 6))
    apart = core.replace(prior=BucketedBias(8, 6, shared=False)).build()
    shared = copy.deepcopy(core.build())
    name = "layers.0.body.attention.mechanism.prior_weights.0.table"
    assert [key for key in shared.state_dict() if "prior" in key] == [f"blocks.0.{name}"]
    assert core.parameters == sum(p.numel() for p in apart.parameters()) - 2 * 2 * 8
    nn.init.normal_(shared.get_parameter(f"blocks.0.{name}"))
    table = shared.state_dict()[f"blocks.0.{name}"]
    apart.load_state_dict({**shared.state_dict(), **{f"blocks.{i}.{name}": table for i in range(3)}})
    x_TD, layout = torch.randn(9, 16), lay([[(4, True), (5, False)]])
    found, wanted = (m(x_TD, torch.zeros(9, 3), layout) for m in (shared, apart))
    torch.testing.assert_close(found, wanted)
    push = torch.randn(9, 16)
    for states in (found, wanted):
        (states * push).sum().backward()
    gradients = [apart.get_parameter(f"blocks.{i}.{name}").grad for i in range(3)]
    torch.testing.assert_close(shared.get_parameter(f"blocks.0.{name}").grad, sum(gradients))
    assert all(g is not None and g.abs().max() > 1e-5 for g in gradients)


@pytest.mark.parametrize("changes", [{"qk_norm": False}, {"kv_heads": 2}, {"mlp_width": 40}, {"depth": 1}], ids=str)
def test_parameters_of_every_setting_are_counted_exactly(changes):
    core = mm.Core.tiny().replace(**changes)
    assert core.parameters == sum(p.numel() for p in core.build().parameters())
    assert core.parameters != mm.Core.tiny().parameters


def test_seven_billion_have_the_shape_of_mistral():
    """Mistral 7B has 7.24 B with its two tables of 32000 x 4096; ours adds two norms of 128 a layer."""
    with_tables = 7_241_732_096
    assert preset("xxl_7b").parameters == with_tables - 2 * 32000 * 4096 + 32 * 2 * 128


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"mlp_width": 48, "qk_norm": False}], ids=str)
def test_flops_are_those_that_pytorch_counts(lay, changes):
    core = mm.Core(width=32, depth=3, heads=4).replace(**changes)
    tokens = 24
    layout = lay([[(tokens, True)]])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        core.build()(torch.randn(tokens, 32), torch.zeros(tokens, 3), layout, backend="dense")
    assert core.flops(tokens, context=tokens) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "Core: width=0 must be at least 1"),
        ({"depth": -1}, "Core: depth=-1 must be at least 0"),
        ({"width": 64, "heads": 6}, "width=64 does not give heads=6 an even width each; try width=72"),
        ({"width": 12, "heads": 4}, "width=12 does not give heads=4 an even width each; try width=16"),
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3; try kv_heads=1"),
        ({"kv_heads": 8}, "heads=4 is not a multiple of kv_heads=8"),
        ({"kv_heads": 0}, "heads=4 is not a multiple of kv_heads=0"),
        ({"dropout": 1.0}, "dropout=1.0 is not in 0 to 1"),
        ({"drop_path": -0.1}, "drop_path=-0.1 is not in 0 to 1"),
        ({"rotary_split": (1, 1)}, "rotary_split and rotary_base give one number each for time, row and column"),
        ({"rotary_split": (0, 0, -1)}, "rotary_split"),
        ({"block": ()}, "block=() must be a tuple of layers"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_core_that_cannot_be_built_says_why(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mm.Core(**{"width": 32, "depth": 2, "heads": 4, **settings})


@pytest.mark.parametrize(("width", "heads"), [(64, 6), (12, 4), (7, 2), (100, 8)])
def test_the_width_that_an_error_suggests_works(width, heads):
    with pytest.raises(ConfigError, match="try width=") as caught:
        mm.Core(width=width, depth=1, heads=heads)
    mm.Core(width=int(re.search(r"try width=(\d+)", str(caught.value))[1]), depth=1, heads=heads)  # type: ignore[index]


def test_cross_attention_in_a_core_that_stands_alone_is_refused():
    with pytest.raises(ConfigError, match="CrossAttention needs another core to attend to"):
        mm.Core(width=32, depth=2, heads=4, block=(mm.layers.CrossAttention(),)).build()


def test_a_misspelt_setting_is_corrected():
    with pytest.raises(ConfigError, match=r"no setting 'deph'.*did you mean 'depth'"):
        mm.Core.tiny().replace(deph=3)


def test_shapes_that_disagree_are_named(lay, core):
    layout = lay([[(3, True)]])
    with pytest.raises(ShapeError, match=r"Core: stream_TD is \(3, 16\), so D=16, but D=32 was wanted"):
        core.build()(torch.randn(3, 16), torch.zeros(3, 3), layout)
    with pytest.raises(ShapeError, match=r"Core: position_TA is \(4, 3\), so T=4, but T=3 was wanted"):
        core.build()(torch.randn(3, 32), torch.zeros(4, 3), layout)
    with pytest.raises(ShapeError, match=r"Core: sample_T is \(3,\), so T=3, but T=4 was wanted"):
        core.build()(torch.randn(4, 32), torch.zeros(4, 3), layout)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x_HTK: Tensor, position_TA: Tensor, core: mm.Core) -> Tensor:
    """Rotary places with sines and cosines, axis by axis, in float64."""
    pairs = core.head_width // 2
    rows, columns = pairs // 4, pairs // 4
    angles = []
    for axis, count in enumerate((pairs - rows - columns, rows, columns)):
        for i in range(count):
            angles.append(position_TA[:, axis] * core.rotary_base[axis] ** (-i / count))
    angle_TP = torch.stack(angles, 1)
    even, odd = x_HTK[..., 0::2], x_HTK[..., 1::2]
    cos, sin = angle_TP.cos(), angle_TP.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def plain_block(w: dict[str, Tensor], x: Tensor, position_TA: Tensor, hidden: Tensor, core: mm.Core) -> Tensor:
    """Llama's block (Touvron et al. 2023) with norms on queries and keys, for one sample, from the weights alone."""
    H, G, K = core.heads, core.groups, core.head_width
    q, k, v = (rms(x, w["layers.0.norm.weight"]) @ w["layers.0.body.attention.qkv.weight"].T).split(
        [H * K, G * K, G * K], -1
    )
    q = rms(q.view(-1, H, K), w["layers.0.body.attention.norm_q.weight"]).transpose(0, 1)
    k = rms(k.view(-1, G, K), w["layers.0.body.attention.norm_k.weight"]).transpose(0, 1)
    v = v.view(-1, G, K).transpose(0, 1)
    q, k = turned(q, position_TA, core), turned(k, position_TA, core)
    k, v = (torch.cat([y[h // (H // G)][None] for h in range(H)]) for y in (k, v))
    score = (q @ k.mT / K**0.5).masked_fill(hidden, float("-inf"))
    read = (score.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = x + read @ w["layers.0.body.attention.out.weight"].T
    gate, up = (rms(x, w["layers.1.norm.weight"]) @ w["layers.1.body.gate_up.weight"].T).chunk(2, -1)
    return x + (gate * gate.sigmoid() * up) @ w["layers.1.body.down.weight"].T


def enlarged(transformer: Transformer) -> Transformer:
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
    return transformer


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_whole_core_is_the_plain_mathematics(lay, kv_heads, backend):
    core = mm.Core(width=32, depth=2, heads=4, kv_heads=kv_heads)
    transformer = enlarged(core.build())
    prefix, written = 4, 3
    position_TA = torch.rand(11, 3) * 9
    stream_TD = torch.randn(11, 32)
    with torch.no_grad():
        mine = transformer(
            stream_TD, position_TA, lay([[(prefix, True), (written, False)], [(4, False)]]), backend=backend
        )
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    hidden[:prefix, :prefix] = False
    parts = []
    for rows, mask in [(slice(0, 7), hidden), (slice(7, 11), torch.ones(4, 4, dtype=torch.bool).triu(1))]:
        x, p = stream_TD[rows].double(), position_TA[rows].double()
        for block in transformer.blocks:
            x = plain_block({n: t.double() for n, t in block.state_dict().items()}, x, p, mask, core)
        parts.append(rms(x, transformer.norm.weight.double()))
    other = torch.cat(parts)
    assert other.std() > 0.3
    torch.testing.assert_close(mine.double(), other, atol=2e-5, rtol=1e-4)


BLOCKS = {
    "as it comes": (SelfAttention(), MLP()),
    "nothing after attention": (MLP(), SelfAttention()),
    "two MLPs": (SelfAttention(), MLP(merge=Gated()), MLP()),
    "recurrent": (SelfAttention(), MLP(), Recurrent(), MLP()),
    "nothing mixes": (MLP(),),
}


def test_the_states_of_a_core_without_blocks_are_the_embedded_tokens(lay):
    layout, stream_TD, position_TA = lay([[(5, True)], [(3, False)]]), torch.randn(8, 16), torch.rand(8, 3)
    core = mm.Core(width=16, depth=0, heads=2, last_norm=False)
    assert core.parameters == 0
    assert torch.equal(core.build()(stream_TD, position_TA, layout), stream_TD)
    wanted_N = torch.tensor([7, 2])
    assert torch.equal(core.build()(stream_TD, position_TA, layout, wanted_N=wanted_N), stream_TD[wanted_N])
    normed = core.replace(last_norm=True).build()(stream_TD, position_TA, layout)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(stream_TD, (16,), eps=1e-6))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_wanted_rows_are_rows_of_the_whole(lay, block, again):
    """States of some rows, in the order asked for, and every gradient; what is dropped is drawn sample by sample in both."""
    torch.manual_seed(0)
    core = enlarged(mm.Core(width=16, depth=2, heads=2, drop_path=0.5, block=block).build()).double().train()
    recompute(core, again)
    layout = lay([[(5, True), (2, False)], [(3, False)], [(4, True)]])
    stream_TD, position_TA = torch.randn(14, 16, dtype=torch.float64).requires_grad_(), torch.rand(14, 3) * 4
    wanted_N = torch.tensor([13, 6, 5, 8])

    def states(**options: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        state_ND = core(stream_TD, position_TA, layout, **options)
        if not options:
            state_ND = state_ND[wanted_N]
        weights = [p for p in core.parameters() if p.requires_grad]
        grads = torch.autograd.grad(state_ND.pow(3).sum(), [stream_TD, *weights], materialize_grads=True)
        return state_ND, *grads

    for mine, other in zip(states(wanted_N=wanted_N), states(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-10)


RULES = {
    "default": {},
    "window": {"mask": PREFIX_LM & Window(3)},  # of the long samples in blocks, so all rows ask
    "wide window": {"mask": PREFIX_LM & Window(9)},
    "prior": {"prior": ALiBi(), "kv_heads": 1, "score": Cosine()},
    "what reads by chance": {"read": Gumbel(0.5)},
}
ASKING = {  # of samples of 12, 12, 12, 6 and 6 tokens, the rows wanted, and whether these alone ask
    "the last of each": ([11, 23, 35, 41, 47], True),
    "two of each": ([3, 11, 15, 23, 27, 35, 37, 40, 43, 46], True),
    "not of each": ([11, 23, 41, 47], False),
    "not as far": ([11, 22, 35, 41, 47], False),
    "not in order": ([23, 11, 35, 41, 47], False),
    "too many to be worth it": ([*range(8, 12), *range(20, 24), *range(32, 36), 41, 47], False),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("asking", ASKING)
@pytest.mark.parametrize("free", [0, 7, 12], ids=["causal", "prefix", "free"])
def test_in_the_last_attention_wanted_rows_alone_ask(lay, rule, asking, free):
    """States and gradients are those of all rows; the output projection tells how many rows there were."""
    torch.manual_seed(0)
    core = enlarged(mm.Core(width=16, depth=2, heads=2, **RULES[rule]).build()).double().train()
    parts = [[(free, True), (12 - free, False)]] * 3 + [[(min(free, 5), True), (6 - min(free, 5), False)]] * 2
    layout = lay([[(n, own) for n, own in sample if n] for sample in parts])
    stream_TD, position_TA = torch.randn(48, 16, dtype=torch.float64).requires_grad_(), torch.rand(48, 3) * 4
    rows, alone = ASKING[asking]
    wanted_N, counts = torch.tensor(rows), []
    core.blocks[1].layers[0].body.attention.out.register_forward_hook(lambda _, given, out: counts.append(len(out)))

    def states(**options: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        state_ND = core(stream_TD, position_TA, layout, **options)
        state_ND = state_ND if options else state_ND[wanted_N]
        return state_ND, *torch.autograd.grad(state_ND.pow(3).sum(), [stream_TD, *core.parameters()])

    for mine, other in zip(states(wanted_N=wanted_N), states(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9)
    assert counts == [len(rows) if alone and rule not in ("window", "what reads by chance") else 48, 48]


def test_the_last_mlp_is_computed_for_wanted_rows_alone(lay):
    core = mm.Core(width=16, depth=3, heads=2).build()
    layout, rows = lay([[(9, True), (1, False)]]), []
    for block in core.blocks:
        block.layers[1].body.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    core(torch.randn(10, 16), torch.zeros(10, 3), layout, wanted_N=torch.tensor([9]))
    assert rows == [10, 10, 1]


def test_first_weights_follow_the_seed_and_nothing_else(core, tokenizers):
    def weights(seed: int) -> dict[str, Tensor]:
        return mm.Model({"text": tokenizers["text"]}, core, ["text -> text"], seed=seed).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before)  # and the global generator is left as it was
    torch.manual_seed(2)
    again, other = weights(3), weights(4)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(
        first["core.blocks.0.layers.1.body.down.weight"], other["core.blocks.0.layers.1.body.down.weight"]
    )


def test_first_weights_have_the_spread_that_is_documented():
    core = mm.Core(width=128, depth=8, heads=4)
    blocks = core.build().blocks
    for block in blocks:
        assert float(block.layers[1].body.gate_up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert float(block.layers[0].body.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        for last in (block.layers[1].body.down.weight, block.layers[0].body.attention.out.weight):
            assert float(last.detach().std()) == pytest.approx(0.02 / 16**0.5, rel=0.05)


def test_dropout_and_drop_path_are_off_in_evaluation(lay):
    core = mm.Core(width=32, depth=3, heads=4)
    plain, dropping = core.build(), core.replace(dropout=0.5, drop_path=0.5).build()
    dropping.load_state_dict(plain.state_dict())
    stream_TD, position_TA, layout = torch.randn(6, 32), torch.zeros(6, 3), lay([[(4, True)], [(2, False)]])
    with torch.no_grad():
        expected = plain(stream_TD, position_TA, layout)
        assert torch.equal(dropping.eval()(stream_TD, position_TA, layout), expected)
        dropping.train()
        assert not torch.equal(dropping(stream_TD, position_TA, layout), expected)


def context_of(layout: Layout) -> Context:
    return Context(layout, plan_attention(PREFIX_LM, layout), lambda width: None)


def test_drop_path_skips_a_block_for_whole_samples_and_keeps_the_mean(lay):
    counts = [3, 1, 4, 2] * 50
    layout = lay([[(n, True)] for n in counts])
    sample_T = layout.info.sample
    block = mm.Core(width=8, depth=2, heads=1, drop_path=0.25).build().blocks[-1].layers[0].train()
    assert block.drop_path == 0.25
    kept = torch.zeros(len(counts))
    for _ in range(20):
        factor_TD = block._drop(torch.ones(len(sample_T), 8), context_of(layout))
        for sample in range(len(counts)):
            mine = factor_TD[sample_T == sample]
            assert (mine == mine[0, 0]).all()
            assert float(mine[0, 0]) in (0.0, pytest.approx(1 / 0.75))
            kept[sample] += float(mine[0, 0] > 0)
    share = float(kept.mean()) / 20
    assert share == pytest.approx(0.75, abs=0.03)  # 4000 draws: a deviation of 0.007
    assert len(set(kept.tolist())) > 3  # samples are drawn one by one


def test_drop_path_rises_linearly_to_the_last_block():
    blocks = mm.Core(width=8, depth=5, heads=1, drop_path=0.4).build().blocks
    assert [block.layers[1].drop_path for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_dropout_keeps_the_mean(lay):
    block = mm.Core(width=8, depth=1, heads=1, dropout=0.3).build().blocks[0].layers[1].train()
    out = block._drop(torch.ones(2000, 8), context_of(lay([[(2000, True)]])))
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.7))


def test_a_core_survives_json_with_its_mask_and_score():
    import json

    from multimodal.attention import Cosine
    from multimodal.declare import declaration, rebuild

    core = mm.Core.tiny().replace(mask=PREFIX_LM & mm.masks.Window(9), score=Cosine(4.0), rotary_split=(1, 1, 2))
    assert rebuild(json.loads(json.dumps(declaration(core)))) == core


def test_rotations_of_a_width_that_no_layer_of_the_core_has():
    position_TA = torch.rand(5, 3) * 9
    core = mm.Core.tiny()
    known = core.build().rotations(position_TA)
    assert list(known) == [16]
    axis_K, frequency_K = rotary_frequencies(6, core.rotary_split, core.rotary_base)
    angle_TK = position_TA[:, axis_K] * frequency_K
    torch.testing.assert_close(known[6][:, 0], torch.complex(angle_TK.cos(), angle_TK.sin()))
    assert core.replace(rotary_split=(0, 0, 0)).build().rotations(position_TA)[6] is None


def test_a_block_that_is_recomputed_calls_its_hooks_once_and_gives_the_same_gradient(lay):
    core = mm.Core(width=16, depth=2, heads=2).build().train()
    layout, stream_TD, position_TA = lay([[(4, True)], [(3, False)]]), torch.randn(7, 16), torch.rand(7, 3)
    grads, calls = [], []
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in core.blocks]
    for on in (False, True):
        recompute(core, on)
        core.zero_grad()
        core(stream_TD, position_TA, layout).square().sum().backward()
        grads.append([p.grad.clone() for p in core.parameters()])
    assert len(calls) == 2 * len(hooks)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

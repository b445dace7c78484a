"""Everything that runs otherwise on a GPU, against the dense plan in float64 or against the same on the CPU.

These need a CUDA device, and neither the command line's packages nor other test files:
PYTHONPATH=.:tokenizers python3 -m pytest -m cuda -n 0 tests/test_cuda_paths.py
"""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal.attention import Cache, Cosine, Factored, Layout, Mechanism, Soft, plan_attention
from multimodal.core import compile_blocks, recompute
from multimodal.masks import PREFIX_LM, Causal, Chunked, Prefix, Rule, SameSample, SameSegment, Window
from multimodal.shapes import ConfigError
from multimodal.train.optimizer import make_optimizer
from multimodal.train.recipe import Recipe
from multimodal_tokenizers import Labels, TextBytes

DEVICE = "cuda"
pytestmark = pytest.mark.cuda
compiler_warns = pytest.mark.filterwarnings("ignore")  # of many things that are not ours

ODD = [  # no length is a multiple of 128; prefixes differ; one sample has no context, two no target
    [(137, True), (70, False)],
    [(65, False)],
    [(200, True)],
    [(1, True), (131, False)],
    [(131, True), (1, False)],
    [(1, False)],
    [(1, True)],
]
EVEN = [[(90, True), (39, False)]] * 3
LAYOUTS = {
    "odd": ODD,
    "even": EVEN,
    "causal": [[(129, False)], [(77, False)], [(1, False)]],
    "free": [[(129, True)], [(77, True)], [(1, True)]],
    "single tokens": [[(1, True)], [(1, False)], [(1, True)]],
    "a picture and its class": [[(64, True), (1, False)]] * 5,
    "one free token each": [[(1, True), (3, False)], [(1, True)], [(200, False)]],
}
MIXED = [[(60, False), (100, True)], [(140, True), (9, False), (30, True), (1, False)]]
RULES = {
    "default": PREFIX_LM,
    "window": PREFIX_LM & Window(50),
    "chunks": SameSample() & Chunked(48),
    "fields apart": SameSample() & (SameSegment() | Causal()),
    "free only": SameSample() & (Prefix() | Window(1)),
}


@dataclass(frozen=True)
class Scaled(Factored):
    """A product with a scale of our own."""

    def features(self, q_BTHK, k_BMGK, weights):
        return q_BTHK, k_BMGK, 0.125


def plainly() -> Mechanism:
    return Mechanism(Scaled(), None, Soft(), 4, 64)


def qkv(count: int, heads: int, kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(count, n, width, device=DEVICE) for n in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def close(name: str, mine: Tensor, other: Tensor, most: float) -> None:
    """Errors of single entries average out in the norm."""
    mine, other = mine.detach().double().cpu(), other.detach().double().cpu()
    least = 1e-2 * other.numel() ** 0.5  # of what is 0 in truth, such as gradients where a query sees one key
    error = float((mine - other).norm() / other.norm().clamp(min=least))
    assert error < most, f"{name}: relative error {error:.4f}"


MOST = {torch.bfloat16: 0.015, torch.float16: 0.003, torch.float32: 1e-4}  # bfloat16 keeps 8 bits (0.4 %), float16 11


def against_the_oracle(
    rule: Rule,
    layout: Layout,
    backend: str,
    heads: int = 4,
    kv_heads: int = 4,
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    mechanism: Mechanism | None = None,
) -> None:
    mechanism = mechanism or plainly()
    count = len(layout.info.sample)
    ours = [x.to(dtype).requires_grad_() for x in qkv(count, heads, kv_heads, width)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    mine = plan_attention(rule, layout, backend=backend, dtype=dtype).attend(*ours, mechanism, 0)
    exact = copy.deepcopy(mechanism).double()
    other = plan_attention(rule, layout, backend="dense").attend(*theirs, exact, 0)
    assert mine.dtype == dtype
    close("read", mine, other, MOST[dtype])
    push = torch.randn_like(mine)
    mine.backward(push)
    other.backward(push.double())
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        assert a.grad is not None
        assert torch.isfinite(a.grad).all()
        close(f"gradient of {name}", a.grad, b.grad, MOST[dtype])  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize("case", LAYOUTS)
def test_variable_length_kernel(lay, case, heads, kv_heads):
    against_the_oracle(PREFIX_LM, lay(LAYOUTS[case], device=DEVICE), "varlen", heads, kv_heads)


@pytest.mark.parametrize("width", [12, 20, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variable_length_kernel_at_other_widths(lay, width, dtype):
    against_the_oracle(PREFIX_LM, lay(ODD, device=DEVICE), "varlen", 4, 2, width, dtype)


def test_a_score_that_factors_runs_on_the_variable_length_kernel(lay):
    mechanism = Mechanism(Cosine(), None, Soft(), 4, 64).to(DEVICE)
    against_the_oracle(PREFIX_LM, lay(ODD, device=DEVICE), "varlen", 4, 2, mechanism=mechanism)


def test_no_gradient_crosses_samples_in_the_variable_length_kernel(lay):
    layout = lay(ODD, device=DEVICE)
    inputs = [x.bfloat16().requires_grad_() for x in qkv(len(layout.info.sample), 4, 4, 64)]
    read = plan_attention(PREFIX_LM, layout, backend="varlen", dtype=torch.bfloat16).attend(*inputs, plainly(), 0)
    sample_T = layout.info.sample
    for sample in range(len(layout.spans)):
        for grad in torch.autograd.grad(read[sample_T == sample].float().square().sum(), inputs, retain_graph=True):
            assert torch.count_nonzero(grad[sample_T != sample]) == 0


@compiler_warns
@pytest.mark.parametrize(
    ("rule", "case", "heads", "kv_heads", "width"),
    [
        *((rule, "odd", 4, 2, 64) for rule in RULES),
        *((rule, case, 4, 2, 64) for rule in ("default", "window") for case in ("even", "causal then free")),
        ("window", "odd", 4, 4, 64),
        ("window", "odd", 6, 2, 8),
    ],
)
def test_block_sparse_kernel(lay, rule, case, heads, kv_heads, width):
    torch._dynamo.reset()  # or the many cases here would exceed the compiler's limit of recompilations
    layout = lay({"odd": ODD, "even": EVEN, "causal then free": MIXED}[case], device=DEVICE)
    against_the_oracle(RULES[rule], layout, "flex", heads, kv_heads, width)


@compiler_warns
def test_streams_of_many_lengths_compile_the_block_sparse_kernel_a_few_times(lay):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for count in range(130, 240, 9):
        against_the_oracle(PREFIX_LM & Window(50), lay([[(count, False)], [(7, True)]], device=DEVICE), "flex")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "fields", [ODD, EVEN, MIXED, [[(300, False)]]], ids=["odd", "even", "causal then free", "long"]
)
def test_runs_in_float32(lay, rule, fields):
    against_the_oracle(RULES[rule], lay(fields, device=DEVICE), "auto", 4, 2, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ALiBi", "RelativeBias"])
def test_mechanisms_with_priors(lay, name, dtype):
    prior = {"ALiBi": mm.attention.ALiBi(), "RelativeBias": mm.attention.RelativeBias(8)}[name]
    mechanism = Mechanism(mm.attention.ScaledDotProduct(), prior, Soft(), 4, 64).to(DEVICE)
    layout = lay(ODD, device=DEVICE)
    count = len(layout.info.sample)
    ours = [x.to(dtype) for x in qkv(count, 4, 2, 64)]
    mine = plan_attention(PREFIX_LM, layout, dtype=dtype, bare=mechanism.bare).attend(*ours, mechanism, 0)
    exact = copy.deepcopy(mechanism).double()
    other = plan_attention(PREFIX_LM, layout, backend="dense").attend(*(x.double() for x in ours), exact, 0)
    close("read", mine, other, MOST[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["default", "window"])
@pytest.mark.parametrize("many", [1, 3], ids=["a token at a time", "three at once"])
@compiler_warns
def test_cached_tokens_are_the_whole_pass(lay, rule, dtype, many):
    prompts = [[(130, True), (1, False)], [(2, False)], [(65, True), (8, False)]]
    whole = lay([[*fields, (3, False)] for fields in prompts], device=DEVICE)
    q, k, v = (x.to(dtype) for x in qkv(len(whole.info.sample), 4, 2, 64))
    exact = (x.double() for x in (q, k, v))
    expected = plan_attention(RULES[rule], whole, backend="dense").attend(*exact, plainly(), 0)
    lengths = [sum(n for n, _ in fields) for fields in prompts]
    starts = [sum(lengths[:i]) + 3 * i for i in range(3)]
    cache = Cache(keys=[(2, 64, 64)], batch=3, capacity=140, device=DEVICE, dtype=dtype)

    def attended(rows: Tensor, layout: Layout) -> None:
        plan = plan_attention(RULES[rule], layout, dtype=dtype, cache=cache)
        close("read", plan.attend(q[rows], k[rows], v[rows], plainly(), 0), expected[rows], MOST[dtype])

    rows = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    attended(rows, lay(prompts, device=DEVICE))
    for step in range(0, 3, many):
        rows = torch.cat([torch.arange(many) + s + n + step for s, n in zip(starts, lengths, strict=True)])
        spans = lay([[(many, False)]] * 3).spans
        attended(rows, Layout(spans, whole.info[rows.to(DEVICE)]))


TASKS = ("text -> out:story", "text -> label")
KINDS = {"text": TextBytes(), "story": TextBytes(causal=True), "label": Labels(("a", "b", "c"))}
CORE = mm.Core(width=128, depth=3, heads=4, kv_heads=2)
CORES = {
    "transformer": CORE,
    "window": CORE.replace(mask=PREFIX_LM & Window(9)),
    "prior": CORE.replace(prior=mm.attention.ALiBi()),
    "recurrent": CORE.replace(block=(mm.layers.Recurrent(), mm.layers.SelfAttention(), mm.layers.MLP())),
    "two cores": mm.EncoderDecoder(reader=CORE, writer=CORE),
}


def model_of(core: mm.Core | mm.EncoderDecoder = CORE, device: str = DEVICE) -> mm.Model:
    return mm.Model(KINDS, core, list(TASKS)).to(device).train()


def samples_of(count: int, seed: int = 0) -> list[tuple[str, dict[str, str]]]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        size = int(torch.randint(1, 150, (), generator=draw))
        text = "".join(chr(97 + int(c)) for c in torch.randint(26, (size,), generator=draw))
        made.append((TASKS[i % 2], {"text": text, "out": text[::-1][:40], "label": "abc"[size % 3]}))
    return made


def gradients(
    model: mm.Model, stream: mm.stream.Stream, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model.loss(stream)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@compiler_warns
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", CORES)
def test_a_training_step_is_that_of_the_cpu(name, dtype, most):
    model = model_of(CORES[name])
    stream = model.packer(samples_of(9))
    loss, grads = gradients(model, stream.to(DEVICE), dtype)
    exact = model_of(CORES[name], "cpu").double()
    wanted = exact.loss(stream)
    wanted.backward()
    torch.testing.assert_close(loss.cpu().double(), wanted.detach(), atol=0, rtol=most / 10)
    for key, parameter in exact.named_parameters():
        assert (key in grads) == (parameter.grad is not None)
        if parameter.grad is not None and float(parameter.grad.norm()) > 1e-6:
            close(key, grads[key], parameter.grad, most)


@compiler_warns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_pieces_and_recomputed_blocks_agree(dtype):
    model = model_of()
    other = copy.deepcopy(model)
    compile_blocks(other)
    recompute(other)
    for seed in range(4):
        stream = model.packer(samples_of(3 + seed, seed)).to(DEVICE)
        (loss, grads), (again, grads_again) = (gradients(m, stream, dtype) for m in (model, other))
        torch.testing.assert_close(loss, again, atol=0, rtol=MOST[dtype])
        for key, grad in grads.items():
            close(key, grads_again[key], grad, 3 * MOST[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", TASKS)
def test_packed_is_alone(task, dtype):
    model = model_of().eval()
    samples = [(task, sample) for _, sample in samples_of(8)]

    def logits(stream: mm.stream.Stream) -> Tensor:
        with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.logits(stream.to(DEVICE))[task]

    packed = model.packer(samples)
    alone = [logits(model.packer([samples[i]])) for i in packed.readings[task].samples]
    close("logits", logits(packed), torch.cat(alone), {torch.float32: 1e-5}.get(dtype, 0.01))


def test_no_gradient_crosses_samples_of_a_model():
    model = model_of()
    stream = model.packer(samples_of(4)).to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rows = model.rows(stream).detach().requires_grad_()
        state = model.core(rows, stream.position_TA, stream.layout)
    sample_T = stream.layout.info.sample
    (grad,) = torch.autograd.grad(state[sample_T == 1].float().square().sum(), rows)
    assert torch.count_nonzero(grad[sample_T != 1]) == 0
    assert torch.count_nonzero(grad[sample_T == 1]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_large_vocabulary_is_the_plain_one(dtype):
    """So many logits that the head makes them some rows at a time."""
    from multimodal.heads import NextToken, Readout

    rows, vocab = 4099, 40000
    readout = Readout(64, vocab, 1).to(DEVICE)
    state = torch.randn(rows, 64, device=DEVICE, requires_grad=True)
    target = torch.randint(vocab, (rows,), device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine = NextToken().state_loss(readout, state, [rows], target, [rows])
    exact = copy.deepcopy(readout).double()
    twin = state.detach().double().requires_grad_()
    plain = F.cross_entropy(exact.linear(twin), target, reduction="sum")
    torch.testing.assert_close(mine.double(), plain, atol=0, rtol=MOST[dtype])
    grads = [
        torch.autograd.grad(x, y)
        for x, y in ((mine, (state, readout.linear.weight)), (plain, (twin, exact.linear.weight)))
    ]
    for name, a, b in zip(("state", "weight"), *grads, strict=True):
        close(f"gradient of {name}", a, b, MOST[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_steps_learn(dtype, optimizer):
    model = model_of()
    stream = model.packer(samples_of(8)).to(DEVICE)
    steps = make_optimizer(model, Recipe(lr=3e-3, optimizer=optimizer), torch.device(DEVICE))
    losses = []
    for _ in range(25):
        losses.append(float(gradients(model, stream, dtype)[0]))
        steps.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_never_waits_for_the_device(no_waiting):
    """Between a stream that is on the device and gradients that are there."""
    model = model_of(CORE.replace(drop_path=0.2))
    stream = model.packer(samples_of(8)).to(DEVICE)
    gradients(model, stream, torch.bfloat16)  # what is made once
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    gradients(model, stream, torch.bfloat16)


def test_answers_are_those_of_the_cpu(lively):
    model = lively(model_of())
    texts = [{"text": sample["text"]} for _, sample in samples_of(6)]
    mine = [x.value for x in model.generate(TASKS[0], texts, max_tokens=24)]
    assert len(set(mine)) > 1
    assert mine == [model.generate(TASKS[0], [text], max_tokens=24)[0].value for text in texts]
    assert mine == [x.value for x in model.to("cpu").generate(TASKS[0], texts, max_tokens=24)]


RESUMED = """
import sys
import torch
import multimodal as mm
from multimodal_tokenizers import Labels, TextBytes

torch.use_deterministic_algorithms(True)
folder, device, precision = sys.argv[1:]
TASK = "text -> label"
data = {TASK: [{"text": "abcdefgh"[i % 8] * (3 + 7 * i % 50), "label": "ab"[i % 2]} for i in range(64)]}
settings = dict(steps=12, batch=8, checkpoint_every=4, ema=0.9, device=device, precision=precision, resume=True, quiet=True)

def trained(name, *stops):
    for stop in stops:
        kinds = {"text": TextBytes(), "label": Labels(("a", "b"))}
        model = mm.Model(kinds, mm.Core(width=64, depth=2, heads=2, dropout=0.1), [TASK])

        def tracker(row, stop=stop):
            if row["step"] == stop:
                raise KeyboardInterrupt

        try:
            mm.fit(model, data, folder=folder + name, trackers=[tracker], **settings)
        except KeyboardInterrupt:
            pass
    return {name: p.detach().cpu() for name, p in model.named_parameters()}

straight, resumed = trained("straight", 0), trained("resumed", 6, 0)
assert all(torch.equal(straight[name], resumed[name]) for name in straight), "not the same weights"
print("the same weights")
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_run(tmp_path, precision):
    """Where PyTorch is told to be deterministic: the kernels' backward passes add up in any order otherwise."""
    pytest.importorskip("rich")  # which a training run imports
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(map(str, (root, root / "tokenizers")))
    env = {**os.environ, "PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", RESUMED, f"{tmp_path}/", DEVICE, precision]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("the same weights\n"), done.stdout + done.stderr


def test_what_needs_half_precision_says_so_by_its_name(lay):
    with pytest.raises(ConfigError, match="runs only the default rule"):
        plan_attention(PREFIX_LM, lay(MIXED, device=DEVICE), backend="varlen", dtype=torch.bfloat16)

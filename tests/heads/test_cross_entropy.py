"""The cross entropy of a large vocabulary, made some rows at a time, against PyTorch's own on all logits."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multimodal as mm
from multimodal.heads import cross_entropy
from multimodal.heads.cross_entropy import linear_cross_entropy
from multimodal_tokenizers import Labels, TextBytes

ROWS, WIDTH, VOCAB = 37, 6, 11


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Five rows at a time: seven chunks, and one of two rows."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 5 * VOCAB)
    monkeypatch.setattr(cross_entropy, "CHUNK_CUDA", 5 * VOCAB)


def case(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    return linear, torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), torch.randint(0, VOCAB, (ROWS,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_all_logits_at_once(smoothing, bias):
    linear, state_ND, target_N = case(bias)
    found = 3 * linear_cross_entropy(linear, state_ND, target_N, smoothing)
    wanted = 3 * F.cross_entropy(linear(state_ND), target_N, label_smoothing=smoothing, reduction="sum")
    assert "_ChunkedBackward" in str(found.grad_fn and found.grad_fn.next_functions)
    inputs = [state_ND, *linear.parameters()]
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    for mine, plain in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fixed", ["state", "weight", "bias", "all"])
def test_what_is_not_learned_gets_no_gradient(fixed):
    linear, state_ND, target_N = case()
    parts = {"state": state_ND, "weight": linear.weight, "bias": linear.bias}
    for name, part in parts.items():
        part.requires_grad_(fixed not in (name, "all"))
    found = linear_cross_entropy(linear, state_ND, target_N)
    wanted = F.cross_entropy(linear(state_ND), target_N, reduction="sum")
    torch.testing.assert_close(found, wanted)
    learned = [part for part in parts.values() if part.requires_grad]
    assert found.requires_grad == bool(learned)
    if learned:
        for mine, plain in zip(torch.autograd.grad(found, learned), torch.autograd.grad(wanted, learned), strict=True):
            torch.testing.assert_close(mine, plain)
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(linear, state_ND, target_N), wanted.detach())


def test_autocast_adds_up_in_float32():
    linear, state_ND, target_N = case(dtype=torch.float32)
    inputs = [state_ND, *linear.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(linear, state_ND, target_N)
        wanted = F.cross_entropy(linear(state_ND).float(), target_N, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)  # the same products in bfloat16
    exact = torch.autograd.grad(F.cross_entropy(linear(state_ND), target_N, reduction="sum"), inputs)
    for mine, plain, right in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), exact, strict=True
    ):
        assert mine.dtype == torch.float32
        assert float((mine - right).norm()) <= 1.2 * float((plain - right).norm())  # no worse than without chunks


def test_a_second_derivative_is_refused():
    linear, state_ND, target_N = case()
    loss = linear_cross_entropy(linear, state_ND, target_N)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, state_ND, create_graph=True)


def test_no_logits_of_all_rows_are_kept_or_made():
    rows, vocab, width = 512, 256, 8
    linear, state_ND = nn.Linear(width, vocab), torch.randn(rows, width, requires_grad=True)
    target_N = torch.randint(0, vocab, (rows,))

    def largest(loss) -> int:
        """Bytes of the largest piece of memory that loss and gradients ask for."""
        with torch.profiler.profile(profile_memory=True) as profile:
            loss().backward()
        return max(event.cpu_memory_usage for event in profile.events() or ())

    logits = 4 * rows * vocab
    assert largest(lambda: F.cross_entropy(linear(state_ND), target_N, reduction="sum")) >= logits
    assert largest(lambda: linear_cross_entropy(linear, state_ND, target_N)) <= logits / 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_heads_lose_the_same_in_chunks(monkeypatch, smoothing):
    cases = {
        "-> text": [{"text": text} for text in ("one", "twenty", "three hundred")],
        "text -> label": [{"text": "a", "label": "b"}, {"text": "cd", "label": "a"}],
    }
    heads = {
        "-> text": mm.NextToken(label_smoothing=smoothing),
        "text -> label": mm.Classify(label_smoothing=smoothing),
    }
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(tuple("abcdefgh"))},
        mm.Core(width=8, depth=1, heads=2),
        [mm.Task(task, head) for task, head in heads.items()],
    )
    for task, samples in cases.items():
        found = {}
        for chunk in (1, 2**20):
            monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
            model.zero_grad()
            loss = model.loss(model.pack(task, samples))
            loss.backward()
            found[chunk] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found[chunk]["loss"] = loss.detach()
        assert found[1].keys() == found[2**20].keys()
        for name, grad in found[1].items():
            torch.testing.assert_close(grad, found[2**20][name], rtol=1e-5, atol=1e-7)


def test_an_evaluation_makes_no_gradients():
    """Where nothing is learned no (V, D) tensor is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        seen: ClassVar[set] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                self.seen.add(tuple(out.shape))
            return out

    linear, state = nn.Linear(8, 3001), torch.randn(700, 8, requires_grad=True)
    target = torch.randint(3001, (700,))
    with Shapes() as shapes, torch.no_grad():
        linear_cross_entropy(linear, state, target)
    assert shapes.seen
    assert not {(3001, 8), (700, 8)} & shapes.seen


def test_a_layer_that_is_watched_is_called():
    linear, seen = nn.Linear(8, 3001), []
    linear.register_forward_hook(lambda *_: seen.append(1))
    linear_cross_entropy(linear, torch.randn(700, 8), torch.randint(3001, (700,)))
    assert seen

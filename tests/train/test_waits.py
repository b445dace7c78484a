"""On CUDA the host must not wait for the device inside a training step; see also the one wait of `fit`."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import multimodal as mm
from multimodal_tokenizers import ImagePatches, Labels, TextBytes


@contextmanager
def no_waits() -> Iterator[None]:
    """Any wait for the device is an error; torch tells them all but those of copies from memory that is not pinned."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def model() -> mm.Model:
    kinds = {"image": ImagePatches(patch=4), "text": TextBytes(), "label": Labels(tuple("abc"))}
    tasks = ["image -> label", "image -> text", "-> text"]
    return mm.Model(kinds, mm.Core(width=32, depth=2, heads=2), tasks).train()


def stream(model: mm.Model, step: int):
    samples = []
    for i in range(6):
        image = torch.rand(3, 8, 8 + 4 * (i % 3), generator=torch.Generator().manual_seed(i))
        text = "abcdefghij"[: 2 + (i + step) % 7]
        samples += [("image -> label", {"image": image, "label": "abc"[i % 3]}), ("-> text", {"text": text})]
        samples.append(("image -> text", {"image": image, "text": text}))
    return model.packer(samples)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_on_cuda_waits_for_nothing(precision):
    trained = model().cuda()
    optimizer = torch.optim.AdamW(trained.parameters(), fused=True)

    def step(packed):
        half = precision == "bfloat16"
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            loss = trained.loss(packed.to("cuda"))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    step(stream(trained, 0))  # what is made once (turns, kernels, the optimiser's state) may wait
    packed = stream(trained, 1)
    with no_waits():
        loss = step(packed)
    assert torch.isfinite(loss).all()


@pytest.mark.cuda
def test_copies_to_cuda_that_do_not_wait_arrive_complete():
    packed = stream(model(), 0)
    torch.cuda._sleep(10**8)  # the copies come to pass long after the call
    moved, again = packed.to("cuda"), packed.to("cuda")
    del again
    back = moved.to("cpu")
    torch.cuda.synchronize()
    assert all(torch.equal(back.content[kind], x) for kind, x in packed.content.items())
    assert torch.equal(back.position_TA, packed.position_TA)
    for there, here in zip(back.layout.info.numbers, packed.layout.info.numbers, strict=True):
        assert torch.equal(there, here)
    for pattern, reading in packed.readings.items():
        target = back.readings[pattern].target
        assert target is not None
        assert reading.target is not None
        assert torch.equal(target, reading.target)
        assert torch.equal(back.readings[pattern].row_N, reading.row_N)

"""What packing costs where it gains nothing: samples of one length, packed by us and as a plain batch of the same transformer."""

from dataclasses import replace
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.text import MIDDLE, QUICK, TASK, samples, texts, tokens
from benchmarks.speed.work import training

SHAPE = replace(MIDDLE, length=128, batch=32)


def our_model(place: Place) -> tuple[Any, Any]:
    """Ours with its defaults, and the samples as they are packed."""
    import multimodal as mm
    from multimodal_tokenizers import TextBytes

    shape = place.sizes
    core = mm.Core(width=shape.width, depth=shape.depth, heads=shape.heads, mlp_width=shape.hidden)
    model = mm.Model({"text": TextBytes()}, core, [TASK], seed=place.seed).train().to(place.device)
    return model, model.packer(samples(place)).to(place.device)


def ours(place: Place) -> Job:
    model, stream = our_model(place)
    return training(model, lambda: model.loss(stream), lambda: model.logits(stream)[TASK], **tokens(place))


def theirs(place: Place) -> Job:
    """The same weights, read by functions of torch on (B, T, D); norms and rotation are our own, which are no part of packing."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from multimodal.positions import rotate

    shape = place.sizes
    model, stream = our_model(place)
    state = dict(model.named_parameters())
    head = "readouts.text_NextToken"
    ids = texts(place).to(place.device)
    target = stream.readings[TASK].target
    position_TA = stream.position_TA[: shape.length]  # the same for every sample
    rotation = model.core.rotations(position_TA)[shape.width // shape.heads]

    def logits() -> Tensor:
        opening = state[f"{head}.query"].expand(len(ids), 1, -1)
        x = torch.cat([opening, F.embedding(ids, state["embeds.text.weight"])], 1)
        for block in model.core.blocks:
            attention, mlp = block.layers[0].body.attention, block.layers[1].body
            q, k, v = F.linear(block.layers[0].norm(x), attention.qkv.weight).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (shape.heads, -1)) for y in (q, k, v))
            q, k = rotate(attention.norm_q(q), rotation), rotate(attention.norm_k(k), rotation)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(read.transpose(1, 2).flatten(2), attention.out.weight)
            gate, up = F.linear(block.layers[1].norm(x), mlp.gate_up.weight).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, mlp.down.weight)
        x = model.core.norm(x)
        return F.linear(x, state[f"{head}.linear.weight"], state[f"{head}.linear.bias"]).flatten(0, 1)

    return training(model, lambda: F.cross_entropy(logits(), target), logits, **tokens(place))


ROWS = (
    Row(
        name="uniform",
        what=f"train step on {SHAPE.batch} texts of {SHAPE.length} tokens, {SHAPE.width}x{SHAPE.depth}, fp32: packed, and as a "
        "plain batch through the same weights, norms and rotation, attended by one call",
        peer="our own weights on (B, T, D)",
        goal=0.95,
        sizes=SHAPE,
        quick=QUICK,
        ours=ours,
        theirs=theirs,
        tolerance=1e-5,
    ),
)

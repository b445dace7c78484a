"""What packing costs where it gains nothing: samples of one length, packed by us and as a plain batch of the same transformer."""

from dataclasses import replace
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.text import MIDDLE, QUICK, TASK, Shape, facts, step, texts

LENGTH, BATCH = 128, 32


def chosen(place: Place) -> Shape:
    return replace(MIDDLE, length=LENGTH, batch=BATCH) if not place.quick else replace(MIDDLE, **QUICK)


def our_model(place: Place) -> tuple[Any, Any]:
    """Ours with its defaults, and the samples as they are packed."""
    import multimodal as mm
    from multimodal_tokenizers import TextBytes

    shape = chosen(place)
    core = mm.Core(width=shape.width, depth=shape.depth, heads=shape.heads, mlp_width=shape.hidden)
    model = mm.Model({"text": TextBytes()}, core, [TASK], seed=place.seed).train().to(place.device)
    samples = [(TASK, {"text": bytes(row).decode()}) for row in texts(shape, place.seed).tolist()]
    return model, model.packer(samples).to(place.device)


def ours(place: Place) -> Job:
    model, stream = our_model(place)
    return Job(
        step(model.parameters(), lambda: model.loss(stream)),
        outputs=lambda: model.logits(stream)[TASK],
        **facts(model, chosen(place)),
    )


def theirs(place: Place) -> Job:
    """The same weights, read by functions of torch on (B, T, D); norms and rotation are our own, which are no part of packing."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from multimodal.positions import rotate

    shape = chosen(place)
    model, stream = our_model(place)
    state = dict(model.named_parameters())
    head = "readouts.text_NextToken"
    ids = texts(shape, place.seed).to(place.device)
    target = stream.readings[TASK].target
    position_TA = stream.position_TA[: shape.length]  # the same for every sample
    turns = model.core.turns(position_TA)(shape.width // shape.heads)

    def logits() -> Tensor:
        opening = state[f"{head}.query"].expand(len(ids), 1, -1)
        x = torch.cat([opening, F.embedding(ids, state["embeds.text.weight"])], 1)
        for block in model.core.blocks:
            attention, mlp = block.layers[0].body.attention, block.layers[1].body
            q, k, v = F.linear(block.layers[0].norm(x), attention.qkv.weight).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (shape.heads, -1)) for y in (q, k, v))
            q, k = rotate(attention.norm_q(q), turns), rotate(attention.norm_k(k), turns)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(read.transpose(1, 2).flatten(2), attention.out.weight)
            gate, up = F.linear(block.layers[1].norm(x), mlp.gate_up.weight).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, mlp.down.weight)
        x = model.core.norm(x)
        return F.linear(x, state[f"{head}.linear.weight"], state[f"{head}.linear.bias"]).flatten(0, 1)

    return Job(
        step(model.parameters(), lambda: F.cross_entropy(logits(), target)), outputs=logits, **facts(model, shape)
    )


ROWS = (
    Row(
        name="uniform",
        what=f"train step on {BATCH} texts of {LENGTH} tokens, {MIDDLE.width}x{MIDDLE.depth}, fp32: packed, and as a plain batch "
        "through the same weights, norms and rotation, attended by one call",
        peer="our own weights on (B, T, D)",
        goal=0.95,
        ours=ours,
        theirs=theirs,
        tolerance=1e-5,
    ),
)

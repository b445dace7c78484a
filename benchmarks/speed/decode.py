"""Greedy decoding of 256 tokens after a prompt of 64, one answer or sixteen, against Hugging Face and x-transformers."""

from dataclasses import dataclass
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.work import WEIGHTS, ids, our_llama, parameter_count, save_weights, their_llama, x_transformer

TASK = "text:ids -> ids"
VOCAB = 1001  # 1000 ids, and one more that opens an answer (theirs reads it, ours has a query) and stops it


@dataclass(frozen=True)
class Shape:
    """A model, and how many answers of how many tokens; the prompt counts the token that opens the answer."""

    batch: int
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int = 688  # of the gated MLP
    prompt: int = 64
    new: int = 256

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}, {self.heads} heads, batch {self.batch}, prompt {self.prompt}, {self.new} new tokens"


QUICK = {"width": 64, "depth": 2, "heads": 2, "hidden": 176, "prompt": 8, "new": 12}


def prompts(place: Place) -> Any:
    """Ids (batch, prompt - 1): the same for both sides."""
    import torch

    draw = torch.Generator().manual_seed(place.seed)
    return torch.randint(VOCAB - 1, (place.sizes.batch, place.sizes.prompt - 1), generator=draw)


def opened_prompts(place: Place) -> Any:
    """The prompts with the token that opens an answer behind them."""
    import torch

    text = prompts(place)
    return torch.cat([text, torch.full((len(text), 1), VOCAB - 1)], 1).to(place.device)


def counted(model: Any, place: Place) -> dict[str, Any]:
    tokens = place.sizes.batch * place.sizes.new
    return {"units": tokens, "unit": "tokens", "facts": {"parameters": parameter_count(model)}}


def ours(place: Place) -> Job:
    import torch

    shape = place.sizes
    model = our_llama(ids(VOCAB - 1, causal=True), "ids", TASK, place)
    if not (place.folder / WEIGHTS).is_file():  # the peer has no token that stops
        with torch.no_grad():
            model.readout(TASK).linear.bias[-1] = -1e9
    model.to(place.device).eval()
    samples = [{"text": row} for row in prompts(place).tolist()]

    def run() -> Any:
        found = model.generate(TASK, samples, max_tokens=shape.new, batch=shape.batch)
        assert all(len(answer.value) == shape.new for answer in found)
        return found

    def outputs() -> Any:
        return {"ids": torch.stack([answer.value for answer in run()]).float()}

    return Job(run, outputs, **counted(model, place))


def theirs_llama(place: Place) -> Job:
    import torch

    shape = place.sizes
    model = their_llama(shape, VOCAB, place, max_position_embeddings=1024, pad_token_id=VOCAB - 1).eval()
    with torch.no_grad():
        model.lm_head.weight[-1] = 0  # logit 0, which is never the largest of a thousand drawn around it: nothing stops
    save_weights(model, place.folder / WEIGHTS)
    model.to(place.device)
    read = opened_prompts(place)
    options = {"attention_mask": torch.ones_like(read), "do_sample": False, "use_cache": True}

    def run() -> Any:
        return model.generate(read, max_new_tokens=shape.new, **options)[:, shape.prompt :]

    return Job(run, lambda: {"ids": run().float()}, **counted(model, place))


def theirs_x(place: Place) -> Job:
    from x_transformers import AutoregressiveWrapper

    shape = place.sizes
    model = x_transformer(shape, VOCAB, shape.prompt + shape.new, place)
    writer = AutoregressiveWrapper(model).eval().to(place.device)
    read = opened_prompts(place)
    return Job(
        lambda: writer.generate(read, shape.new, temperature=0.0, cache_kv=True),
        **counted(model, place),
    )


def rows(name: str, shape: Shape) -> tuple[Row, ...]:
    return (
        Row(
            name=name,
            what=f"greedy decoding, {shape}, fp32; the same function, weights copied, the same ids written",
            peer="transformers Llama generate (sdpa, dynamic cache)",
            needs=("transformers",),
            goal=3.0 if shape.batch == 1 else 2.0,
            sizes=shape,
            quick=QUICK,
            ours=ours,
            theirs=theirs_llama,
            tolerance=0.0,
        ),
        Row(
            name=f"{name}-x",
            what=f"greedy decoding, {shape}, fp32; rotary, RMSNorm, SwiGLU as ours, weights laid out in its own way",
            peer="x-transformers generate (flash, cache_kv)",
            needs=("x-transformers",),
            goal=2.0,
            sizes=shape,
            quick=QUICK,
            ours=ours,
            theirs=theirs_x,
        ),
    )


ROWS = rows("decode-1", Shape(1)) + rows("decode-16", Shape(16))

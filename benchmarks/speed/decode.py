"""Greedy decoding of 256 tokens after a prompt of 64, one answer or sixteen, against Hugging Face and x-transformers."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.speed.row import Job, Place, Row

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


def chosen(shape: Shape, place: Place) -> Shape:
    return replace(shape, **QUICK) if place.quick else shape


def prompts(shape: Shape, seed: int) -> Any:
    """Ids (batch, prompt - 1): the same for both sides."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB - 1, (shape.batch, shape.prompt - 1), generator=draw)


def ours(shape: Shape, place: Place) -> Job:
    import torch
    from safetensors.torch import load_file
    from torch import Tensor

    import multimodal as mm
    from benchmarks.speed.weights import from_llama
    from multimodal.tokenizer import Tokenizer, Tokens

    @dataclass(frozen=True)
    class Ids(Tokenizer):
        """Numbers that are their own ids."""

        causal = True
        vocab_size = VOCAB - 1

        def encode(self, value: list[int]) -> Tokens:
            return Tokens(torch.tensor(value), self.places(len(value)))

        def decode(self, tokens: Tokens) -> Tensor:
            return tokens.content

    shape = chosen(shape, place)
    core = mm.Core(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        mlp_width=shape.hidden,
        qk_norm=False,
        rotary_split=(1, 0, 0),
    )
    model = mm.Model({"ids": Ids()}, core, [TASK], seed=place.seed)
    kept = place.folder / "llama.safetensors"
    if kept.is_file():
        model.load_state_dict(from_llama(load_file(kept), shape.heads, "ids"))
    else:  # the peer has no token that stops
        with torch.no_grad():
            model.readout(TASK).linear.bias[-1] = -1e9
    model.to(place.device).eval()
    samples = [{"text": ids} for ids in prompts(shape, place.seed).tolist()]

    def run() -> Any:
        found = model.generate(TASK, samples, max_tokens=shape.new, batch=shape.batch)
        assert all(len(answer.value) == shape.new for answer in found)
        return found

    def outputs() -> Any:
        return {"ids": torch.stack([answer.value for answer in run()]).float()}

    return Job(run=run, outputs=outputs, **_facts(model, shape))


def _facts(model: Any, shape: Shape) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters())
    return {"units": shape.batch * shape.new, "unit": "tokens", "facts": {"parameters": count}}


def theirs_llama(shape: Shape, place: Place) -> Job:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = chosen(shape, place)
    torch.manual_seed(place.seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        max_position_embeddings=1024,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
        pad_token_id=VOCAB - 1,
    )
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        model.lm_head.weight[-1] = 0  # logit 0, which is never the largest of a thousand drawn around it: nothing stops
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, place.folder / "llama.safetensors")
    model.to(place.device)
    read = _opened(shape, place)
    there = torch.ones_like(read)

    def run() -> Any:
        return model.generate(read, attention_mask=there, max_new_tokens=shape.new, do_sample=False, use_cache=True)[
            :, shape.prompt :
        ]

    return Job(run=run, outputs=lambda: {"ids": run().float()}, **_facts(model, shape))


def _opened(shape: Shape, place: Place) -> Any:
    """The prompts with the token that opens an answer behind them."""
    import torch

    text = prompts(shape, place.seed)
    return torch.cat([text, torch.full((len(text), 1), VOCAB - 1)], 1).to(place.device)


def theirs_x(shape: Shape, place: Place) -> Job:
    import torch
    from x_transformers import AutoregressiveWrapper

    from benchmarks.speed.text import x_transformer

    shape = chosen(shape, place)
    torch.manual_seed(place.seed)
    model = x_transformer(shape, VOCAB, shape.prompt + shape.new)
    writer = AutoregressiveWrapper(model).eval().to(place.device)
    read = _opened(shape, place)

    def run() -> Any:
        return writer.generate(read, shape.new, temperature=0.0, cache_kv=True)

    return Job(run=run, **_facts(model, shape))


def rows(name: str, shape: Shape) -> tuple[Row, ...]:
    return (
        Row(
            name=name,
            what=f"greedy decoding, {shape}, fp32; the same function, weights copied, the same ids written",
            peer="transformers Llama generate (sdpa, dynamic cache)",
            needs=("transformers",),
            goal=3.0 if shape.batch == 1 else 2.0,
            ours=partial(ours, shape),
            theirs=partial(theirs_llama, shape),
            tolerance=0.0,
        ),
        Row(
            name=f"{name}-x",
            what=f"greedy decoding, {shape}, fp32; rotary, RMSNorm, SwiGLU as ours, weights laid out in its own way",
            peer="x-transformers generate (flash, cache_kv)",
            needs=("x-transformers",),
            goal=2.0,
            ours=partial(ours, shape),
            theirs=partial(theirs_x, shape),
            tolerance=None,
        ),
    )


ROWS = rows("decode-1", Shape(1)) + rows("decode-16", Shape(16))

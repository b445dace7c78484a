"""Train steps on text of one length: nanoGPT's CPU shape and a model of 256x6, against Hugging Face and x-transformers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.speed.row import Job, Place, Row

TASK = "-> text"
VOCAB = 257  # bytes, and one more id that opens a text (theirs reads it, ours has a query) and stops it


@dataclass(frozen=True)
class Shape:
    """A model and its batch; `length` tokens of a stream, each with a target: the opening one, and all characters but the last."""

    width: int
    depth: int
    heads: int
    hidden: int  # of the gated MLP
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}, {self.heads} heads, length {self.length}, batch {self.batch}"


NANO = Shape(128, 4, 4, 352, 64, 12)
MIDDLE = Shape(256, 6, 8, 688, 256, 16)
QUICK = {"width": 64, "depth": 2, "heads": 2, "hidden": 176, "length": 16, "batch": 3}


def chosen(shape: Shape, place: Place) -> Shape:
    return replace(shape, **QUICK) if place.quick else shape


def texts(shape: Shape, seed: int) -> Any:
    """Character ids (batch, length - 1): the same for both sides."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return torch.randint(97, 123, (shape.batch, shape.length - 1), generator=draw)


def step(parameters: Any, loss: Callable[[], Any]) -> Callable[[], None]:
    """One training step: forward, loss, backward, fused AdamW, zero_grad."""
    import torch

    optimizer = torch.optim.AdamW(list(parameters), lr=1e-4, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def llama(shape: Shape, place: Place) -> Any:
    """Hugging Face's, with its fused attention; its weights are left in the folder for us."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(place.seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        max_position_embeddings=max(shape.length, 512),
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model = LlamaForCausalLM(config).train()
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, place.folder / "llama.safetensors")
    return model


def build(shape: Shape, place: Place) -> Any:
    """Ours of the same shape; with Llama's weights if they are there."""
    from safetensors.torch import load_file

    import multimodal as mm
    from benchmarks.speed.weights import from_llama
    from multimodal_tokenizers import TextBytes

    core = mm.Core(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        mlp_width=shape.hidden,
        qk_norm=False,
        rotary_split=(1, 0, 0),
    )
    model = mm.Model({"text": TextBytes()}, core, [TASK], seed=place.seed).train()
    kept = place.folder / "llama.safetensors"
    if kept.is_file():
        model.load_state_dict(from_llama(load_file(kept), shape.heads))
    return model


def ours(shape: Shape, place: Place) -> Job:
    shape = chosen(shape, place)
    model = build(shape, place)
    samples = [(TASK, {"text": bytes(row).decode()}) for row in texts(shape, place.seed).tolist()]
    stream = model.packer(samples).to(place.device)
    model.to(place.device)
    return Job(
        run=step(model.parameters(), lambda: model.loss(stream)),
        outputs=lambda: model.logits(stream)[TASK].detach(),
        **facts(model, shape),
    )


def facts(model: Any, shape: Shape) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters())
    return {"units": shape.batch * shape.length, "unit": "tokens", "facts": {"parameters": count}}


def job(model: Any, logits: Callable[[Any], Any], shape: Shape, place: Place) -> Job:
    """A peer's: ids with the opening one before them, targets with the stop behind them."""
    import torch
    import torch.nn.functional as F

    text = texts(shape, place.seed)
    edge = torch.full((len(text), 1), VOCAB - 1)
    read, target = torch.cat([edge, text], 1).to(place.device), torch.cat([text, edge], 1).flatten().to(place.device)
    model.to(place.device)
    return Job(
        run=step(model.parameters(), lambda: F.cross_entropy(logits(read).flatten(0, 1), target)),
        outputs=lambda: logits(read).flatten(0, 1).detach(),
        **facts(model, shape),
    )


def theirs_llama(shape: Shape, place: Place) -> Job:
    shape = chosen(shape, place)
    model = llama(shape, place)
    return job(model, lambda ids: model(ids).logits, shape, place)


def theirs_gpt2(shape: Shape, place: Place) -> Job:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = chosen(shape, place)
    torch.manual_seed(place.seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.depth,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model = GPT2LMHeadModel(config).train()
    return job(model, lambda ids: model(ids).logits, shape, place)


def x_transformer(shape: Any, vocab: int, longest: int) -> Any:
    """x-transformers of a shape as its documentation advises: rotary, RMSNorm, SwiGLU without biases, flash attention."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        attn_dim_head=shape.width // shape.heads,
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=shape.width // shape.heads,
        use_rmsnorm=True,
        ff_swish=True,
        ff_glu=True,
        ff_no_bias=True,
        ff_mult=shape.hidden / shape.width,
    )
    return TransformerWrapper(num_tokens=vocab, max_seq_len=longest, attn_layers=layers, use_abs_pos_emb=False)


def theirs_x(shape: Shape, place: Place) -> Job:
    import torch

    shape = chosen(shape, place)
    torch.manual_seed(place.seed)
    model = x_transformer(shape, VOCAB, shape.length).train()
    return job(model, model, shape, place)


def rows(name: str, shape: Shape) -> tuple[Row, ...]:
    return (
        Row(
            name=f"{name}-llama",
            what=f"train step on text, {shape}, fp32; the same function, weights copied",
            peer="transformers Llama (sdpa)",
            needs=("transformers",),
            goal=1.2,
            ours=partial(ours, shape),
            theirs=partial(theirs_llama, shape),
            tolerance=1e-4,
        ),
        Row(
            name=f"{name}-gpt2",
            what=f"train step on text, {shape}, fp32; LayerNorm, GELU, learned places and biases, so not our function",
            peer="transformers GPT-2 (sdpa)",
            needs=("transformers",),
            goal=1.2,
            ours=partial(ours, shape),
            theirs=partial(theirs_gpt2, shape),
            tolerance=None,
        ),
        Row(
            name=f"{name}-x",
            what=f"train step on text, {shape}, fp32; rotary, RMSNorm, SwiGLU as ours, weights laid out in its own way",
            peer="x-transformers (flash)",
            needs=("x-transformers",),
            goal=1.2,
            ours=partial(ours, shape),
            theirs=partial(theirs_x, shape),
            tolerance=None,
        ),
    )


ROWS = rows("text-nano", NANO) + rows("text", MIDDLE)

"""Train steps on text of one length: nanoGPT's CPU shape and a model of 256x6, against Hugging Face and x-transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.work import WEIGHTS, our_llama, save_weights, their_llama, training, x_transformer

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


def texts(place: Place) -> Any:
    """Character ids (batch, length - 1): the same for both sides."""
    import torch

    draw = torch.Generator().manual_seed(place.seed)
    return torch.randint(97, 123, (place.sizes.batch, place.sizes.length - 1), generator=draw)


def our_model(place: Place) -> Any:
    from multimodal_tokenizers import TextBytes

    return our_llama(TextBytes(), "text", TASK, place).train().to(place.device)


def samples(place: Place) -> list[tuple[str, dict[str, str]]]:
    return [(TASK, {"text": bytes(row).decode()}) for row in texts(place).tolist()]


def tokens(place: Place) -> dict[str, Any]:
    """What a step is counted by."""
    return {"units": place.sizes.batch * place.sizes.length, "unit": "tokens"}


def ours(place: Place) -> Job:
    model = our_model(place)
    stream = model.packer(samples(place)).to(place.device)
    return training(model, lambda: model.loss(stream), lambda: model.logits(stream)[TASK].detach(), **tokens(place))


def peer(model: Any, logits: Callable[[Any], Any], place: Place) -> Job:
    """Ids with the opening one before them, targets with the stop behind them."""
    import torch
    import torch.nn.functional as F

    text = texts(place)
    edge = torch.full((len(text), 1), VOCAB - 1)
    read, target = torch.cat([edge, text], 1).to(place.device), torch.cat([text, edge], 1).flatten().to(place.device)
    model.to(place.device).train()
    return training(
        model,
        lambda: F.cross_entropy(logits(read).flatten(0, 1), target),
        lambda: logits(read).flatten(0, 1).detach(),
        **tokens(place),
    )


def llama(place: Place) -> Any:
    """Hugging Face's; its weights are left in the folder for us."""
    longest = max(place.sizes.length, 512)
    model = their_llama(place.sizes, VOCAB, place, max_position_embeddings=longest, use_cache=False)
    save_weights(model, place.folder / WEIGHTS)
    return model.to(place.device).train()


def theirs_llama(place: Place) -> Job:
    model = llama(place)
    return peer(model, lambda ids: model(ids).logits, place)


def theirs_gpt2(place: Place) -> Job:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(place.seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=place.sizes.length,
        n_embd=place.sizes.width,
        n_layer=place.sizes.depth,
        n_head=place.sizes.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model = GPT2LMHeadModel(config)
    return peer(model, lambda ids: model(ids).logits, place)


def theirs_x(place: Place) -> Job:
    model = x_transformer(place.sizes, VOCAB, place.sizes.length, place)
    return peer(model, model, place)


def rows(name: str, shape: Shape) -> tuple[Row, ...]:
    work: dict[str, Any] = {"sizes": shape, "quick": QUICK, "goal": 1.2, "ours": ours}
    what = f"train step on text, {shape}, fp32;"
    return (
        Row(
            name=f"{name}-llama",
            what=f"{what} the same function, weights copied",
            peer="transformers Llama (sdpa)",
            needs=("transformers",),
            theirs=theirs_llama,
            tolerance=1e-4,
            **work,
        ),
        Row(
            name=f"{name}-gpt2",
            what=f"{what} LayerNorm, GELU, learned places and biases, so not our function",
            peer="transformers GPT-2 (sdpa)",
            needs=("transformers",),
            theirs=theirs_gpt2,
            **work,
        ),
        Row(
            name=f"{name}-x",
            what=f"{what} rotary, RMSNorm, SwiGLU as ours, weights laid out in its own way",
            peer="x-transformers (flash)",
            needs=("x-transformers",),
            theirs=theirs_x,
            **work,
        ),
    )


ROWS = rows("text-nano", NANO) + rows("text", MIDDLE)

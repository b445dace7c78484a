"""Train steps of a small vision transformer against timm's: each as it comes, the same function, each at its best setting."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.work import save_weights, training

TASK = "image -> label"
CLASSES = 10
WEIGHTS = "timm.safetensors"  # the name under which the peer leaves its weights for us


@dataclass(frozen=True)
class Shape:
    """A model and its pictures, `side` x `side` pixels each."""

    width: int = 192
    depth: int = 6
    heads: int = 3
    hidden: int = 512  # of a gated MLP; timm's plain one has 4 x width, which is as many weights
    side: int = 32
    patch: int = 4
    batch: int = 128


QUICK = {"width": 48, "depth": 2, "heads": 2, "hidden": 128, "side": 8, "batch": 4}


def pictures(place: Place) -> tuple[Any, Any]:
    """Pictures (B, C, Y, X) in 0..1 and their classes (B): the same for both sides."""
    import torch

    shape, draw = place.sizes, torch.Generator().manual_seed(place.seed)
    images = torch.rand(shape.batch, 3, shape.side, shape.side, generator=draw)
    return images.to(place.device), torch.randint(CLASSES, (shape.batch,), generator=draw).to(place.device)


def timm_model(place: Place, **settings: Any) -> Any:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(place.seed)
    shape = place.sizes
    model = VisionTransformer(
        img_size=shape.side,
        patch_size=shape.patch,
        num_classes=CLASSES,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        **settings,
    )
    return model.to(place.device).train()


def timm_job(place: Place, model: Any, forward: Callable[[Any], Any]) -> Job:
    import torch.nn.functional as F

    images, classes = pictures(place)
    images = images * 2 - 1  # as our tokenizer does
    return training(
        model,
        lambda: F.cross_entropy(forward(images).float(), classes),
        lambda: forward(images),
        units=place.sizes.batch,
        unit="images",
    )


def our_model(place: Place, *, head: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Ours and its packed stream: a batch that is ready is what timm gets too."""
    import multimodal as mm
    from multimodal_tokenizers import ImagePatches, Labels

    shape = place.sizes
    rotary = settings.get("rotary_split") != (0, 0, 0)
    tokenizers = {
        "image": ImagePatches(patch=shape.patch, position="sincos" if rotary else "rotary"),
        "label": Labels(tuple(map(str, range(CLASSES)))),
    }
    core = mm.Core(width=shape.width, depth=shape.depth, heads=shape.heads, mlp_width=shape.hidden, **settings)
    model = mm.Model(tokenizers, core, [mm.Task(TASK, head)], seed=place.seed).to(place.device).train()
    images, classes = pictures(place)
    pairs = zip(images.cpu(), classes.tolist(), strict=True)
    return model, model.pack(TASK, [{"image": image, "label": str(label)} for image, label in pairs])


def our_job(place: Place, model: Any, stream: Any) -> Job:
    return training(
        model,
        lambda: model.loss(stream),
        lambda: model.logits(stream)[TASK],
        units=place.sizes.batch,
        unit="images",
    )


def ours(place: Place) -> Job:
    return our_job(place, *our_model(place))


def theirs(place: Place) -> Job:
    model = timm_model(place)
    return timm_job(place, model, model)


def ours_same(place: Place) -> Job:
    from collections.abc import Sequence
    from dataclasses import dataclass
    from typing import ClassVar

    from safetensors.torch import load_file
    from torch import Tensor

    from multimodal.heads import Classify, Readout

    @dataclass(frozen=True)
    class MeanState(Classify):
        """Classes read off the mean of all states instead of a learned token's."""

        queries: ClassVar[int] = 0

        def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
            return readout.linear(state_ND.view(len(lengths), -1, state_ND.shape[-1]).mean(1))

        def state_loss(self, readout: Any, state_ND: Any, lengths: Any, target: Any, target_lengths: Any) -> Tensor:
            return self.loss(self.logits(readout, state_ND, lengths), lengths, target, target_lengths)

    model, stream = our_model(place, head=MeanState(), rotary_split=(0, 0, 0))
    weights = from_timm(load_file(place.folder / WEIGHTS), "label_MeanState")
    # labels are only written, so timm has no weights for their embedding
    model.load_state_dict({**model.state_dict(), **weights})
    return our_job(place, model, stream)


def theirs_same(place: Place) -> Job:
    from timm.layers import RmsNorm, SwiGLUPacked

    model = timm_model(
        place,
        mlp_ratio=2 * place.sizes.hidden / place.sizes.width,
        mlp_layer=SwiGLUPacked,
        norm_layer=RmsNorm,
        qk_norm=True,
        qkv_bias=False,
        proj_bias=False,
        class_token=False,
        pos_embed="none",
        global_pool="avg",
        fc_norm=False,
    )
    save_weights(model, place.folder / WEIGHTS)
    return timm_job(place, model, model)


def from_timm(state: Mapping[str, Any], head: str) -> dict[str, Any]:
    """timm VisionTransformer's weights as those of a `Model` that reads `image` and has its head under this name.

    Theirs has RmsNorm, also on queries and keys, packed SwiGLU, no biases in its blocks, no class token and no positions.
    """
    ours: dict[str, Any] = {
        "embeds.image.linear.weight": state["patch_embed.proj.weight"].flatten(1),
        "embeds.image.linear.bias": state["patch_embed.proj.bias"],
        "core.norm.weight": state["norm.weight"],
        f"readouts.{head}.linear.weight": state["head.weight"],
        f"readouts.{head}.linear.bias": state["head.bias"],
    }
    names = {
        "0.norm": "norm1",
        "0.body.attention.qkv": "attn.qkv",
        "0.body.attention.out": "attn.proj",
        "0.body.attention.norm_q": "attn.q_norm",
        "0.body.attention.norm_k": "attn.k_norm",
        "1.norm": "norm2",
        "1.body.gate_up": "mlp.fc1",
        "1.body.down": "mlp.fc2",
    }
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    for i in range(depth):
        for mine, theirs in names.items():
            ours[f"core.blocks.{i}.layers.{mine}.weight"] = state[f"blocks.{i}.{theirs}.weight"]
    return ours


def best(place: Place, make: Callable[[bool, bool], Job]) -> Job:
    """The job that is fastest here of those that `make(compiled, bfloat16)` gives; its facts say what each took.

    The precision is chosen first and compiled alone, since compiling takes minutes.
    """
    import time

    jobs: dict[str, Job] = {}
    seconds: dict[str, float] = {}
    facts: dict[str, str] = {}

    def measure(compiled: bool, half: bool) -> None:
        setting = f"{'compiled' if compiled else 'eager'} {'bfloat16' if half else 'float32'}"
        jobs[setting] = make(compiled, half)
        clock = time.perf_counter()
        jobs[setting].run()
        first = time.perf_counter() - clock
        jobs[setting].run()
        clock = time.perf_counter()
        for _ in range(3):
            jobs[setting].run()
        seconds[setting] = (time.perf_counter() - clock) / 3
        facts[setting] = f"{1e3 * seconds[setting]:.0f} ms, first step {first:.1f} s"

    measure(False, False)
    measure(False, True)
    if not place.quick:
        measure(True, seconds["eager bfloat16"] < seconds["eager float32"])
    setting = min(seconds, key=lambda s: seconds[s])
    return replace(jobs[setting], outputs=None, facts={**jobs[setting].facts, "setting": setting, **facts})


def theirs_best(place: Place) -> Job:
    import torch

    def make(compiled: bool, half: bool) -> Job:
        model = timm_model(place)
        forward = torch.compile(model) if compiled else model
        return timm_job(place, model, in_bfloat16(forward, place) if half else forward)

    return best(place, make)


def ours_best(place: Place) -> Job:
    from multimodal.core import compile_blocks

    def make(compiled: bool, half: bool) -> Job:
        model, stream = our_model(place)
        if compiled:
            compile_blocks(model)
        loss = in_bfloat16(model.loss, place) if half else model.loss
        return training(model, lambda: loss(stream), units=place.sizes.batch, unit="images")

    return best(place, make)


def in_bfloat16(forward: Callable[[Any], Any], place: Place) -> Callable[[Any], Any]:
    import torch

    def call(batch: Any) -> Any:
        with torch.autocast(torch.device(place.device).type, dtype=torch.bfloat16):
            return forward(batch)

    return call


def row(name: str, what: str, ours: Any, theirs: Any, **more: Any) -> Row:
    work = (
        "train step, ViT 192x6, 3 heads, 128 pictures 32x32, patch 4, 10 classes, AdamW (fused), a batch that is ready, ours "
        "already cut into patches"
    )
    return Row(
        name=name,
        what=work + what,
        peer="timm VisionTransformer",
        needs=("timm",),
        sizes=Shape(),
        quick=QUICK,
        ours=ours,
        theirs=theirs,
        **more,
    )


ROWS = (
    row(
        "vit",
        ", fp32, eager; each as it comes: theirs LayerNorm, GELU, biases, learned places; ours RMSNorm, also on queries and keys, "
        "gated MLP of as many weights, rotary places, and the last MLP for the states that are read alone",
        ours,
        theirs,
        goal=1.0,
    ),
    row(
        "vit-same",
        ", fp32, eager; the same function, weights copied: RMSNorm, also on queries and keys, SwiGLU, no biases, no places, "
        "classes read off the mean state (timm's class token is seen by the patches, ours is not)",
        ours_same,
        theirs_same,
        tolerance=1e-4,
    ),
    row(
        "vit-best",
        "; as vit, each in its fastest setting here: float32 or bfloat16 autocast, eager or compiled (theirs torch.compile, ours "
        "what Recipe's compile does); compiling is not counted",
        ours_best,
        theirs_best,
        goal=1.1,
    ),
)

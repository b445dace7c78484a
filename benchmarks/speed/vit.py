"""Train steps of a small vision transformer against timm's: each as it comes, the same function, each at its best setting."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.text import step

TASK = "image -> label"
CLASSES = 10


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


def chosen(place: Place) -> Shape:
    return replace(Shape(), **QUICK) if place.quick else Shape()


def pictures(place: Place) -> tuple[Any, Any]:
    """Pictures (B, C, Y, X) in 0..1 and their classes (B): the same for both sides."""
    import torch

    shape, draw = chosen(place), torch.Generator().manual_seed(place.seed)
    images = torch.rand(shape.batch, 3, shape.side, shape.side, generator=draw)
    return images.to(place.device), torch.randint(CLASSES, (shape.batch,), generator=draw).to(place.device)


def timm_model(place: Place, **settings: Any) -> Any:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(place.seed)
    shape = chosen(place)
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
    return Job(
        run=step(model.parameters(), lambda: F.cross_entropy(forward(images).float(), classes)),
        outputs=lambda: forward(images),
        **facts(model, place),
    )


def our_model(place: Place, *, head: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Ours and its packed stream: a batch that is ready is what timm gets too."""
    import multimodal as mm
    from multimodal_tokenizers import ImagePatches, Labels

    shape = chosen(place)
    rotary = settings.get("rotary_split") != (0, 0, 0)
    model = mm.Model(
        {
            "image": ImagePatches(patch=shape.patch, position="sincos" if rotary else "rotary"),
            "label": Labels(tuple(map(str, range(CLASSES)))),
        },
        mm.Core(width=shape.width, depth=shape.depth, heads=shape.heads, mlp_width=shape.hidden, **settings),
        [mm.Task(TASK, head)],
        seed=place.seed,
    )
    model = model.to(place.device).train()
    images, classes = pictures(place)
    samples = [
        {"image": image, "label": str(label)} for image, label in zip(images.cpu(), classes.tolist(), strict=True)
    ]
    return model, model.pack(TASK, samples)


def our_job(place: Place, model: Any, stream: Any) -> Job:
    return Job(
        run=step(model.parameters(), lambda: model.loss(stream)),
        outputs=lambda: model.logits(stream)[TASK],
        **facts(model, place),
    )


def facts(model: Any, place: Place, **more: Any) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters())
    return {"units": chosen(place).batch, "unit": "images", "facts": {"parameters": count, **more}}


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

    from benchmarks.speed.weights import from_timm
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
    weights = from_timm(load_file(place.folder / "timm.safetensors"), "label_MeanState")
    # labels are only written, so timm has no weights for their embedding
    model.load_state_dict({**model.state_dict(), **weights})
    return our_job(place, model, stream)


def theirs_same(place: Place) -> Job:
    from safetensors.torch import save_file
    from timm.layers import RmsNorm, SwiGLUPacked

    shape = chosen(place)
    model = timm_model(
        place,
        mlp_ratio=2 * shape.hidden / shape.width,
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
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, place.folder / "timm.safetensors")
    return timm_job(place, model, model)


def best(place: Place, make: Callable[[bool, bool], Job]) -> Job:
    """The job that is fastest here of those that `make(compiled, bfloat16)` gives; what each took is told.

    The precision is chosen first and compiled alone, since compiling takes minutes.
    """
    import time

    jobs: dict[str, Job] = {}
    took: dict[str, float] = {}
    told: dict[str, str] = {}

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
        took[setting] = (time.perf_counter() - clock) / 3
        told[setting] = f"{1e3 * took[setting]:.0f} ms, first step {first:.1f} s"

    measure(False, False)
    measure(False, True)
    if not place.quick:
        measure(True, took["eager bfloat16"] < took["eager float32"])
    setting = min(took, key=lambda s: took[s])
    return replace(jobs[setting], outputs=None, facts={**jobs[setting].facts, "setting": setting, **told})


def theirs_best(place: Place) -> Job:
    import torch

    def make(compiled: bool, half: bool) -> Job:
        model = timm_model(place)
        forward = torch.compile(model) if compiled else model
        return timm_job(place, model, _cast(forward, place) if half else forward)

    return best(place, make)


def ours_best(place: Place) -> Job:
    from multimodal.core import compile_blocks

    def make(compiled: bool, half: bool) -> Job:
        model, stream = our_model(place)
        if compiled:
            compile_blocks(model)
        loss = _cast(model.loss, place) if half else model.loss
        return Job(step(model.parameters(), lambda: loss(stream)), **facts(model, place))

    return best(place, make)


def _cast(forward: Callable[[Any], Any], place: Place) -> Callable[[Any], Any]:
    import torch

    def call(batch: Any) -> Any:
        with torch.autocast(torch.device(place.device).type, dtype=torch.bfloat16):
            return forward(batch)

    return call


WORK = (
    "train step, ViT 192x6, 3 heads, 128 pictures 32x32, patch 4, 10 classes, AdamW (fused), a batch that is ready, ours already "
    "cut into patches"
)
ROWS = (
    Row(
        name="vit",
        what=f"{WORK}, fp32, eager; each as it comes: theirs LayerNorm, GELU, biases, learned places; ours RMSNorm, also on "
        "queries and keys, gated MLP of as many weights, rotary places, and the last MLP for the states that are read alone",
        peer="timm VisionTransformer",
        needs=("timm",),
        goal=1.0,
        ours=ours,
        theirs=theirs,
    ),
    Row(
        name="vit-same",
        what=f"{WORK}, fp32, eager; the same function, weights copied: RMSNorm, also on queries and keys, SwiGLU, no biases, no "
        "places, classes read off the mean state (timm's class token is seen by the patches, ours is not)",
        peer="timm VisionTransformer",
        needs=("timm",),
        ours=ours_same,
        theirs=theirs_same,
        tolerance=1e-4,
    ),
    Row(
        name="vit-best",
        what=f"{WORK}; as vit, each in its fastest setting here: float32 or bfloat16 autocast, eager or compiled (theirs "
        "torch.compile, ours what Recipe's compile does); compiling is not counted",
        peer="timm VisionTransformer",
        needs=("timm",),
        goal=1.1,
        ours=ours_best,
        theirs=theirs_best,
    ),
)

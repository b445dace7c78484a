"""Train steps on photos of mixed sizes at their own resolution, against vit-pytorch's NaViT and timm's NaFlexVit."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.speed.row import Job, Place, Row

TASK = "image -> label"
PATCH, CLASSES = 16, 10
LARGEST = 256  # pixels a side
WORK = (
    "train step, ViT 192x6 with 3 heads, patch 16, 32 photos whose sides are log-uniform from 64 to 256 pixels in multiples "
    "of 16, cutting into patches included; all with 4 D^2 x 2 MLP weights a block (ours gated), learned places, AdamW (fused); "
)


def shape(place: Place) -> dict[str, int]:
    """Width, depth, heads and photos a step."""
    if place.quick:
        return {"width": 48, "depth": 1, "heads": 2, "photos": 4}
    return {"width": 192, "depth": 6, "heads": 3, "photos": 32}


def photos(place: Place) -> tuple[list[Any], list[int]]:
    """Photos (C, Y, X) in 0..1 and their classes: the same for every side."""
    import torch

    draw = torch.Generator().manual_seed(place.seed)
    count = shape(place)["photos"]
    side = 64 * (LARGEST / 64) ** torch.rand(count, 2, generator=draw)
    sides = ((side / PATCH).round().int() * PATCH).tolist()
    return (
        [torch.rand(3, height, width, generator=draw) for height, width in sides],
        torch.randint(CLASSES, (count,), generator=draw).tolist(),
    )


def stepped(parameters: Any, loss: Callable[[], Any], place: Place, **facts: Any) -> Job:
    """A job of train steps."""
    import torch

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    patches = sum(x.shape[1] * x.shape[2] // PATCH**2 for x in photos(place)[0])
    count = f"{sum(p.numel() for p in parameters):,}"
    return Job(
        run, units=shape(place)["photos"], unit="photos", facts={"parameters": count, "patches": patches} | facts
    )


def ours(place: Place) -> Job:
    from multimodal import Core, Model
    from multimodal_tokenizers import ImagePatches, Labels

    sizes = shape(place)
    images, labels = photos(place)
    model = Model(
        tokenizers={
            "image": ImagePatches(patch=PATCH, position="learned"),
            "label": Labels(tuple(map(str, range(CLASSES)))),
        },
        core=Core(width=sizes["width"], depth=sizes["depth"], heads=sizes["heads"]),
        tasks=[TASK],
    )
    samples = [{"image": image, "label": str(label)} for image, label in zip(images, labels, strict=True)]
    return stepped(model.parameters(), lambda: model.loss(model.pack(TASK, samples)), place)


def navit(place: Place, most: int = (LARGEST // PATCH) ** 2) -> Job:
    """Photos in groups of `most` patches at most, by default those of the largest photo there may be; a mask keeps them apart."""
    import torch
    from torch.nn.functional import cross_entropy
    from vit_pytorch.na_vit import NaViT

    torch.manual_seed(place.seed)
    sizes = shape(place)
    images, labels = photos(place)
    target = torch.tensor(labels)
    model = NaViT(
        image_size=LARGEST,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=sizes["width"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        dim_head=sizes["width"] // sizes["heads"],
        mlp_dim=4 * sizes["width"],
        token_dropout_prob=None,
    ).train()

    def loss() -> torch.Tensor:
        images_01 = [(image - 0.5) / 0.5 for image in images]  # as ours are normalised
        return cross_entropy(model(images_01, group_images=True, group_max_seq_len=most), target)

    return stepped(model.parameters(), loss, place, **{"patches a group": most})


def naflex(place: Place) -> Job:
    """Its own Patchify and collator; every photo is padded to the longest of the batch."""
    import torch
    from timm.data.naflex_dataset import NaFlexCollator
    from timm.data.naflex_transforms import Patchify
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    from torch.nn.functional import cross_entropy

    torch.manual_seed(place.seed)
    sizes = shape(place)
    images, labels = photos(place)
    grid = LARGEST // PATCH
    config = NaFlexVitCfg(
        patch_size=PATCH,
        embed_dim=sizes["width"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        global_pool="avg",
        fc_norm=True,
        pos_embed="factorized",
        pos_embed_grid_size=(grid, grid),
        pos_embed_use_grid_sample=True,
        use_key_only_attn_mask=True,
    )
    model = NaFlexVit(config, num_classes=CLASSES).train()
    patchify = Patchify(PATCH)
    longest = max(image.shape[1] * image.shape[2] // PATCH**2 for image in images)
    collate = NaFlexCollator(longest)

    def loss() -> torch.Tensor:
        batch, target = collate(
            [(patchify((image - 0.5) / 0.5), label) for image, label in zip(images, labels, strict=True)]
        )
        return cross_entropy(model(batch), target)

    return stepped(model.parameters(), loss, place, **{"padded to": longest})


ROWS = (
    Row(
        name="photos-navit",
        what=WORK
        + "theirs groups photos under a mask and pools by attention, ours packs them and asks by a learned token",
        peer="vit-pytorch",
        needs=("vit-pytorch",),
        goal=2.0,
        ours=ours,
        theirs=navit,
    ),
    Row(
        name="photos-navit-default",
        what=WORK + "theirs at its default of 2,048 patches a group",
        peer="vit-pytorch",
        needs=("vit-pytorch",),
        ours=ours,
        theirs=partial(navit, most=2048),
    ),
    Row(
        name="photos-naflex",
        what=WORK
        + "theirs pads photos to the longest of the batch and pools by the mean, ours packs them and asks by a learned token",
        peer="timm",
        needs=("timm",),
        goal=1.0,
        ours=ours,
        theirs=naflex,
    ),
)

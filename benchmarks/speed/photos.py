"""Train steps on photos of mixed sizes at their own resolution, against vit-pytorch's NaViT and timm's NaFlexVit."""

from dataclasses import dataclass
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.work import training

TASK = "image -> label"
PATCH, CLASSES = 16, 10
LARGEST = 256  # pixels a side
WORK = (
    "train step, ViT 192x6 with 3 heads, patch 16, 32 photos whose sides are log-uniform from 64 to 256 pixels in multiples "
    "of 16, cutting into patches included; all with 4 D^2 x 2 MLP weights a block (ours gated), learned places, AdamW (fused); "
)


@dataclass(frozen=True)
class Shape:
    """A model, and photos a step."""

    width: int = 192
    depth: int = 6
    heads: int = 3
    photos: int = 32


def photos(place: Place) -> tuple[list[Any], list[int]]:
    """Photos (C, Y, X) in 0..1 and their classes: the same for every side."""
    import torch

    draw = torch.Generator().manual_seed(place.seed)
    count = place.sizes.photos
    side = 64 * (LARGEST / 64) ** torch.rand(count, 2, generator=draw)
    sides = ((side / PATCH).round().int() * PATCH).tolist()
    images = [torch.rand(3, height, width, generator=draw) for height, width in sides]
    return images, torch.randint(CLASSES, (count,), generator=draw).tolist()


def patches(images: list[Any]) -> list[int]:
    """Number of patches of each photo."""
    return [image.shape[1] * image.shape[2] // PATCH**2 for image in images]


def job(model: Any, loss: Any, images: list[Any], **facts: Any) -> Job:
    facts = {"patches": sum(patches(images)), **facts}
    return training(model, loss, units=len(images), unit="photos", **facts)


def ours(place: Place) -> Job:
    from multimodal import Core, Model
    from multimodal_tokenizers import ImagePatches, Labels

    shape = place.sizes
    images, labels = photos(place)
    tokenizers = {
        "image": ImagePatches(patch=PATCH, position="learned"),
        "label": Labels(tuple(map(str, range(CLASSES)))),
    }
    model = Model(tokenizers, Core(width=shape.width, depth=shape.depth, heads=shape.heads), [TASK])
    samples = [{"image": image, "label": str(label)} for image, label in zip(images, labels, strict=True)]
    return job(model, lambda: model.loss(model.pack(TASK, samples)), images)


def navit(place: Place) -> Job:
    """Photos in groups of at most as many patches as the largest photo may have; a mask keeps them apart."""
    import torch
    from torch.nn.functional import cross_entropy
    from vit_pytorch.na_vit import NaViT

    torch.manual_seed(place.seed)
    shape, most = place.sizes, (LARGEST // PATCH) ** 2
    images, labels = photos(place)
    target = torch.tensor(labels)
    model = NaViT(
        image_size=LARGEST,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        dim_head=shape.width // shape.heads,
        mlp_dim=4 * shape.width,
        token_dropout_prob=None,
    ).train()

    def loss() -> torch.Tensor:
        normalised = [(image - 0.5) / 0.5 for image in images]  # as ours are
        return cross_entropy(model(normalised, group_images=True, group_max_seq_len=most), target)

    return job(model, loss, images, **{"patches a group": most})


def naflex(place: Place) -> Job:
    """Its own Patchify and collator; every photo is padded to the longest of the batch."""
    import torch
    from timm.data.naflex_dataset import NaFlexCollator
    from timm.data.naflex_transforms import Patchify
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    from torch.nn.functional import cross_entropy

    torch.manual_seed(place.seed)
    shape, grid = place.sizes, LARGEST // PATCH
    images, labels = photos(place)
    config = NaFlexVitCfg(
        patch_size=PATCH,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        global_pool="avg",
        fc_norm=True,
        pos_embed="factorized",
        pos_embed_grid_size=(grid, grid),
        pos_embed_use_grid_sample=True,
        use_key_only_attn_mask=True,
    )
    model = NaFlexVit(config, num_classes=CLASSES).train()
    patchify, longest = Patchify(PATCH), max(patches(images))
    collate = NaFlexCollator(longest)

    def loss() -> torch.Tensor:
        pairs = zip(images, labels, strict=True)
        batch, target = collate([(patchify((image - 0.5) / 0.5), label) for image, label in pairs])
        return cross_entropy(model(batch), target)

    return job(model, loss, images, **{"padded to": longest})


def row(name: str, what: str, peer: str, theirs: Any, goal: float) -> Row:
    return Row(
        name=name,
        what=WORK + what,
        peer=peer,
        needs=(peer,),
        goal=goal,
        sizes=Shape(),
        quick={"width": 48, "depth": 1, "heads": 2, "photos": 4},
        ours=ours,
        theirs=theirs,
    )


ROWS = (
    row(
        "photos-navit",
        "theirs groups photos under a mask and pools by attention, ours packs them and asks by a learned token",
        "vit-pytorch",
        navit,
        2.0,
    ),
    row(
        "photos-naflex",
        "theirs pads photos to the longest of the batch and pools by the mean, ours packs them and asks by a learned token",
        "timm",
        naflex,
        1.0,
    ),
)

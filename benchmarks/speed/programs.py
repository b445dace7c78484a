"""Whole programs from the start of their process: importing, a first model, and digits to 98 % of held-out pictures."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.speed.row import Job, Place, Row, Side

# what the peer uses only because it is there, and neither it nor we need; hidden from it, so that it is not slowed down
NOT_ITS_OWN = (
    "cv2",
    "datasets",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "soundfile",
    "timm",
    "torchaudio",
    "torchvision",
)
CUDA = ("cuda", "nvidia", "triton")  # distributions whose names begin so are not counted
TASK = "image -> label"
HELD_OUT, WANTED = 360, 0.98
BATCH, EVERY = 64, 50  # pictures a step; steps between evaluations
OUR_STEPS, OUR_LR = 1500, 4e-3  # of the cosine, seldom all needed; with Muon
THEIR_STEPS, THEIR_LR = 3000, 5e-3  # of 1e-3 to 8e-3 over 2000 or 3000, the soonest with seed 0
MEAN, STD = 0.3, 0.37  # of the pixels


def program(work: Callable[[Place], dict[str, Any]], unit: str = "program") -> Side:
    """The side whose process does this work and nothing else; the work returns facts."""

    def make(place: Place) -> Job:
        return Job(partial(work, place), unit=unit)

    return make


def resident() -> dict[str, str]:
    """What this process holds in memory now, on Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return {"resident": f"{int(kilobytes) / 1024:.0f} MB", "modules": str(len(sys.modules))}


def our_import(place: Place) -> dict[str, str]:
    from multimodal import Core, Model  # noqa: F401
    from multimodal_tokenizers import TextBytes  # noqa: F401

    return resident()


def their_import(place: Place) -> dict[str, str]:
    hide()
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: F401

    return resident()


def torch_import(place: Place) -> dict[str, str]:
    import torch  # noqa: F401

    return resident()


def hide() -> None:
    """To Python a module that is None is not there, and the peer asks before it uses one."""
    sys.modules |= dict.fromkeys(NOT_ITS_OWN)  # type: ignore[arg-type]


def our_first(place: Place) -> dict[str, str]:
    import torch

    from multimodal import Core, Model
    from multimodal_tokenizers import TextBytes

    torch.set_num_threads(place.threads)
    model = Model(tokenizers={"text": TextBytes()}, core=Core.tiny(), tasks=["-> text"])
    with torch.inference_mode():
        model.loss(model.pack("-> text", [{"text": "A first sentence."}]))
    return resident()


def their_first(place: Place) -> dict[str, str]:
    hide()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(place.threads)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=256,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([[256, *b"A first sentence."]])
    with torch.inference_mode():
        model(ids, labels=ids)
    return resident()


def installed(place: Place) -> dict[str, Any]:
    """Megabytes of the files of both with all that they require."""
    ours, theirs = required("multimodal-stream"), required("transformers", "torch")
    both = sum(size(name) for name in ours & theirs)
    mine, its = (sum(size(name) for name in names) for names in (ours, theirs))
    own = sum(x.stat().st_size for part in ("multimodal", "tokenizers") for x in (ROOT / part).rglob("*.py"))
    alone = {name: size(name) for name in ours - theirs}
    largest = ", ".join(f"{name} {alone[name]:.0f}" for name in sorted(alone, key=lambda name: -alone[name])[:5])
    return {
        "lines": [
            f"  ours {mine + own / 1e6:.0f} MB in {len(ours)} distributions, without CUDA's",
            f"  transformers {its:.0f} MB in {len(theirs)}; both have {both:.0f} MB of it, of which torch {size('torch'):.0f}",
            f"  only ours, MB: multimodal {own / 1e6:.1f}, {largest}",
        ],
        "met": None,
    }


ROOT = Path(__file__).parents[2]


def required(*names: str) -> set[str]:
    """Distributions that these need, themselves included, with no extras and without those of CUDA."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    left = list(map(canonicalize_name, names))
    while left:
        name = left.pop()
        if name in found or name.startswith(CUDA):
            continue
        try:
            wanted = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # for another system, or not installed here
            continue
        found.add(name)
        left += [canonicalize_name(r.name) for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def size(name: str) -> float:
    """MB of a distribution's files."""
    from importlib.metadata import files

    paths = [Path(str(file.locate())) for file in files(name) or ()]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc") / 1e6


def digits(place: Place) -> tuple[Any, Any, Any, Any]:
    """scikit-learn's digits, the same 360 of them held out whatever the seed: pictures and classes to learn, and to test on."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    images = [Image.fromarray(np.uint8(bunch.images[i] * 255 / 16)) for i in order]
    labels = [int(bunch.target[i]) for i in order]
    held = 20 if place.quick else HELD_OUT
    return images[HELD_OUT:], labels[HELD_OUT:], images[:held], labels[:held]


def affine() -> Any:
    """Both sides' augmentation, that of examples/train_image_classifier.py."""
    from torchvision import transforms

    return transforms.RandomAffine(
        15, (0.12, 0.12), (0.85, 1.15), 10, interpolation=transforms.InterpolationMode.BILINEAR
    )


def steps(place: Place, most: int) -> tuple[int, int, float]:
    """Steps at most, steps between evaluations, the accuracy that ends it."""
    return (2, 1, 0.0) if place.quick else (most, EVERY, WANTED)


class Reached(BaseException):
    """The held-out accuracy is as wanted. No Exception, of which `fit` would make a CallbackError."""


class Log:
    """Accuracies so far; the one that is enough ends the program."""

    def __init__(self, wanted: float) -> None:
        self.wanted, self.step, self.best = wanted, 0, 0.0

    def __call__(self, step: int, accuracy: float) -> None:
        self.step, self.best = step, max(self.best, accuracy)
        if accuracy >= self.wanted:
            raise Reached

    def facts(self) -> dict[str, Any]:
        if self.best >= self.wanted:
            return {"reached": f"{self.best:.2%} at step {self.step}"}
        return {"reached": f"MISSED: {self.best:.2%} at best in {self.step} steps"}


class Augmented:
    """Pictures to learn, each time changed in another way, with their labels as `sample` makes them."""

    def __init__(
        self, images: Any, labels: Any, change: Callable[[Any], Any], sample: Callable[[Any, int], Any]
    ) -> None:
        self.images, self.labels, self.change, self.sample = images, labels, change, sample

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.sample(self.change(self.images[index]), self.labels[index])


def our_sample(image: Any, label: int) -> dict[str, Any]:
    return {"image": image, "label": str(label)}


def their_sample(image: Any, label: int) -> tuple[Any, int]:
    return image, label


def our_digits(place: Place) -> dict[str, Any]:
    import torch

    from multimodal import Classify, Core, Model, Task, fit
    from multimodal_tokenizers import ImagePatches, Labels

    torch.set_num_threads(place.threads)
    images, labels, test_images, test_labels = digits(place)
    model = Model(
        tokenizers={
            "image": ImagePatches(patch=2, channels=1, mean=MEAN, std=STD),
            "label": Labels(tuple("0123456789")),
        },
        core=Core.tiny(),
        tasks=[Task(TASK, head=Classify(label_smoothing=0.1))],
        seed=place.seed,
    )
    test = list(map(our_sample, test_images, test_labels))
    most, every, wanted = steps(place, OUR_STEPS)
    log = Log(wanted)
    recipe: dict[str, Any] = {"batch": BATCH, "optimizer": "muon", "lr": OUR_LR, "ema": 0.99, "weight_decay": 0.1}

    def track(row: Any) -> None:
        if f"{TASK} exact" in row:
            log(row["step"], row[f"{TASK} exact"])

    with suppress(Reached):
        fit(
            model, {TASK: Augmented(images, labels, affine(), our_sample)}, **recipe, workers=1, steps=most,
            evaluate_every=every, evaluation={TASK: test}, trackers=[track], seed=place.seed, quiet=True,
        )  # fmt: skip
    return log.facts()


def their_digits(place: Place) -> dict[str, Any]:
    import torch
    from timm.models import VisionTransformer
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader
    from torchvision import transforms

    torch.set_num_threads(place.threads)
    torch.manual_seed(place.seed)
    images, labels, test_images, test_labels = digits(place)
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    test = torch.stack([plain(image) for image in test_images])
    data: Any = Augmented(images, labels, transforms.Compose([affine(), plain]), their_sample)
    loader = DataLoader[Any](data, BATCH, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)
    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        class_token=False,
        global_pool="avg",
    )
    most, every, wanted = steps(place, THEIR_STEPS)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=THEIR_LR, weight_decay=0.1, betas=(0.9, 0.99), fused=True)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=most,
        lr_min=THEIR_LR / 100,
        warmup_t=most // 20,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    averaged = ModelEmaV3(model, decay=0.99, use_warmup=True)
    log = Log(wanted)
    batches = (batch for _ in count() for batch in loader)
    with suppress(Reached):
        for step, (x, y) in zip(range(1, most + 1), batches, strict=False):
            schedule.step_update(step - 1)
            cross_entropy(model.train()(x), y, label_smoothing=0.1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update(model, step=step)
            if step % every == 0:
                with torch.inference_mode():
                    right = averaged.module.eval()(test).argmax(-1) == torch.tensor(test_labels)
                log(step, float(right.float().mean()))
    return log.facts()


HIDDEN = "what is installed here and neither side requires, and what only we require, is hidden from the peer"
ROWS = (
    Row(
        name="import",
        what="a process that imports Model, Core and a tokenizer; LlamaForCausalLM, its config and AutoTokenizer; " + HIDDEN,
        peer="transformers",
        needs=("transformers",),
        goal=2.0,
        ours=program(our_import, "import"),
        theirs=program(their_import, "import"),
        fresh=True,
    ),
    Row(
        name="import-torch",
        what="the same of ours beside a process that imports torch alone: what we add",
        peer="torch",
        ours=program(our_import, "import"),
        theirs=program(torch_import, "import"),
        fresh=True,
    ),
    Row(
        name="first-model",
        what="a process that imports, builds a model of 64x4 and computes one loss of 17 bytes; Llama of the same shape; " + HIDDEN,
        peer="transformers",
        needs=("transformers",),
        ours=program(our_first),
        theirs=program(their_first),
        fresh=True,
    ),
    Row(name="installed", what="MB on disk with everything that is required, without CUDA packages", report=installed,
        needs=("transformers",)),
    Row(
        name="digits",
        what=f"a program to {WANTED:.0%} of {HELD_OUT} held-out digits, start and imports included; a ViT 64x4 of patch 2, batch "
        f"{BATCH}, the same augmentation, averaged weights, tested every {EVERY} steps, one data worker; ours with "
        f"rotary places, a learned token, gated MLPs and Muon, cosine over {OUR_STEPS} steps; theirs with learned places, average "
        f"pooling and AdamW, over {THEIR_STEPS}, its rate tuned; where a side misses, its time is that of all its steps",
        peer="timm",
        needs=("timm", "scikit-learn"),
        goal=1.3,
        ours=program(our_digits),
        theirs=program(their_digits),
        fresh=True,
    ),
)  # fmt: skip

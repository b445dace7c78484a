"""The picture sets of train_image_classifier.py: each gives training and test samples, class names and an augmentation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from multimodal import ConfigError, augment
from multimodal.data import read_folder
from multimodal.demo import scanned_digits


@dataclass(frozen=True)
class Pictures:
    """Samples {"image", "label"}.

    changes: the augmentation of those that are trained on.
    """

    images: Sequence[Any]
    labels: Sequence[str]
    changes: tuple[augment.Augmentation, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def varied(self) -> augment.Augmented:
        """The same samples, changed whenever they are read."""
        return augment.Augmented(self, {"image": self.changes})

    def some(self, count: int) -> "Pictures":
        """The first `count` samples, one of each class in turn; a folder lists its classes one after the other."""
        by_class: dict[str, list[int]] = {}
        for i, label in enumerate(self.labels):
            by_class.setdefault(label, []).append(i)
        chosen = [i for turn in zip_longest(*by_class.values()) for i in turn if i is not None][:count]
        return Pictures([self.images[i] for i in chosen], [self.labels[i] for i in chosen], self.changes)


@dataclass(frozen=True)
class PictureSet:
    """Training and test samples, and the names of the classes."""

    train: Pictures
    test: Pictures
    names: tuple[str, ...]


def digits(seed: int) -> PictureSet:
    """1,797 scans of 8x8 pixels from 43 writers, bundled with scikit-learn; a stratified fifth is held out."""
    from sklearn.model_selection import train_test_split

    scans, kinds = scanned_digits()
    images, labels = [Image.fromarray(scan) for scan in scans], [str(kind) for kind in kinds]
    train, test, train_labels, test_labels = map(
        list, train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    )
    changes = (augment.RandomAffine(15.0, 0.12, (0.85, 1.15), 10.0),)
    return PictureSet(Pictures(train, train_labels, changes), Pictures(test, test_labels), tuple("0123456789"))


def cifar10(root: Path) -> PictureSet:
    """60,000 photographs of 32x32 pixels: torchvision's (downloaded to `root`), or `root`/cifar10_train.npz if it is there."""
    # 16 to 32 pixels a side: smaller pictures are fewer tokens, so that more of them are seen in the same time
    changes = (augment.HorizontalFlip(), augment.RandomCrop(32, 32, pad=4), augment.RandomScale(0.5, 1.0, smallest=16))
    if (root / "cifar10_train.npz").is_file():  # 50,000 JPEGs end to end; 5,000 of them are for validation
        with np.load(root / "cifar10_train.npz", allow_pickle=False) as file:
            jpeg, offset, names, held = (file[key] for key in ("jpeg", "offset", "classes", "val_index"))
            labels = [str(names[label]) for label in file["label"]]
        images = [_decoded(jpeg[start:stop]) for start, stop in pairwise(offset)]
        is_held = np.isin(np.arange(len(labels)), held)
        parts = [
            ([images[i] for i in np.flatnonzero(which)], [labels[i] for i in np.flatnonzero(which)])
            for which in (~is_held, is_held)
        ]
        return PictureSet(Pictures(*parts[0], changes), Pictures(*parts[1]), tuple(map(str, names)))
    return _from_torchvision(datasets.CIFAR10, root, changes)


def fashion_mnist(root: Path) -> PictureSet:
    """70,000 pictures of clothes, 28x28 grey: torchvision's, downloaded to `root`."""
    changes = (augment.HorizontalFlip(), augment.RandomCrop(28, 28, pad=2, edge="constant"))
    return _from_torchvision(datasets.FashionMNIST, root, changes)


def folder(path: Path, seed: int) -> PictureSet:
    """One sub-folder a class, pictures of any size. If `path` has train/ and test/ (or val/), those; else a fifth is held out."""
    changes = (
        augment.HorizontalFlip(),
        augment.RandomPart((0.5, 1.0), (1.0, 1.0), smallest=16),
        augment.ColorJitter(0.3, 0.3, 0.3),
    )
    held = next((name for name in ("test", "val", "validation") if (path / name).is_dir()), None)
    if held is not None and (path / "train").is_dir():
        train, test = _files(path, "train"), _files(path, held)
    else:
        files = _files(path)
        np.random.default_rng(seed).shuffle(files)
        by_class = {name: [f for f in files if f[1] == name] for name in sorted({name for _, name in files})}
        test = [f for mine in by_class.values() for f in mine[: max(1, len(mine) // 5)]]
        train = [f for mine in by_class.values() for f in mine[max(1, len(mine) // 5) :]]
        if lacking := [name for name, mine in by_class.items() if len(mine) < 2]:
            raise ConfigError(
                f"--data folder: {', '.join(lacking)} must have two pictures or more, one of them to test on"
            )
    names = tuple(sorted({name for _, name in train}))
    if unknown := sorted({name for _, name in test} - set(names)):
        raise ConfigError(f"--data folder: {', '.join(unknown)} are classes of {held}/ that train/ does not have")
    return PictureSet(
        Pictures([f for f, _ in train], [n for _, n in train], changes),
        Pictures([f for f, _ in test], [n for _, n in test]),
        names,
    )


def _files(path: Path, split: str | None = None) -> list[tuple[Path, str]]:
    """(file, class) of the pictures; prints what was left out."""
    if path.is_dir() and not any(path.iterdir()):
        raise ConfigError(
            f"--data folder: {str(path)!r} must hold a sub-folder of pictures for each class; it is empty"
        )
    found = read_folder(path, split=split, fields=("image",), labelled=True)
    if found.account.left_out:
        print(f"{path}{f' ({split})' if split else ''}: {found.account}")
    files = [(path / member.name, member.label) for member in found.members if member.label is not None]
    if len({name for _, name in files}) < 2:
        raise ConfigError(
            f"--data folder: {str(path)!r} must hold a sub-folder of pictures for each of two or more classes"
        )
    return files


def _decoded(jpeg: np.ndarray) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    image.load()
    return image


def _from_torchvision(dataset: Any, root: Path, changes: tuple[augment.Augmentation, ...]) -> PictureSet:
    try:
        parts = [dataset(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{dataset.__name__} is not in {str(root)!r} and cannot be downloaded: {error}") from error
    names = tuple(parts[0].classes)
    samples = [([Image.fromarray(np.asarray(x)) for x in p.data], [names[int(i)] for i in p.targets]) for p in parts]
    return PictureSet(Pictures(*samples[0], changes), Pictures(*samples[1]), names)

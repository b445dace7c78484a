"""The data of the examples in this folder.

Data are read from the folder MULTIMODAL_DATA (default: shared/data beside the project). Every function gives arrays or lists in a
fixed order; where its files are absent it ends the program with a clear message.
"""

import gzip
import io
import os
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(os.environ.get("MULTIMODAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def file(name: str) -> Path:
    """The path of a data file.

    Raises:
        SystemExit: it is not there; says where it was looked for and how to point elsewhere.
    """
    if not (ROOT / name).is_file():
        raise SystemExit(f"sets: there is no {name} in {ROOT}; set MULTIMODAL_DATA to the folder that has it")
    return ROOT / name


def mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """MNIST's 10,000 test digits, shuffled with seed 0: (8000, 28, 28) uint8, labels, (2000, 28, 28), labels."""
    images, labels = (_idx(file(f"mnist_t10k/t10k-{kind}-ubyte.gz")) for kind in ("images-idx3", "labels-idx1"))
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:8000], order[8000:]
    return images[train], labels[train], images[test], labels[test]


def binarised_mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`mnist` as pixels of 0 and 1, ink where grey > 127: (8000, 784) float32, labels, (2000, 784), labels."""
    train, train_labels, test, test_labels = mnist()
    flat = ((part > 127).reshape(len(part), -1).astype(np.float32) for part in (train, test))
    return next(flat), train_labels, next(flat), test_labels


def omniglot() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """4,840 drawings: ink (4840, 105, 105) uint8 of 0 and 1, name of the alphabet, character in it and drawer, both from 1."""
    with np.load(file("omniglot.npz"), allow_pickle=False) as z:
        ink = np.unpackbits(z["bits"], axis=-1)[:, :, :105]
        return ink, z["alphabets"][z["alphabet"]], z["character"], z["drawer"]


def multi30k(languages: tuple[str, ...] = ("en", "de")) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """29,000 training and 1,014 validation sentences, each a tuple with one string a language."""
    with zipfile.ZipFile(file("multi30k_train_val.zip")) as z:
        train, val = (_table(z.read(f"{split}.tsv").decode("utf8"), languages) for split in ("train", "val"))
    return train, val


def _idx(path: Path) -> np.ndarray:
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _table(text: str, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    head, *rows = (line.rstrip("\n").split("\t") for line in io.StringIO(text, newline="\n"))
    return [tuple(row[head.index(column)] for column in columns) for row in rows]


def shrunk(images: np.ndarray, by: int) -> np.ndarray:
    """Pictures (N, Y, X) uint8 as float32 of 0..1, each side `by` times smaller: the mean of every square."""
    count, rows, columns = images.shape
    return images.reshape(count, rows // by, by, columns // by, by).mean((2, 4), dtype=np.float32) / 255


def few_shot_characters(size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Omniglot for few-shot rows: ink (characters, 20 drawings, size, size) float32 in 0..1 of 716 and of 63 characters.

    To learn from: 5 alphabets, every character also turned by 90, 180 and 270 degrees as one of its own; to test: 3 others.
    """
    import torch

    ink, alphabet, character, _ = omniglot()
    small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(ink).float()[:, None], size)[:, 0].numpy()
    by_name = {
        key: small[(alphabet == key[0]) & (character == key[1])]
        for key in sorted(set(zip(alphabet, character, strict=True)))
    }
    held_out = ("Balinese", "Early_Aramaic", "Tagalog")
    train = np.stack([drawings for key, drawings in by_name.items() if key[0] not in held_out])
    test = np.stack([drawings for key, drawings in by_name.items() if key[0] in held_out])
    return np.concatenate([np.rot90(train, turns, (2, 3)) for turns in range(4)]), test


def strips(images: np.ndarray, labels: np.ndarray, count: int, seed: int, n: int = 0) -> list[dict]:
    """Strips of `n` pictures (0: 3 to 8), and their digits in both directions."""
    random, samples = np.random.default_rng(seed), []
    for _ in range(count):
        which = random.integers(0, len(labels), n or random.integers(3, 9))
        digits = "".join(str(labels[i]) for i in which)
        samples.append({"strip": images[which], "forward": digits, "backward": digits[::-1]})
    return samples


QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
WORDS = (*QUARTERS, "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Canvases:
    """Canvases (48, 48) of 0..1 with `digits` pictures (0: 1 to 3) in a jittered 2 x 2 layout, and captions that name quarters and
    digits in reading order: `count` fixed ones, or with seed=None new ones each time, from numpy's own generator."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, count: int, seed: int | None, digits: int = 0) -> None:
        self.images, self.labels, self.count, self.seed, self.digits = images, labels, count, seed, digits

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        random = np.random.default_rng(np.random.randint(2**31) if self.seed is None else [self.seed, index])
        canvas, words = np.zeros((48, 48), np.float32), []
        for quarter in sorted(random.permutation(4)[: self.digits or random.integers(1, 4)]):
            which = random.integers(len(self.labels))
            y, x = 24 * np.array(divmod(quarter, 2)) + random.integers(0, 5, 2)
            canvas[y : y + 20, x : x + 20] = self.images[which, 4:24, 4:24] / np.float32(255)
            words += [WORDS[quarter], WORDS[4 + self.labels[which]]]
        return {"canvas": canvas, "caption": " ".join(words)}


class Episodes:
    """Few-shot samples from ink (characters, drawings, rows, columns): a drawing of each of `ways` characters with its label, then
    another of each to be named, all moved by up to `shift` pixels."""

    def __init__(self, ink: np.ndarray, ways: int, count: int, seed: int, shift: int = 0) -> None:
        self.ink, self.ways, self.count, self.seed, self.shift = ink, ways, count, seed, shift

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, object]:
        random = np.random.default_rng((self.seed, index))
        characters = random.choice(len(self.ink), self.ways, replace=False)
        drawings = np.stack([random.choice(self.ink.shape[1], 2, replace=False) for _ in characters], 1)
        labels = np.concatenate([random.permutation(self.ways), random.permutation(self.ways)])
        images = [self.ink[characters[c], drawings[i // self.ways, c]] for i, c in enumerate(labels)]
        if self.shift:
            images = [np.roll(x, random.integers(-self.shift, self.shift + 1, 2), (0, 1)) for x in images]
        return {"episode": (np.stack(images), labels[: self.ways]), "names": labels[self.ways :]}

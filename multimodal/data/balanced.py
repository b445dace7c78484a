"""Classes of very different size: a source in which small ones come more often, and weights for the loss."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from multimodal.data.frames import as_samples
from multimodal.data.sources import LARGEST_STORED, Samples, check_samples, permutation, scattered
from multimodal.progress import progress_bar
from multimodal.shapes import ConfigError
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer


class Balanced:
    """The same samples, but those of small classes come more often: a class of n samples has a share in the ratio n ** (1 - power).

    Every sample comes in each epoch, so an epoch is longer than the data: until all of the largest class have come.

    samples: the samples, with a length and [index].
    field: the name of the field with the class; or the classes themselves, one of each sample, so that no sample is read here.
    power: 1: all classes have equal shares; 0: as in the data; between them a compromise.

    Raises:
        ConfigError: no samples, a sample without a class, or one whose class is no name or number.

    Examples:
        >>> data = mm.data.Balanced([{"label": "cat"}] * 90 + [{"label": "dog"}] * 10, "label")
        >>> len(data), data.shares
        (180, {'cat': 90, 'dog': 90})
    """

    def __init__(self, samples: Samples, field: str | Sequence[Hashable], *, power: float = 1.0) -> None:
        _check_power("Balanced", power)
        self.samples = as_samples(samples)
        check_samples("Balanced", "samples", self.samples)
        members: dict[Hashable, list[int]] = {}
        for i, name in enumerate(_classes("Balanced", self.samples, field)):
            members.setdefault(name, []).append(i)
        self.members = list(members.values())
        largest = max(map(len, self.members))
        # the largest class comes once, any other at least as often
        self.shares = {n: math.ceil(round(len(i) * (largest / len(i)) ** power, 6)) for n, i in members.items()}
        self.starts = list(accumulate(self.shares.values(), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Balanced: there is no sample {index}; there are {len(self)}")
        part = bisect_right(self.starts, index) - 1
        own = self.members[part]
        return self.samples[own[(index - self.starts[part]) % len(own)]]

    def shuffled(self, key: str) -> Callable[[int], int]:
        """The order of one epoch, see `Samples`."""
        size = len(self)
        slots = permutation(size, key) if size <= LARGEST_STORED else None
        far = scattered(size, key) if slots is None else None
        orders: dict[tuple[int, int], torch.Tensor] = {}

        def index(place: int) -> int:
            slot = int(slots[place]) if slots is not None else far(place)  # type: ignore[misc]
            part = bisect_right(self.starts, slot) - 1
            # each time round the samples of a class come in another order, so that in no epoch the same ones come more often
            round_, at = divmod(slot - self.starts[part], len(self.members[part]))
            if (part, round_) not in orders:
                orders[part, round_] = permutation(len(self.members[part]), f"{key}/{part}/{round_}")
            return self.starts[part] + int(orders[part, round_][at])

        return index


def class_weights(
    samples: Samples, field: str | Sequence[Hashable], tokenizer: Tokenizer, *, power: float = 1.0
) -> tuple[float, ...]:
    """Weights for `Classify(class_weights=..)`, so that a small class counts as much as a large one: (N / (V * n)) ** power for a
    class of n of the N samples, of V classes. A class without samples is weighed as if it had one.

    field: the name of the field with the class, or the classes themselves. tokenizer: that of the field.
    power: 1: all classes count the same, as scikit-learn's "balanced"; 0: all weights are 1; between them a compromise.

    Raises:
        ConfigError: no samples, a sample without a class, or a tokenizer whose values are no single classes.

    Examples:
        >>> names = Labels(("cat", "dog"))
        >>> mm.data.class_weights([{"label": "cat"}] * 75 + [{"label": "dog"}] * 25, "label", names)
        (0.6666666666666666, 2.0)
    """
    _check_power("class_weights", power)
    if not tokenizer.vocab_size or not tokenizer.classes:
        raise ConfigError(
            f"class_weights: the values of {type(tokenizer).__name__} are not single classes, such as those of Labels"
        )
    samples = as_samples(samples)
    check_samples("class_weights", "samples", samples)
    found = Counter(_classes("class_weights", samples, field))
    counts = [0] * tokenizer.vocab_size
    for name, count in found.items():
        try:
            (number,) = tokenizer(name).content.tolist()
        except ValueError as error:
            raise ConfigError(f"class_weights: {shortened(error, 300)}") from error
        counts[number] += count
    total = sum(counts)
    return tuple(float((total / (len(counts) * max(count, 1))) ** power) for count in counts)


def _classes(who: str, samples: Samples, field: str | Sequence[Hashable]) -> list[Hashable]:
    """The class of each sample.

    Raises:
        ConfigError: as above.
    """
    size = len(samples)
    if not isinstance(field, str):
        names = list(field)
        if len(names) != size:
            raise ConfigError(f"{who}: {len(names)} classes were given for {size} samples")
    else:
        names = []
        with progress_bar("classes of the samples", size) as bar:
            for i in range(size):
                sample = samples[i]
                if field not in sample:
                    raise ConfigError(f"{who}: sample {i} has no field {field!r}; it has {', '.join(map(str, sample))}")
                names.append(sample[field])
                bar.advance(1)
    for i, name in enumerate(names):
        if name is None or not _is_key(name):
            raise ConfigError(
                f"{who}: the class of sample {i} is {shortened(repr(name), 100)}; wanted a name or a number, which can be compared"
            )
    return names


def _is_key(name: Any) -> bool:
    """Whether a class can be found by this name: NaN is not even equal to itself."""
    try:
        return name in {name} and name == name
    except (TypeError, ValueError):
        return False


def _check_power(who: str, power: Any) -> None:
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power <= 1:
        raise ConfigError(
            f"{who}: power={power!r} must be a number from 0 (as in the data) to 1 (all classes count the same)"
        )

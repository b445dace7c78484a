"""Sources of samples that augment other samples: changes of fields, and mixtures of two pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.augment.base import Augmentation, check_between, generator, new_seed
from multimodal.augment.pictures import PictureAugmentation, resized
from multimodal.data import Samples, Wrapped, as_samples, check_samples
from multimodal.declare import check_part, declaration
from multimodal.shapes import ConfigError, MediaError, did_you_mean, is_number
from multimodal.texts import listed
from multimodal.tokenizer import AfterEncoding


class Augmented(Wrapped):
    """The same samples; whenever one is read, the named fields are changed at random.

    Random numbers come from numpy's global generator, which `mm.fit` seeds for each sample: a run that is resumed sees the same
    changes, with any number of data workers. What is declared here is saved in `config.json` of the run, and a run with other
    changes does not resume. Held-out data are not augmented.

    samples: the samples, with a length and [index].
    fields: the changes of each field, in order: those of one sort of value, and behind them those of tokens. A list of values
        (a field with a star) has each of them changed. None stays None.

    Raises:
        ConfigError: changes that do not fit together, or samples without a length; when a sample is read, a field that it lacks.
        MediaError: when a sample is read, a value that cannot be changed so; `max_bad` counts it as broken.

    Examples:
        >>> from multimodal import augment
        >>> varied = augment.Augmented(samples, {"image": (augment.RandomScale(0.5, 2.0), augment.ColorJitter())})
        >>> varied[0]["label"] == samples[0]["label"]
        True
        >>> run = mm.fit(model, {"image -> label": varied}, steps=3, batch=4, quiet=True)
    """

    def __init__(self, samples: Any, fields: Mapping[str, Augmentation | Sequence[Augmentation]]) -> None:
        self.samples = _checked("Augmented", samples)
        if not isinstance(fields, Mapping) or not fields:
            raise ConfigError(
                f'Augmented: fields={fields!r} names no field; give changes by field, such as {{"image": HorizontalFlip()}}'
            )
        self.fields = {name: _changes(name, given) for name, given in fields.items()}

    def declare(self) -> dict[str, Any]:
        return {"fields": {name: [declaration(part) for part in parts] for name, parts in self.fields.items()}}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample, draw = self.samples[index], generator()
        changed = {name: self._changed(sample, name, draw) for name in self.fields}
        return {**sample, **changed}

    def _changed(self, sample: Mapping[str, Any], name: str, draw: np.random.Generator) -> Any:
        value, parts = _field("Augmented", sample, name), self.fields[name]
        try:
            # a sound may be a list of its wave and its rate
            if isinstance(value, list) and not (len(value) == 2 and is_number(value[1])):
                return [_applied(parts, each, draw) for each in value]
            return _applied(parts, value, draw)
        except MediaError as error:
            raise MediaError(f"Augmented: field {name!r}: {error}") from error


class _Mixture(Wrapped):
    """Each picture is mixed with that of another sample, and the label is that of one of the two."""

    def __init__(self, samples: Any, *, image: str = "image", label: str = "label", alpha: float, share: float) -> None:
        who = type(self).__name__
        check_between(who, 1e-3, 1e3, alpha=alpha)
        check_between(who, 0, 1, share=share)
        self.samples = _checked(who, samples)
        self.image, self.label, self.alpha, self.share = image, label, alpha, share

    def declare(self) -> dict[str, Any]:
        return {"image": self.image, "label": self.label, "alpha": self.alpha, "share": self.share}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        who, draw = type(self).__name__, generator()
        mine, other = self.samples[index], self.samples[int(draw.integers(len(self.samples)))]
        values = [_field(who, sample, name) for sample in (mine, other) for name in (self.image, self.label)]
        for value in values:
            _refuse_late(who, value)
        # without a picture or a label there is nothing to mix
        if draw.random() >= self.share or any(value is None for value in values):
            return mine
        try:
            first_CYX, second_CYX = (PictureAugmentation.read(value) for value in values[::2])
        except MediaError as error:
            raise MediaError(f"{who}: field {self.image!r}: {error}") from error
        channels = max(len(first_CYX), len(second_CYX))
        first_CYX, second_CYX = (_with_channels(image_CYX, channels) for image_CYX in (first_CYX, second_CYX))
        second_CYX = resized(second_CYX, tuple(first_CYX.shape[1:]))
        mixed_CYX, rest = self._mixed(first_CYX, second_CYX, float(draw.beta(self.alpha, self.alpha)), draw)
        label = values[1] if draw.random() < rest else values[3]
        return {**mine, self.image: mixed_CYX, self.label: label}

    def _mixed(
        self, first_CYX: Tensor, second_CYX: Tensor, rest: float, draw: np.random.Generator
    ) -> tuple[Tensor, float]:
        """The mixed picture, and the share of the first one in it."""
        raise NotImplementedError


class Mixup(_Mixture):
    """Each picture is the weighted mean of itself and that of another sample (Zhang et al. 2018).

    The label is drawn: that of each picture with its weight as the probability. Cross-entropy is linear in its target, so the
    expected loss and gradient are those of the weighted target of the paper, and any head and any kind of answer can be
    used; a single step has more noise. The other picture is brought to the size of the first.

    samples: the samples, with a length and [index].
    image, label: the fields of the picture and of its answer.
    alpha: of the beta distribution of the weight; larger: more even mixtures.
    share: the probability that a sample is mixed at all.

    Examples:
        >>> from multimodal import augment
        >>> mixed = augment.Mixup(samples, alpha=0.2)
        >>> mixed[0]["label"] in ("circle", "square")
        True
    """

    def __init__(
        self, samples: Any, *, image: str = "image", label: str = "label", alpha: float = 0.2, share: float = 1.0
    ) -> None:
        super().__init__(samples, image=image, label=label, alpha=alpha, share=share)

    def _mixed(
        self, first_CYX: Tensor, second_CYX: Tensor, rest: float, draw: np.random.Generator
    ) -> tuple[Tensor, float]:
        return first_CYX * rest + second_CYX * (1 - rest), rest


class CutMix(_Mixture):
    """In each picture a rectangle is that of another sample's picture (Yun et al. 2019).

    The label is drawn, as `Mixup` says, with the shares of the area as probabilities.

    samples: the samples, with a length and [index].
    image, label: the fields of the picture and of its answer.
    alpha: of the beta distribution of the area that stays.
    share: the probability that a sample is mixed at all.

    Examples:
        >>> from multimodal import augment
        >>> mixed = augment.CutMix(samples, share=0.5)
    """

    def __init__(
        self, samples: Any, *, image: str = "image", label: str = "label", alpha: float = 1.0, share: float = 0.5
    ) -> None:
        super().__init__(samples, image=image, label=label, alpha=alpha, share=share)

    def _mixed(
        self, first_CYX: Tensor, second_CYX: Tensor, rest: float, draw: np.random.Generator
    ) -> tuple[Tensor, float]:
        height, width = first_CYX.shape[1:]
        side = (1 - rest) ** 0.5
        rows, columns = round(height * side), round(width * side)
        # the rectangle lies within the picture, so that its area is what was drawn, but for rounding
        top, left = int(draw.integers(height - rows + 1)), int(draw.integers(width - columns + 1))
        mixed_CYX = first_CYX.clone()
        mixed_CYX[:, top : top + rows, left : left + columns] = second_CYX[:, top : top + rows, left : left + columns]
        return mixed_CYX, 1 - rows * columns / (height * width)


def _checked(who: str, samples: Any) -> Samples:
    samples = as_samples(samples)
    check_samples(who, "samples", samples)
    return samples


def _changes(name: str, given: Any) -> tuple[Augmentation, ...]:
    """The changes of a field, checked: one sort of value first, then tokens."""
    parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if not parts:
        raise ConfigError(f"Augmented: field {name!r} has no changes; leave it out")
    for part in parts:
        check_part(f"Augmented: fields[{name!r}]", part, Augmentation, "HorizontalFlip()")
    sorts = [part.of for part in parts]
    values = [sort for sort in sorts if sort != "tokens"]
    if len(set(values)) > 1:
        raise ConfigError(
            f"Augmented: field {name!r} has changes of a {' and of a '.join(dict.fromkeys(values))}, and its value is one of them"
        )
    if sorts[: len(values)] != values:
        late = type(parts[sorts.index("tokens")]).__name__
        raise ConfigError(
            f"Augmented: field {name!r}: {late} changes tokens, so it comes behind the changes of the value; move it to the end"
        )
    return parts


def _field(who: str, sample: Mapping[str, Any], name: str) -> Any:
    if not isinstance(sample, Mapping):
        raise ConfigError(
            f"{who}: a sample is {type(sample).__name__}, wanted a mapping of fields; Fields(..) names the parts of a tuple"
        )
    if name not in sample:
        raise ConfigError(
            f"{who}: a sample has no field {name!r}; it has {listed(sample)}{did_you_mean(name, map(str, sample))}"
        )
    return sample[name]


def _applied(parts: Sequence[Augmentation], value: Any, draw: np.random.Generator) -> Any:
    if value is None:
        return None
    of_value = [part for part in parts if part.of != "tokens"]
    if of_value:
        _refuse_late("Augmented", value)
    of_tokens: Any = [part.change_tokens for part in parts if part.of == "tokens"]  # type: ignore[attr-defined]
    if of_value:
        value = of_value[0].read(value)
        for part in of_value:
            value = part.change(value, draw)
    return AfterEncoding(value, tuple(of_tokens), new_seed(draw)) if of_tokens else value


def _refuse_late(who: str, value: Any) -> None:
    """Refuse a value whose tokens are to be changed already: what changes the value itself comes first."""
    if isinstance(value, AfterEncoding):
        raise ConfigError(
            f"{who}: the samples within have changes of tokens (SpecAugment, TokenDropout, ..), and these must come last; put the "
            f"Augmented that makes them around this {who}"
        )


def _with_channels(image_CYX: Tensor, channels: int) -> Tensor:
    """Grey as colours, and opaque where the other picture has transparency."""
    if len(image_CYX) == channels:
        return image_CYX
    colour_CYX = image_CYX.expand(3, -1, -1) if len(image_CYX) == 1 else image_CYX
    return torch.cat([colour_CYX, torch.ones_like(colour_CYX[:1])]) if channels == 4 else colour_CYX

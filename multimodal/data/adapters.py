"""Data sets of other libraries as samples: names for the parts of a tuple, names for the numbers of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from multimodal.data.account import Account, Tally
from multimodal.data.codecs import Media
from multimodal.data.frames import as_samples
from multimodal.data.sources import is_indexed
from multimodal.declare import check_ordered
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import describe


class Fields:
    """The samples of a data set of torchvision, torchaudio or Hugging Face as mappings of fields.

    fields: a name for each part of a tuple, None for a part that is left out; a name given twice gathers both parts, as in
    Fields(speech, "audio", "audio", "text", None) for (wave, rate_hz, text, speaker). For mappings: the fields to select; none
    given: all. names: for a field that holds class numbers, the names of the classes in order. A class number is whole (1.0 is
    allowed, as tables with gaps have it; 1.7, True and "1" are not). A mapping of "bytes" and "path", which Hugging Face's
    `Image(decode=False)` gives, becomes a file that tokenizers decode.

    Raises:
        ConfigError: no data set with a length and [index], or (at a sample) other parts than were named.

    Examples:
        >>> pairs = [(square, 1), (circle, 0)]  # as a data set of torchvision gives them
        >>> mm.Fields(pairs, "image", "label", names={"label": ("circle", "square")})[0]["label"]
        'square'
    """

    def __init__(self, samples: Any, *fields: str | None, names: Mapping[str, Sequence[str]] | None = None) -> None:
        samples = as_samples(samples)
        if isinstance(samples, Mapping) or not is_indexed(samples):
            raise ConfigError(f"Fields: {type(samples).__name__} is no data set with a length and [index]")
        check_ordered("Fields: names", names)
        self.samples, self.fields, self.names = samples, fields, {k: tuple(v) for k, v in (names or {}).items()}
        if unknown := set(self.names) - set(fields or self.names):
            raise ConfigError(f"Fields: names are given for {', '.join(sorted(unknown))}, which is none of {fields}")
        if hasattr(samples, "shuffled"):  # a source that prefers some orders has this method
            self.shuffled = samples.shuffled

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        found = self._picked(sample) if isinstance(sample, Mapping) else self._named(sample)
        return {field: self._value(field, value) for field, value in found.items()}

    def account(self) -> Account:
        """Counts the parts of the first sample that become fields, and those that are left out."""
        tally = Tally("parts of a sample")
        if not len(self):
            return tally.account()
        sample = self.samples[0]
        if isinstance(sample, Mapping):
            picked = self._picked(sample)
            for name in sample:
                if name in picked:
                    tally.used += 1
                else:
                    tally.leave("not among the fields", name)
            return tally.account()
        self._named(sample)
        for number, name in enumerate(self.fields):
            if name is not None:
                tally.used += 1
            else:
                tally.leave("named None", f"part {number}")
        return tally.account()

    def _picked(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        picked = [field for field in self.fields if field is not None] or list(sample)
        if missing := [field for field in picked if field not in sample]:
            raise ConfigError(f"Fields: a sample has no {', '.join(missing)}; it has {', '.join(map(str, sample))}")
        return {field: sample[field] for field in picked}

    def _named(self, sample: Any) -> dict[str, Any]:
        parts = sample if isinstance(sample, (tuple, list)) else (sample,)
        if len(parts) != len(self.fields):
            raise ConfigError(
                f"Fields: {len(self.fields)} names are given, {self.fields}, and a sample has {len(parts)} parts: "
                f"{', '.join(map(describe, parts))}; name each, with None for what is left out"
            )
        gathered: dict[str, list[Any]] = {}
        for field, part in zip(self.fields, parts, strict=True):
            if field is not None:
                gathered.setdefault(field, []).append(part)
        return {field: values[0] if len(values) == 1 else tuple(values) for field, values in gathered.items()}

    def _value(self, field: str, value: Any) -> Any:
        if field in self.names and value is not None:
            value = value.tolist() if isinstance(value, (np.ndarray, Tensor)) else value
            many = isinstance(value, (list, tuple))
            return [self._name(field, v) for v in value] if many else self._name(field, value)
        if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else Media(value["bytes"], value["path"] or "")
        return value

    def _name(self, field: str, number: Any) -> str:
        names = self.names[field]
        if (
            isinstance(number, (bool, np.bool_))
            or not isinstance(number, (int, float, np.integer, np.floating))
            or number % 1 != 0  # True for NaN and infinity, too
        ):
            raise MediaError(
                f"Fields: {field} is {describe(number)}, which is no number of a class; wanted 0, 1, 2, .."
            )
        if not 0 <= number < len(names):
            raise MediaError(f"Fields: {field} is class {int(number)}, and there are names for {len(names)}")
        return names[int(number)]

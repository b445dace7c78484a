"""A packed stream: the tokens of many samples end to end, and which rows of it each task's head reads."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multimodal.attention import Layout
from multimodal.heads.base import Reading
from multimodal.masks import MaskInfo
from multimodal.notebook import packed_html
from multimodal.old_names import moved
from multimodal.tokenizer import Places


@dataclass(frozen=True)
class Stream:
    """One packed stream, ready for the device.

    content: by kind, the contents of all its tokens as one tensor, so that one call embeds them: ids (N,) or features (N, F).
    order_T: for each row of the stream, its index in the contents of all kinds end to end; None: they are in order already.
    position_TA: positions (T, A) of the tokens in steps, on the core's axes; within a sample, time goes on from field to field.
    layout: which rows belong to which sample and field, and which are bidirectional.
    readings: by task, the rows that its head reads, and their targets.
    places: by kind, where its tokens stand, for embeddings that depend on it.
    """

    content: dict[str, Tensor]
    order_T: Tensor | None
    position_TA: Tensor
    layout: Layout
    readings: dict[str, Reading]
    places: dict[str, Places] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of tokens, T."""
        return self.position_TA.shape[0]

    @property
    def samples(self) -> int:
        """Number of samples; a pair counts as two, one for each side."""
        return len(self.layout.spans)

    def narrowed(self) -> tuple[Tensor | None, dict[str, Reading]]:
        """The rows (N,) that heads read, and the readings renumbered to these rows alone.

        The rows are None if heads read more than half of the stream: then nothing is saved, and the readings stay as they are.
        """
        parts = [row_N for r in self.readings.values() for row_N in (r.row_N, r.key_N) if row_N is not None]
        if not parts or 2 * sum(map(len, parts)) > len(self):
            return None, self.readings
        wanted_N = torch.cat(parts)
        # after narrowing, each part lies where it was concatenated; `parts` has row_N before key_N of each reading, as below
        index = iter(torch.arange(len(wanted_N), device=wanted_N.device).split([len(row_N) for row_N in parts]))
        return wanted_N, {
            pattern: dataclasses.replace(r, row_N=next(index), key_N=None if r.key_N is None else next(index))
            for pattern, r in self.readings.items()
        }

    def _repr_html_(self) -> str:
        """For notebooks: a bar for each sample, with the tokens of its fields by kind."""
        info, counts = self.layout.info, {kind: len(content) for kind, content in self.content.items()}
        kind_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts.values()), dtype=torch.long))
        if self.order_T is not None:
            kind_T = kind_T[self.order_T.cpu()]
        shown = torch.stack([info.sample.cpu().long(), info.segment.cpu().long(), kind_T])
        runs, sizes = shown.unique_consecutive(dim=1, return_counts=True)
        samples: list[list[tuple[str, int]]] = [[] for _ in range(self.samples)]
        names = list(counts)
        for (sample, _, kind), size in zip(runs.T.tolist(), sizes.tolist(), strict=True):
            samples[sample].append((names[kind], size))
        return packed_html(f"Stream, {self.samples:,} samples, {len(self):,} tokens, no padding", samples, counts)

    def to(self, device: str | torch.device) -> "Stream":
        """The same stream on a device; the host does not wait for the copies."""
        # only copies from pinned memory are asynchronous; torch caches pinned memory, so the next stream reuses it
        pinned = torch.device(device).type == "cuda"

        def move(x: Tensor) -> Tensor:
            return (x.pin_memory() if pinned and x.device.type == "cpu" else x).to(device, non_blocking=pinned)

        info = self.layout.info
        links = None if info.links is None else info.links.moved(move)
        return Stream(
            content={kind: move(x) for kind, x in self.content.items()},
            order_T=None if self.order_T is None else move(self.order_T),
            position_TA=move(self.position_TA),
            layout=Layout(self.layout.spans, MaskInfo(*map(move, info.numbers), links=links)),
            readings={
                pattern: dataclasses.replace(
                    r, **{name: move(x) for name, x in vars(r).items() if isinstance(x, Tensor)}
                )
                for pattern, r in self.readings.items()
            },
            places={
                kind: dataclasses.replace(places, position_NA=move(places.position_NA))
                for kind, places in self.places.items()
            },
        )


__getattr__ = moved(__name__)  # goes with version 0.3

"""A packed stream: the tokens of many samples end to end, and which rows of it each task's head reads."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.attention import Layout
from multimodal.heads.base import Reading
from multimodal.masks import MaskInfo
from multimodal.old_names import moved


@dataclass(frozen=True)
class Stream:
    """One packed stream, ready for the device.

    content: everything of a kind, in one piece, so that it is embedded by one call; `order_T` then puts the rows of all
    kinds, one after the other, into the stream's order (None: they already are).
    position_TA: places in steps, time running on from field to field of a sample.
    order_T: the order of the rows in the stream, of those of `content` end to end; None: they are in order.
    layout: which rows belong to which sample and field, and who may look at whom.
    readings: by task, the rows that its head reads, and what they should say.
    """

    content: dict[str, Tensor]
    order_T: Tensor | None
    position_TA: Tensor
    layout: Layout
    readings: dict[str, Reading]

    def __len__(self) -> int:
        """Tokens."""
        return self.position_TA.shape[0]

    @property
    def samples(self) -> int:
        return len(self.layout.spans)

    def narrowed(self) -> tuple[Tensor | None, dict[str, Reading]]:
        """The rows (N,) that heads read, and what they read of those rows alone; None: more than half, so all as they lie."""
        parts = [row_N for r in self.readings.values() for row_N in (r.row_N, r.key_N) if row_N is not None]
        if not parts or 2 * sum(map(len, parts)) > len(self):
            return None, self.readings
        wanted_N = torch.cat(parts)
        lies = iter(torch.arange(len(wanted_N), device=wanted_N.device).split([len(row_N) for row_N in parts]))
        return wanted_N, {
            pattern: dataclasses.replace(r, row_N=next(lies), key_N=None if r.key_N is None else next(lies))
            for pattern, r in self.readings.items()
        }

    def to(self, device: str | torch.device) -> "Stream":
        """The same stream on a device; the host does not wait for the copies."""
        # copies from pinned memory alone are left to the device; torch keeps pinned memory for the next stream
        pinned = torch.device(device).type == "cuda"

        def move(x: Tensor) -> Tensor:
            return (x.pin_memory() if pinned and x.device.type == "cpu" else x).to(device, non_blocking=pinned)

        return Stream(
            content={kind: move(x) for kind, x in self.content.items()},
            order_T=None if self.order_T is None else move(self.order_T),
            position_TA=move(self.position_TA),
            layout=Layout(self.layout.spans, MaskInfo(**{name: move(x) for name, x in vars(self.layout.info).items()})),
            readings={
                pattern: dataclasses.replace(
                    r, **{name: move(x) for name, x in vars(r).items() if isinstance(x, Tensor)}
                )
                for pattern, r in self.readings.items()
            },
        )


__getattr__ = moved(__name__)  # goes with version 0.3

"""The X-ray as a mixture model: what each head is responsible for, whether the input is unusual, and which slots could be dropped.

known samples --> Evidence, Usage --+
one sample    --> XRay -------------+--> Mixture: a table, JSON
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from multimodal.look.attention_xray import XRay, xray
from multimodal.look.evidence import Evidence, Novelty, Usage, usage
from multimodal.model import Model

Sample = Mapping[str, Any]
LARGEST = 3  # components of a head that are named
MOST_SLOTS = 20  # that are listed as text


@dataclass(frozen=True)
class Mixture:
    """One sample read by mixtures: each head is a mixture model whose components are its keys, or the slots of a memory.

    ray: the X-ray of the sample.
    novelty: how unusual the sample's evidence is among that of known samples.
    known: the number of known samples.
    used: by layer, how much the known samples read each slot of a `PersistentMemory`; empty for a model without any.
    """

    ray: XRay
    novelty: Novelty
    known: int
    used: Mapping[str, Usage]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each head: layer, head, the number of components, the effective number, z and percentile of the evidence, and
        the components with the largest responsibilities: (name, mean share over the queries that the answer is read from)."""
        found = []
        for layer in self.ray.layers:
            numbers, share_HM = layer.summary(), layer.share_HTM[:, self.ray.asked(layer)].mean(1)
            for head in range(layer.heads):
                top = share_HM[head].topk(min(LARGEST, share_HM.shape[1]))
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                found.append(
                    {
                        "layer": layer.name,
                        "head": head,
                        "components": share_HM.shape[1],
                        "effective": numbers[head]["effective"],
                        "z": float(self.novelty.z[layer.name][head]),
                        "percentile": float(self.novelty.percentile[layer.name][head]),
                        "largest": [(self.ray.key_label(layer, key), share) for key, share in pairs],
                    }
                )
        return found

    def droppable(self, share: float = 0.01) -> dict[str, list[int]]:
        """By memory, the slots that the known samples hardly read (`Usage.dead`); `multimodal.zoo.pruned` takes them out."""
        return {name: torch.nonzero(one.dead(share)).flatten().tolist() for name, one in self.used.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; the threshold is None where too few samples are known for this alpha."""
        new = self.novelty
        threshold = new.threshold if new.threshold < float("inf") else None
        return {
            "unusual": new.unusual,
            "p": new.p,
            "alpha": new.alpha,
            "distance": new.distance,
            "threshold": threshold,
            "known": self.known,
            "heads": self.rows(),
            "droppable": self.droppable(),
        }

    def __str__(self) -> str:
        """The table of heads, the verdict and the slots as text."""
        rows = self.rows()
        width = max(len(row["layer"]) for row in rows)
        lines = [f"{'layer':<{width}}  head  components  effective  evidence z  percentile  largest responsibilities"]
        for row in rows:
            largest = ", ".join(f"{name} {share:.0%}" for name, share in row["largest"])
            lines.append(
                f"{row['layer']:<{width}}  {row['head']:>4}  {row['components']:>10}  {row['effective']:>9.2f}  "
                f"{row['z']:>+10.2f}  {row['percentile']:>10.0%}  {largest}"
            )
        lines += ["", f"{self.novelty}, of {self.known} known samples"]
        if self.novelty.threshold == float("inf"):
            lines.append(
                f"nothing can be unusual at alpha {self.novelty.alpha:g} with {self.known} known samples; give more of them"
            )
        for name, slots in self.droppable().items():
            total = self.used[name].usage_HM.shape[1]
            listed = " ".join(map(str, slots[:MOST_SLOTS])) + (" .." if len(slots) > MOST_SLOTS else "")
            lines.append(
                f"{name}: {len(slots)} of {total} slots could be dropped, as known samples hardly read them"
                f"{f': {listed}' if slots else ''}"
            )
        return "\n".join(lines)


def mixture(
    model: Model, task: str, sample: Sample | XRay, known: Sequence[Sample], *, alpha: float = 0.05, quiet: bool = False
) -> Mixture:
    """Read one sample, or its X-ray, as mixtures beside known samples, such as those that the model was trained on.

    known: 20 samples or more, as they will come: without augmentation. alpha: at most this share of inputs like the known ones is
    called unusual.

    Raises:
        ConfigError: alpha is no share; what `xray` raises. StreamError: too few known samples.

    Examples:
        >>> seen = mixture(model, "image -> label", {"image": square}, 2 * samples, quiet=True)
        >>> len(seen.rows()) == sum(layer.heads for layer in seen.ray.layers)
        True
    """
    ray = sample if isinstance(sample, XRay) else xray(model, task, sample)
    evidence = Evidence.fit(model, task, known, quiet=quiet)
    novelty = evidence.judge(ray, alpha=alpha)
    used = usage(model, task, known, quiet=quiet) if any(layer.key_M is None for layer in ray.layers) else {}
    return Mixture(ray, novelty, len(known), used)

"""The X-ray's read-outs of a trained multi-head layer, each against another way to the same number, in float64.

    uv run benchmarks/seeds.py xray            half a CPU-minute; every error is 1e-12 or less, the layer itself (float32) 1e-5

scikit-learn's digits, 4 x 4 patches, two blocks of four heads with a learned prior of relative places, 150 steps. What is checked
is `multimodal.look.LayerXRay` itself, on the queries and keys that the trained layers multiplied.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import multimodal as mm
from benchmarks.data import digits_8x8
from multimodal.attention import RelativeBias, ScaledDotProduct
from multimodal.look import LayerXRay, xray
from multimodal_tokenizers import ImagePatches, Labels

TASK = "image -> label"


@dataclass(frozen=True)
class Recorded(ScaledDotProduct):
    """The scaled dot product, which records the queries and keys that it multiplied."""

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        self.pairs.append((q_BTHK, k_BMGK))
        return super().features(q_BTHK, k_BMGK, weights)


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """The largest error of each identity over all heads, queries and keys of all layers, for a few test pictures."""
    train, test = digits_8x8(seed)
    score = Recorded()
    core = mm.Core(width=64, depth=2, heads=4, score=score, prior=RelativeBias(reach=16))
    tokenizers = {"image": ImagePatches(patch=2, channels=1), "label": Labels(tuple("0123456789"))}
    model = mm.Model(tokenizers, core, [TASK], seed=seed)
    mm.fit(model, {TASK: train}, steps=2 if quick else 150, batch=64, lr=2e-3, seed=seed, quiet=True)
    model.eval()
    found: dict[str, float] = {}
    for sample in test[: 1 if quick else 8]:
        score.pairs.clear()
        ray = xray(model, TASK, {"image": sample["image"]})
        for layer, (q_BTHK, k_BMHK) in zip(ray.layers, score.pairs, strict=True):
            q_HTK, k_HMK = (x[0].double().transpose(0, 1).clone() for x in (q_BTHK, k_BMHK))
            for name, error in identities(layer, q_HTK, k_HMK).items():
                least = name.startswith("least")
                found[name] = (min if least else max)(found.get(name, error), error)
        found["keys left out"] = found.get("keys left out", 0) + sum(int(x.seen_HTM.sum()) for x in ray.layers)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        xray(model, TASK, {"image": test[0]["image"]}).draw(out / "xray.png")
    return found


def identities(layer: LayerXRay, q_HTK: Tensor, k_HMK: Tensor) -> dict[str, float]:
    """Largest absolute errors; the score is computed again in float64, as the layer's own is float32."""
    width = q_HTK.shape[-1]
    q_HTK.requires_grad_()
    prior_HTM = layer.log_prior_HTM.clone().requires_grad_()
    slopes = dataclasses.replace(layer, score_HTM=q_HTK @ k_HMK.mT / width**0.5, log_prior_HTM=prior_HTM)
    d_q, d_prior = torch.autograd.grad(slopes.evidence_HT.sum(), (q_HTK, prior_HTM))
    with torch.no_grad():
        score_HTM, prior_HTM = q_HTK @ k_HMK.mT / width**0.5, layer.log_prior_HTM
        exact = dataclasses.replace(layer, score_HTM=score_HTM, log_prior_HTM=prior_HTM)
        r, value_HMK, joint_HTM = exact.posterior_HTM, layer.value_MHK.transpose(0, 1), score_HTM + prior_HTM
        bayes_HTM = prior_HTM.exp() * score_HTM.exp()
        expected_HT = torch.where(r > 0, r * joint_HTM, 0).sum(-1)
        second_HTK = r @ value_HMK.square() - (r @ value_HMK).square()
        # scaled dot product = Gaussians of variance sqrt(K), under a prior that undoes the keys' lengths
        gaussian_HTM = -torch.cdist(q_HTK, k_HMK).square() / (2 * width**0.5) + prior_HTM
        gaussian_HTM += k_HMK.square().sum(-1)[:, None] / (2 * width**0.5)
        variance_HT = torch.stack(
            [
                torch.stack([row[seen].var(unbiased=False) for row, seen in zip(rows, allowed, strict=True)])
                for rows, allowed in zip(score_HTM, exact.seen_HTM, strict=True)
            ]
        )
        errors = {
            "effective number": exact.effective_HT - (exact.evidence_HT - expected_HT).exp(),
            "evidence": d_q - r @ k_HMK / width**0.5,  # its gradient is the mean key (Shim 2022)
            "prior and likelihood": torch.cat(
                [
                    (r - bayes_HTM / bayes_HTM.sum(-1, keepdim=True)).flatten(),
                    (exact.score_variance_HT - variance_HT).flatten(),
                ]
            ),
            "usage": d_prior.sum(1) - exact.usage_HM,  # N_k of EM, from the log-normaliser
            "leave one out": _left_out(exact, joint_HTM, value_HMK),
            "spread": exact.spread_HT - second_HTK.sum(-1),
            "price of going hard": exact.price_HT + r.amax(-1).log(),
            "Gaussian mixture": gaussian_HTM.softmax(-1) - r,
        }
        found = {f"error of {name}": float(error.abs().max()) for name, error in errors.items()}
        found["error of the layer itself"] = float((exact.answer_HTK.transpose(0, 1) - layer.read_THK).abs().max())
        return found | {"least price of going hard": float(exact.price_HT.min())}


def _left_out(exact: LayerXRay, joint_HTM: Tensor, value_HMK: Tensor) -> Tensor:
    """Against the softmax over all other keys, for every key in turn."""
    without = torch.stack([exact.without(h) for h in range(exact.heads)])
    again = torch.full_like(without, torch.nan)
    for j in range(joint_HTM.shape[-1]):
        gone_HTM = joint_HTM.index_fill(2, torch.tensor([j]), -torch.inf)
        again[:, :, j] = gone_HTM.softmax(-1) @ value_HMK
    return (without - again).nan_to_num(torch.inf)  # every query here sees several keys

"""Attention: scores, priors and reads, which users swap; the plans and kernels that run them; and the KV cache."""

from multimodal.attention.cache import Cache
from multimodal.attention.cross import plan_cross_attention
from multimodal.attention.mechanism import Mechanism, Plan, Seen, Trace
from multimodal.attention.plan import BACKENDS, Backend, DensePlan, plan_attention, plan_layers
from multimodal.attention.priors import ALiBi, BucketedBias, MixingWeights, PredictedWindow, Related, RelativeBias
from multimodal.attention.reads import Choice, Gumbel, Hard, Read, Soft, reweighted
from multimodal.attention.scores import (
    Additive,
    Bernoulli,
    Cosine,
    DotProduct,
    Factored,
    Gaussian,
    General,
    LocationBased,
    ScaledDotProduct,
    Score,
    with_column,
)
from multimodal.masks import Layout, Span

__all__ = [
    "BACKENDS",
    "ALiBi",
    "Additive",
    "Backend",
    "Bernoulli",
    "BucketedBias",
    "Cache",
    "Choice",
    "Cosine",
    "DensePlan",
    "DotProduct",
    "Factored",
    "Gaussian",
    "General",
    "Gumbel",
    "Hard",
    "Layout",
    "LocationBased",
    "Mechanism",
    "MixingWeights",
    "Plan",
    "PredictedWindow",
    "Read",
    "Related",
    "RelativeBias",
    "ScaledDotProduct",
    "Score",
    "Seen",
    "Soft",
    "Span",
    "Trace",
    "plan_attention",
    "plan_cross_attention",
    "plan_layers",
    "reweighted",
    "with_column",
]

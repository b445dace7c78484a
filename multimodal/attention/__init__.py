"""The seam that users swap most: scores, masks, the kernels that run them, and the cache."""

from multimodal.attention.cache import Cache
from multimodal.attention.cross import plan_cross_attention
from multimodal.attention.layer import Attention
from multimodal.attention.layout import Layout, Plan, Span
from multimodal.attention.plan import BACKENDS, Backend, DensePlan, plan_attention
from multimodal.attention.scores import Cosine, ScaledDotProduct, Score

__all__ = [
    "BACKENDS",
    "Attention",
    "Backend",
    "Cache",
    "Cosine",
    "DensePlan",
    "Layout",
    "Plan",
    "ScaledDotProduct",
    "Score",
    "Span",
    "plan_attention",
    "plan_cross_attention",
]

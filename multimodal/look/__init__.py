"""Looking into a trained model: the X-ray of its attention, pictures of its answers; further modules: what it knows, and where."""

from multimodal.look.answers import draw_answers, looked_at
from multimodal.look.attention_xray import Field, XRay, xray
from multimodal.look.evidence import Evidence, Novelty, Usage, usage
from multimodal.look.posterior import LayerXRay

__all__ = [
    "Evidence",
    "Field",
    "LayerXRay",
    "Novelty",
    "Usage",
    "XRay",
    "draw_answers",
    "looked_at",
    "usage",
    "xray",
]

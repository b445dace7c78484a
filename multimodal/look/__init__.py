"""Looking into a trained model: the X-ray of its attention, pictures of its answers; further modules: what it knows, and where."""

from multimodal.look.answers import draw_answers, looked_at
from multimodal.look.evidence import Evidence, Novelty, Usage, usage
from multimodal.look.posterior import LayerXRay
from multimodal.look.xray import Field, XRay, xray

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

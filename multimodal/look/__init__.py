"""Tools that look into a trained model.

attention_xray.py, layer_xray.py   `xray`: what every attention head did with one input
drawing.py, page.py                the X-ray as a picture, and as an HTML page
answers.py                         attention rollout, and pictures of answers with it
evidence.py                        over many samples: unusual inputs, unused memory slots
mixture_view.py                    the X-ray as a mixture model, beside known samples
towers.py                          a tower as a model of its own, to be looked at like any other
layers.py                          the states of every layer by sample and field
probes.py, steering.py             linear probes of states; a direction added to states
lens.py                            the logit lens
embeddings.py                      nearest neighbours and angles in an embedding table
parameter_count.py                 parameters by part
"""

from multimodal.look.answers import attention_rollout, draw_answers
from multimodal.look.attention_xray import XRay, XRayField, xray
from multimodal.look.evidence import Evidence, Novelty, Usage, usage
from multimodal.look.layer_xray import LayerXRay
from multimodal.look.mixture_view import Mixture, mixture
from multimodal.look.towers import inside
from multimodal.old_names import moved

__all__ = [
    "Evidence",
    "LayerXRay",
    "Mixture",
    "Novelty",
    "Usage",
    "XRay",
    "XRayField",
    "attention_rollout",
    "draw_answers",
    "inside",
    "mixture",
    "usage",
    "xray",
]

__getattr__ = moved(__name__)  # goes with version 0.3

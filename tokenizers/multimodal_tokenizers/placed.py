"""The embedding of features that say where they stand: a linear layer, and sines and cosines of the places."""

import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.positions import sine_cosine
from multimodal.shapes import ConfigError


class PlacedLinear(nn.Module):
    """A linear layer of the first features, plus sines and cosines of the last ones, which are places.

    features: number of the features of the linear layer; with fewer than all, the places are not among them.
    places: number of the last features, which are places.
    scale: steps in one unit of these.
    """

    full_precision = True  # bfloat16 would round neighbouring places far from the middle to one number

    def __init__(self, features: int, places: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.features, self.places, self.scale = features, places, scale
        self.linear = nn.Linear(features, width)
        # sines and cosines need an equal number for each place; what is left over gets none
        self.encoded = width - width % (2 * places)
        if not self.encoded:
            raise ConfigError(f"width={width} is less than the {2 * places} sines and cosines of {places} places")

    def forward(self, content_NF: Tensor) -> Tensor:
        embedded_ND = self.linear(content_NF[:, : self.features].to(self.linear.weight.dtype))
        place_NA = content_NF[:, -self.places :] * self.scale
        rest = embedded_ND.shape[1] - self.encoded
        return embedded_ND + F.pad(sine_cosine(place_NA, self.encoded), (0, rest)).to(embedded_ND.dtype)

"""A small CNN that judges pictures of digits: its 32 features give a Frechet distance, its classes an inception score.

Both are only comparable under the same judge; they are neither FID nor IS of the literature, which use a network for photographs.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Judge(nn.Module):
    """Trained on images (N, 1, 14, 14) in -1..1 and their labels; compares others with `real` images."""

    def __init__(self, images: Tensor, labels: Tensor, real: Tensor, *, epochs: int = 4) -> None:
        super().__init__()
        shrink = (nn.ReLU(), nn.MaxPool2d(2))
        layers = [nn.Conv2d(1, 16, 3, 1, 1), *shrink, nn.Conv2d(16, 32, 3, 1, 1), *shrink]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 32), nn.ReLU())
        self.classes = nn.Linear(32, 10)
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        for _ in range(epochs):
            for some in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(self.classes(self.features(images[some])), labels[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.real = self(real)[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, 32) and class probabilities (N, 10)."""
        features = torch.cat([self.features(some) for some in images.split(500)])
        return features.double().numpy(), self.classes(features).double().softmax(-1).numpy()

    def score(self, name: str, images: Tensor) -> dict[str, float]:
        """FD, IS, and the share of the class that is made least."""
        features, p = self(images)
        least = np.bincount(p.argmax(1), minlength=10).min() / len(p)
        return {
            f"{name} FD": frechet(features, self.real),
            f"{name} IS": inception(p),
            f"{name} smallest class": float(least),
        }


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Distance of two Gaussians: |m - n|^2 + tr(A + B - 2 sqrt(AB)), the root's trace from the eigenvalues of AB."""
    a, b = np.cov(one.T), np.cov(other.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


def inception(p: np.ndarray) -> float:
    """exp E KL(p(y | x) || p(y)): Salimans et al. 2016."""
    return float(np.exp((p * (np.log(p + 1e-12) - np.log(p.mean(0) + 1e-12))).sum(1).mean()))

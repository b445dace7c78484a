"""A sparse autoencoder: states as sums of few directions out of many (Bricken et al. 2023, "Towards Monosemanticity")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.shapes import ConfigError, check_shapes


class SparseAutoencoder(nn.Module):
    """f = relu(encoder (x - centre) + bias), x' = decoder f + centre; every row of the decoder has length 1.

    The decoder's rows are the directions found (F, D); f is how much of each a state contains. `SparseAutoencoder.train_on(states,
    features=..)` returns a trained one.
    """

    def __init__(self, width: int, features: int, *, seed: int = 0) -> None:
        super().__init__()
        if width < 1 or features < 1:
            raise ConfigError(f"SparseAutoencoder: width={width} and features={features} must be at least 1")
        drawn_FD = torch.randn(features, width, generator=torch.Generator().manual_seed(seed))
        self.decoder_FD = nn.Parameter(F.normalize(drawn_FD, dim=-1))
        self.encoder_FD = nn.Parameter(self.decoder_FD.detach().clone())
        self.bias_F = nn.Parameter(torch.zeros(features))
        self.centre_D = nn.Parameter(torch.zeros(width))

    @property
    def directions_FD(self) -> Tensor:
        """The directions found, each of length 1."""
        return F.normalize(self.decoder_FD.detach(), dim=-1)

    def encode(self, state_ND: Tensor) -> Tensor:
        """The features (N, F) of states (N, D): none is negative, most are 0."""
        return F.relu((state_ND - self.centre_D) @ self.encoder_FD.T + self.bias_F)

    def forward(self, state_ND: Tensor) -> Tensor:
        """The states (N, D), reconstructed from their features."""
        return self.encode(state_ND) @ F.normalize(self.decoder_FD, dim=-1) + self.centre_D

    @classmethod
    def train_on(
        cls,
        state_ND: Tensor,
        features: int,
        *,
        sparsity: float = 0.1,
        steps: int = 3000,
        batch: int = 1024,
        lr: float = 3e-3,
        seed: int = 0,
    ) -> "SparseAutoencoder":
        """Learn from states (N, D) by Adam: mean |x - x'|^2 + sparsity * mean |f|_1, of states scaled to mean square length 1.

        After a quarter, a half and three quarters of the steps, directions that no state used in the last 100 steps are drawn
        anew from the states that are reconstructed worst (Bricken et al. 2023, appendix). The result takes unscaled states.

        Raises:
            ConfigError: settings that train nothing.
        """
        check_shapes("SparseAutoencoder", state_ND=state_ND)
        if len(state_ND) < 2 or steps < 1 or not lr > 0 or sparsity < 0:
            raise ConfigError(
                f"SparseAutoencoder: {len(state_ND)} states, steps={steps}, lr={lr}, sparsity={sparsity}; wanted two states or "
                "more, one step or more, a positive lr and sparsity 0 or more"
            )
        x_ND = state_ND.detach().float().cpu().clone()
        scale = float(x_ND.square().sum(-1).mean().sqrt().clamp(min=1e-12))
        x_ND = x_ND / scale
        made = cls(x_ND.shape[1], features, seed=seed)
        with torch.no_grad():
            made.centre_D.copy_(x_ND.mean(0))
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(made.parameters(), lr=lr, betas=(0.9, 0.99))
        used_F = torch.zeros(features, dtype=torch.bool)
        redraws = {round(steps * part) for part in (0.25, 0.5, 0.75)}
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 4 * (1 - (step - 1) / steps))  # the last quarter falls to 0
            part_ND = x_ND[torch.randint(len(x_ND), (batch,), generator=generator)]
            feature_NF = made.encode(part_ND)
            made_ND = feature_NF @ F.normalize(made.decoder_FD, dim=-1) + made.centre_D
            loss = (part_ND - made_ND).square().sum(-1).mean() + sparsity * feature_NF.sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if any(0 <= point - step < 100 for point in redraws):
                used_F |= (feature_NF > 0).any(0)
            if step in redraws:
                made._draw_anew(~used_F, x_ND, optimizer, generator)
                used_F.zero_()
        with torch.no_grad():
            made.decoder_FD.copy_(made.directions_FD)
            made.centre_D *= scale
            made.bias_F *= scale
        return made

    @torch.no_grad()
    def _draw_anew(
        self, dead_F: Tensor, state_ND: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Point unused directions at states drawn with probability proportional to their squared error."""
        dead = dead_F.nonzero()[:, 0]
        if not len(dead):
            return
        error_N = (state_ND - self(state_ND)).square().sum(-1)
        if not float(error_N.sum()) > 0:
            return
        drawn = torch.multinomial(error_N, len(dead), replacement=True, generator=generator)
        new_FD = F.normalize(state_ND[drawn] - self.centre_D, dim=-1)
        self.decoder_FD[dead] = new_FD
        self.encoder_FD[dead] = new_FD
        self.bias_F[dead] = 0.0
        # Adam's moments are those of the old directions
        for part in (self.decoder_FD, self.encoder_FD, self.bias_F):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[part][moment][dead] = 0.0


def recovered(found_FD: Tensor, true_ND: Tensor, *, cosine: float = 0.9) -> float:
    """The share of true directions (N, D) that some found direction (F, D) matches with at least this cosine."""
    cos_NF = F.normalize(true_ND, dim=-1) @ F.normalize(found_FD, dim=-1).T
    return float((cos_NF.amax(-1) >= cosine).float().mean())

"""Learning rate, AdamW and Muon: decides which weights are decayed and which matrices Muon orthogonalises."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from multimodal.model_parts import depths
from multimodal.network import Network
from multimodal.shapes import ConfigError
from multimodal.train.recipe import Recipe

MULTIPLIES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
ONE_CYCLE = 25  # the first rate of one-cycle is this part of lr, as in torch
MOMENTUM, EPS = 0.95, 1e-7  # of Muon
QUINTIC = (  # coefficients of x, x^3 and x^5 in each step (You 2025, https://leloykun.github.io/ponder/muon-opt-coeffs)
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Muon takes matrices of at least 4 rows and 4 columns, whose longer side is at most 128 times the shorter one
FEWEST_ROWS, MOST_OBLONG = 4, 128


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step (the first is step 0).

    It rises linearly over the share `warmup` of the steps: lr * (step + 1) / rising. The last rising step has the rate lr, even
    if all steps rise. From there it falls, by the recipe's schedule, to lr * final_lr, which is the rate of the last step.
    Without a warm-up the first step has the rate lr.

    "wsd" is warm-up, stable, decay (Hu et al. 2024, MiniCPM), with a linear decay (Hägele et al. 2024). "one-cycle" is the rate of
    Smith & Topin 2018 as torch's OneCycleLR has it; momentum stays as it is.
    """
    rising = max(round(recipe.steps * recipe.warmup), 1)
    one_cycle = recipe.schedule == "one-cycle"
    if step < rising:
        if one_cycle and rising > 1:
            return _half_cosine(recipe.lr / ONE_CYCLE, recipe.lr, step / (rising - 1))
        return recipe.lr * (step + 1) / rising
    least, fallen = recipe.lr * recipe.final_lr, (step + 1 - rising) / (recipe.steps - rising)
    if recipe.schedule in ("cosine", "one-cycle"):
        return _half_cosine(recipe.lr, least, fallen)
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "wsd":
        falling = max(round(recipe.steps * recipe.cooldown), 1)
        fallen = max(0, step + 1 - (recipe.steps - falling)) / falling
    return recipe.lr + (least - recipe.lr) * fallen


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * share))


def multiplies(model: nn.Module) -> set[str]:
    """Names of the parameters that are matrices which multiply the input; only these are decayed, and only these can go to Muon.

    They are the weights of torch's linear, convolutional and recurrent layers, and those that a module names in `matrices`. All
    others are vectors, however many lie in one tensor: norms, biases, scales, class tokens and learned starts, position grids and
    tables, memory slots, embeddings. Decay would pull them to 0 without need, and the embedding of a rare token in every step in
    which it does not occur.
    """
    names = set()
    for path, module in model.named_modules():
        own = getattr(module, "matrices", ())
        for name, parameter in module.named_parameters(recurse=False):
            weight = isinstance(module, MULTIPLIES) and "bias" not in name
            if (weight or name in own) and parameter.dim() >= 2:
                names.add(f"{path}.{name}" if path else name)
    return names


def parts(model: nn.Module) -> dict[str, list[int]]:
    """{parameter: rows of each of its matrices}, for parameters that hold several matrices one below the other.

    A module declares them by a method `fused`, which returns {"weight": [rows, ..]}.
    """
    found = {}
    for path, module in model.named_modules():
        own: dict[str, list[int]] = module.fused() if callable(getattr(module, "fused", None)) else {}  # type: ignore[operator]
        if isinstance(module, nn.RNNBase):  # the matrices of its gates
            gates = 4 if isinstance(module, nn.LSTM) else 3 if isinstance(module, nn.GRU) else 1
            own = {n: [len(p) // gates] * gates for n, p in module.named_parameters() if n.startswith("weight_")}
        found |= {f"{path}.{name}" if path else name: rows for name, rows in own.items()}
    return found


def rate_scales(model: Network, decay: float) -> dict[str, float]:
    """By name of a parameter, the share of the learning rate that it has: decay ** (highest depth - its depth).

    The layer-wise decay of Clark et al. 2020 (ELECTRA, section 3.1) and of timm; `depths` says what the depths are.
    """
    depth, highest = depths(model)
    return {name: decay ** (highest - d) for name, d in depth.items()}


def make_optimizer(
    model: Network,
    recipe: Recipe,
    device: torch.device,
    sharded: bool = False,
    divided: Collection[str] = (),
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the core's matrices and AdamW for all else.

    `multiplies` names the weights that are decayed. Each group has a "lr_scale", by which its learning rate is multiplied.
    divided: names of parameters that are divided by tensor parallel, whose groups are their own.
    """
    decayed, scales = multiplies(model), rate_scales(model, recipe.layer_decay)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.optimizer == "adamw":
        fused = device.type == "cuda" or (device.type == "cpu" and not sharded)
        return torch.optim.AdamW(
            _grouped(named, decayed, scales, recipe.weight_decay, divided),
            lr=recipe.lr,
            betas=recipe.betas,
            fused=fused,
        )
    if sharded:
        raise ConfigError(
            "Recipe: optimizer='muon' needs unsharded matrices, which parallel='fsdp' shards; use one of them"
        )
    # as in Jordan et al. embeddings and heads stay with AdamW: Muon takes matrices of the core only
    rows = parts(model)
    by_muon = {
        name: (p, rows.get(name, [p.shape[0]]))
        for name, p in named
        if name in decayed and name.startswith("core.") and p.dim() == 2
    }
    by_muon = {name: (p, r) for name, (p, r) in by_muon.items() if all(_is_matrix(n, p.shape[1]) for n in r)}
    groups: list[dict[str, Any]] = [
        {"params": [p], "weight_decay": recipe.weight_decay, "rows": r, "lr_scale": scales[name]}
        for name, (p, r) in by_muon.items()
    ]
    rest = [(name, p) for name, p in named if name not in by_muon]
    groups += _grouped(rest, decayed, scales, recipe.weight_decay)
    return Muon(groups, lr=recipe.lr, betas=recipe.betas)


def _grouped(
    named: list[tuple[str, nn.Parameter]],
    decayed: set[str],
    scales: dict[str, float],
    weight_decay: float,
    divided: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups of parameters of the same learning rate and weight decay; a step takes those of a group at once."""
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((scales[name], name in decayed, name in divided), []).append(parameter)
    # sorted, so that the order of the groups does not depend on the order of the model's parts
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0, "lr_scale": key[0]}
        for key in sorted(groups)
    ]


def _is_matrix(rows: int, columns: int) -> bool:
    short, long = sorted((rows, columns))
    return short >= FEWEST_ROWS and long <= MOST_OBLONG * short


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024) for matrices, each part of a fused one separately, and AdamW for the rest.

    A group with `rows` holds one parameter; `rows` are those of each matrix in it. The updates have the usual size of AdamW's, .2
    a weight (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both take the same rate.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "rows": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if group["rows"] is None:
                self._adam_step(learning, group)
            else:
                for parameter in learning:
                    self._orthogonal_step(parameter, group)

    def _orthogonal_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        momentum = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        for part, own in zip(parameter.split(group["rows"]), momentum.split(group["rows"]), strict=True):
            part.add_(orthogonal(own), alpha=-group["lr"] * 0.2 * max(own.shape) ** 0.5)

    def _adam_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all 1, roughly: five Newton-Schulz steps leave them between .7 and 1.3.

    A singular value below a thousandth of the largest ones stays smaller.
    """
    # bfloat16 is 20 times slower on a CPU without units for it
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in QUINTIC:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)

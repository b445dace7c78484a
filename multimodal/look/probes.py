"""Linear probes of states, with control tasks that show what a probe learns by itself."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.shapes import ShapeError, StreamError


@dataclass(frozen=True)
class Probe:
    """A linear classifier of states: logits = state @ weight_VD.T + bias_V.

    classes: the classes, in the order of the weights.
    weight_VD: weights for the states as given.
    bias_V: bias of each class.
    accuracy: on the held-out rows.
    majority: accuracy there of always answering the most frequent class of the training rows.
    control: accuracy of a probe trained on the control task, whose labels are random by type; None without a control task.
    """

    classes: tuple[Hashable, ...]
    weight_VD: Tensor
    bias_V: Tensor
    accuracy: float
    majority: float
    control: float | None = None

    @property
    def selectivity(self) -> float:
        """Accuracy minus that on the control task (Hewitt & Liang 2019); near 0 the probe, not the states, has learned the task."""
        if self.control is None:
            raise StreamError("Probe: selectivity needs a control task; give probe(.., control=types)")
        return self.accuracy - self.control

    def predict(self, state_ND: Tensor) -> list[Hashable]:
        """The class of each row."""
        return [self.classes[i] for i in (state_ND.float() @ self.weight_VD.T + self.bias_V).argmax(-1).tolist()]


def probe(
    state_ND: Tensor,
    labels: Sequence[Hashable],
    *,
    control: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    held_out: float = 0.25,
    decay: float = 1e-3,
    seed: int = 0,
) -> Probe:
    """Train a linear probe (logistic regression by L-BFGS) on a part of the rows and score it on the held-out ones.

    control: the type of each row, such as its word; the control task gives each type a random label, drawn by the frequencies
    of the labels (Hewitt & Liang 2019, section 2). groups: rows of one group stay on one side of the split, so that held-out
    words are new. decay: weight of |W|^2 / 2 beside the mean loss in nats, for states standardised to mean 0 and variance 1.

    Raises:
        ShapeError: labels, control or groups of another length. StreamError: a single class, states that are not finite, or an
        empty side.
    """
    count = len(state_ND)
    for name, given in (("labels", labels), ("control", control), ("groups", groups)):
        if given is not None and len(given) != count:
            raise ShapeError(f"probe: {name} has {len(given)} entries for {count} states; give one for each row")
    if not bool(torch.isfinite(state_ND).all()):
        raise StreamError(
            "probe: some states are not finite; take the rows that this layer has (States.rows, States.of)"
        )
    classes = tuple(dict.fromkeys(labels))
    if len(classes) < 2:
        raise StreamError(f"probe: all {count} labels are {labels[0]!r}; a probe needs two classes or more")
    target_N = torch.tensor([classes.index(label) for label in labels])
    generator = torch.Generator().manual_seed(seed)
    test_N = _held_out(groups if groups is not None else range(count), held_out, generator)
    if bool(test_N.all()) or not bool(test_N.any()):
        raise StreamError(f"probe: held_out={held_out} of {count} rows leaves one side empty; give more rows or groups")
    x_ND = state_ND.detach().float().cpu().clone()
    weight_VD, bias_V = fit_linear(x_ND[~test_N], target_N[~test_N], len(classes), decay=decay)
    most = int(torch.bincount(target_N[~test_N]).argmax())
    chance = None
    if control is not None:
        # one label for each type, drawn from the rows so that frequent labels stay frequent
        types = list(dict.fromkeys(control))
        drawn_N = target_N[torch.randint(count, (len(types),), generator=generator)]
        number = {kind: i for i, kind in enumerate(types)}
        control_N = drawn_N[torch.tensor([number[kind] for kind in control])]
        line = fit_linear(x_ND[~test_N], control_N[~test_N], len(classes), decay=decay)
        chance = _accuracy(x_ND[test_N], control_N[test_N], *line)
    return Probe(
        classes,
        weight_VD,
        bias_V,
        _accuracy(x_ND[test_N], target_N[test_N], weight_VD, bias_V),
        float((target_N[test_N] == most).float().mean()),
        chance,
    )


def fit_linear(
    state_ND: Tensor, target_N: Tensor, classes: int, *, decay: float = 1e-3, steps: int = 200
) -> tuple[Tensor, Tensor]:
    """Weights (V, D) and bias (V,) of the logistic regression that minimises mean cross-entropy + decay |W|^2 / 2.

    Decay applies to the weights for standardised states; the weights returned are for the states as given.
    """
    # decay then weighs all dimensions alike, and L-BFGS converges in few steps
    mean_D, spread_D = state_ND.mean(0), state_ND.std(0, correction=0).clamp(min=1e-6)
    x_ND = (state_ND - mean_D) / spread_D
    weight_VD = torch.zeros(classes, state_ND.shape[1], requires_grad=True)
    bias_V = torch.zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight_VD, bias_V], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(x_ND @ weight_VD.T + bias_V, target_N) + decay / 2 * weight_VD.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)  # pyright: ignore[reportArgumentType]  # the closure returns a tensor, as torch's own examples do
    weight_VD = weight_VD.detach() / spread_D
    return weight_VD, bias_V.detach() - weight_VD @ mean_D


def direction(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The mean of states `a` minus the mean of states `b` (D,), which moves a state from b's mean towards a's."""
    return a_ND.float().mean(0) - b_ND.float().mean(0)


def _held_out(groups: Sequence[Hashable], share: float, generator: torch.Generator) -> Tensor:
    """Which rows are held out: those of a random `share` of the groups."""
    kinds = list(dict.fromkeys(groups))
    order = torch.randperm(len(kinds), generator=generator).tolist()
    out = {kinds[i] for i in order[: round(share * len(kinds))]}
    return torch.tensor([group in out for group in groups])


def _accuracy(state_ND: Tensor, target_N: Tensor, weight_VD: Tensor, bias_V: Tensor) -> float:
    return float(((state_ND @ weight_VD.T + bias_V).argmax(-1) == target_N).float().mean())

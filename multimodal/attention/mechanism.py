"""One attention mechanism: prior + score -> posterior over keys -> read. A fused kernel runs it if one can, else plain PyTorch.

q, k ------score--> log likelihood --+
positions --prior--> log prior ------+--> posterior --read--> weighted values
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal.attention.reads import Choice, Read, Soft, mean_of
from multimodal.attention.scores import Factored, Score
from multimodal.masks import Pairs, Prior
from multimodal.shapes import ConfigError, ShapeError

BLOCK = 2**24  # the most numbers of the (queries, keys) matrices of one block of queries, without a fused kernel


@dataclass(frozen=True)
class Seen:
    """The record of one attention layer and one batch of queries.

    name: the layer, such as "block 1 self".
    pairs: the queries and keys, and which may attend to which.
    score_BHTM: log-likelihoods of the queries under the keys.
    log_prior_BHTM: log-priors; minus infinity where a query may not attend.
    weight_BHTM: the weights of the values.
    value_BMHK: the values.
    read_BTHK: the weighted sums of the values.
    choice: what a `Hard` read chose; None: another read.
    mechanism: the layer's mechanism.
    """

    name: str
    pairs: Pairs
    score_BHTM: Tensor
    log_prior_BHTM: Tensor
    weight_BHTM: Tensor
    value_BMHK: Tensor
    read_BTHK: Tensor
    choice: Choice | None = None
    mechanism: "Mechanism | None" = None

    @property
    def log_joint_BHTM(self) -> Tensor:
        """Log prior + log likelihood, whose softmax over keys is the posterior."""
        return self.score_BHTM + self.log_prior_BHTM


@dataclass
class Trace:
    """Collects a record of every attention layer; pass it to a model's forward.

    seen: the records, in the order in which the layers ran.
    """

    seen: list[Seen] = field(default_factory=list)


class Borrowed(nn.Module):
    """The parameters of another module, to which they belong: this one neither stores nor saves them."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.__dict__["of"] = of  # past nn.Module, which would make it a part of this module too

    def __getattr__(self, name: str) -> Any:
        if "of" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.__dict__["of"], name)


def share_priors(mechanisms: Iterable["Mechanism"]) -> None:
    """Let priors that are `shared` have the parameters of the first of these mechanisms that has the same prior and sizes."""
    first: dict[Any, nn.Module] = {}
    for mechanism in mechanisms:
        for i, prior in enumerate((*mechanism.priors, *mechanism.factors)):
            own = mechanism.prior_weights[i]
            key = prior, tuple(p.shape for p in own.parameters())
            if prior.shared and first.setdefault(key, own) is not own:
                mechanism.prior_weights[i] = Borrowed(first[key])


class Mechanism(nn.Module):
    """A score, a prior and a read with their learned parameters, for `heads` query heads of this width.

    changes_keys: whether the score replaces the keys, for instance by their positions.
    fused: whether a fused kernel can run it: a score that factors, a `Soft` read, no factor after the softmax.
    bare: whether that kernel needs nothing but the features of queries and keys: neither a prior nor positions.
    """

    def __init__(
        self, score: Score, prior: Prior | None, read: Read, heads: int, width: int, *, name: str = ""
    ) -> None:
        super().__init__()
        self.score, self.prior, self.read, self.name = score, prior, read, name
        self.score_weights = score.weights(heads, width)
        parts = prior.parts() if prior else ()
        self.priors = [p for p in parts if p.normalised]
        self.factors = [p for p in parts if not p.normalised]
        self.prior_weights = nn.ModuleList(
            p.weights(heads, width) or nn.Identity() for p in (*self.priors, *self.factors)
        )
        self.read_weights = read.weights()
        self.changes_keys = type(score).keys is not Score.keys
        self.fused = isinstance(score, Factored) and isinstance(read, Soft) and not self.factors
        self.bare = self.fused and prior is None and not self.changes_keys
        if self.factors and not isinstance(read, Soft):
            raise ConfigError(
                f"{type(self.factors[0]).__name__}: it does not renormalise, so it is a factor on the mean; "
                f"{type(read).__name__} needs a prior"
            )

    def forward(
        self, q_BTHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor, pairs: Pairs, trace: Trace | None = None
    ) -> Tensor:
        """The values that every query reads: (B, T, H, K). A trace collects the record of this call."""
        if self.changes_keys:
            k_BMGK = self.score.keys(k_BMGK, pairs.k.order[:, 0])
        if self.fused and trace is None:
            assert isinstance(self.score, Factored)
            q, k, scale = self.score.features(q_BTHK, k_BMGK, self.score_weights)
            # the kernel adds a float mask to the scores, so that a log-prior is one; a rule alone is a boolean mask
            mask, empty = None, None
            if self.prior is not None:
                mask, empty = self._log_prior(pairs, q_BTHK)
                mask = mask.to(q.dtype)
            elif pairs.allowed is not None:
                mask = pairs.allowed[:, None]
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v_BMGK.transpose(1, 2)
            read = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=pairs.causal and self.prior is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(1, 2)
            return read if empty is None else read.masked_fill(empty.transpose(1, 2), 0.0)
        # without a kernel the (T, M) matrices exist: long streams go block by block, each computed again for its gradient
        groups = q_BTHK.shape[2] // k_BMGK.shape[2]
        k_BMHK, v_BMHK = k_BMGK.repeat_interleave(groups, 2), v_BMGK.repeat_interleave(groups, 2)
        size = max(1, BLOCK // (k_BMHK.numel() if not isinstance(self.score, Factored) else k_BMHK[..., 0].numel()))
        if trace is not None or q_BTHK.shape[1] <= size:
            return self._written_out(q_BTHK, k_BMHK, v_BMHK, pairs, trace)
        out = []
        for start in range(0, q_BTHK.shape[1], size):
            rows = slice(start, start + size)
            some = rows_of(pairs, rows)
            out.append(
                checkpoint(
                    lambda q, k, v, some=some: self._written_out(q, k, v, some, None),
                    q_BTHK[:, rows],
                    k_BMHK,
                    v_BMHK,
                    use_reentrant=False,
                )
            )
        return torch.cat(out, 1)

    def _written_out(self, q_BTHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, pairs: Pairs, trace: Trace | None) -> Tensor:
        """The same by plain PyTorch, with every matrix of (queries, keys); here anything can be traced."""
        score = self.score.log_likelihood(q_BTHK, k_BMHK, self.score_weights)
        wanted = (q_BTHK.shape[0], q_BTHK.shape[2], q_BTHK.shape[1], k_BMHK.shape[1])
        _check(self.score, "log_likelihood", score, wanted)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        log_prior, empty = self._log_prior(pairs, q_BTHK)
        log_joint = score + log_prior
        _check(self.prior, "log_prior", log_joint, wanted)
        read, weight, choice = self.read.read(log_joint, v_BMHK, self.training)
        if self.factors:  # they come after the softmax, so that weights sum to less than 1
            alone = pairs.alone
            for factor, weights in zip(self.factors, self.prior_weights[len(self.priors) :], strict=True):
                weight = weight * factor.log_prior(alone, q_BTHK, weights).exp()
            read = mean_of(v_BMHK, weight)
        read = read.masked_fill(empty.transpose(1, 2), 0.0)
        if trace is not None:
            visible = log_prior.expand_as(score).masked_fill(empty, -math.inf)
            trace.seen.append(
                Seen(self.name, pairs, score, visible, weight.masked_fill(empty, 0.0), v_BMHK, read, choice, self)
            )
        return read

    def _log_prior(self, pairs: Pairs, q_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """(the log-prior (B, H, T, M) or what broadcasts to it, whether a query may attend to no key at all (B, H, T, 1)).

        The log-prior of such a query is 0 everywhere, lest its softmax be NaN; its result is set to 0 later.
        """
        shape = torch.broadcast_shapes(pairs.q.order.shape, pairs.k.order.shape)
        total = q_BTHK.new_zeros((shape[0], 1, *shape[1:]), dtype=torch.float32)
        alone = pairs.alone  # a prior must not depend on the position of a sample in its pack
        for prior, weights in zip(self.priors, self.prior_weights, strict=False):
            total = total + prior.log_prior(alone, q_BTHK, weights)
        closed = pairs.closed
        if closed is not None:
            total = total.masked_fill(closed[:, None], -math.inf)
        empty = (total == -math.inf).all(-1, keepdim=True)
        return total.masked_fill(empty, 0.0), empty


def _check(part: object, method: str, found: Tensor, wanted: tuple[int, ...]) -> None:
    if found.shape != wanted:
        raise ShapeError(
            f"{type(part).__name__}.{method} gave {tuple(found.shape)}; wanted is (samples, heads, queries, keys) = {wanted}"
        )


def rows_of(pairs: Pairs, rows: slice | Tensor) -> Pairs:
    """The pairs of some of the queries with all keys."""
    allowed = pairs.allowed
    if allowed is not None and allowed.shape[1] > 1:  # else it broadcasts over queries
        allowed = allowed[:, rows]
    return Pairs(pairs.q[:, rows], pairs.k, allowed, pairs.causal)


class Plan(ABC):
    """One way to compute attention over a stream, made once and used by every layer.

    trace: collects a record of every layer; None: nothing is recorded.
    """

    trace: Trace | None = None

    @abstractmethod
    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        """The values (T, H, K) that every query reads.

        mechanism: that of the layer. layer: its index among the layers that cache keys and values.
        """

    def narrowed(self, row_N: Tensor) -> "Plan | None":
        """A plan in which only these rows of the stream are queries, of all keys; None: this plan cannot, so compute all rows."""
        return None

"""What one attention layer did: entropy, evidence, prices and the other columns of the table of heads, exact from its posterior."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from multimodal.attention import Read, Soft

LEAST = math.log(torch.finfo(torch.float32).tiny)  # below it float32 has no logarithm of a factor
BLOCK = 2**22  # numbers that the reads without each key may hold at once

NAMES = {
    "effective": "effective",
    "evidence": "evidence",
    "prior": "prior variance",
    "score": "score variance",
    "price": "price of hard",
    "spread": "spread",
    "mass": "mass",
}
"""The column headings of `summary` in tables and pages."""


@dataclass(frozen=True, repr=False)
class LayerXRay:
    """What the heads of one attention layer did with the queries of one sample, in float64 on the CPU.

    name: of the layer, such as "block 1 self".
    query_T: the row of the sample that each query is.
    key_M: the row of the sample that each key is; None where keys are slots of a memory.
    score_HTM: log-likelihood of each key, in nats.
    log_prior_HTM: log-prior of each key, in nats; minus infinity where the mask hides it.
    weight_HTM: the weights that the layer gave the values.
    value_MHK: the values.
    read_THK: the output of the layer's heads.
    how: the layer's read.
    chosen_HT: the key that a hard read chose.
    factored: whether a factor was multiplied onto the posterior without renormalising it, as in Luong et al. 2015, equation 10.
    """

    name: str
    query_T: Tensor
    key_M: Tensor | None
    score_HTM: Tensor
    log_prior_HTM: Tensor
    weight_HTM: Tensor
    value_MHK: Tensor
    read_THK: Tensor
    how: Read = field(default_factory=Soft)
    chosen_HT: Tensor | None = None
    factored: bool = False

    def __repr__(self) -> str:
        heads, queries, keys = self.score_HTM.shape
        return (
            f"LayerXRay({self.name!r}, {counted(heads, 'head')}, {counted(queries, 'query')}, {counted(keys, 'key')})"
        )

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.score_HTM.shape[0]

    @property
    def seen_HTM(self) -> Tensor:
        """Which keys each query may see."""
        return self.log_prior_HTM > -math.inf

    @cached_property
    def log_joint_HTM(self) -> Tensor:
        """log prior + log likelihood."""
        return self.score_HTM + self.log_prior_HTM

    @cached_property
    def posterior_HTM(self) -> Tensor:
        """softmax of the log joint; 0 for a query that sees nothing."""
        return self.log_joint_HTM.softmax(-1).nan_to_num(0.0)

    @cached_property
    def factor_HTM(self) -> Tensor | None:
        """The factor that was multiplied onto the posterior without renormalising it; None: there is none."""
        if not self.factored:
            return None
        posterior = self.log_joint_HTM.float().softmax(-1).nan_to_num(0.0).double()  # as the layer had it
        return torch.where(posterior > 0, self.weight_HTM / posterior, 0.0)

    @cached_property
    def responsibility_HTM(self) -> Tensor:
        """The posterior, times the factor if there is one, which makes the sum `mass_HT` instead of 1."""
        return self.posterior_HTM if self.factor_HTM is None else self.posterior_HTM * self.factor_HTM

    @property
    def mass_HT(self) -> Tensor:
        """Sum of the responsibilities: 1, less under a factor, 0 for a query that sees nothing."""
        return self.responsibility_HTM.sum(-1)

    @cached_property
    def share_HTM(self) -> Tensor:
        """Responsibilities normalised to sum to 1."""
        mass_HT1 = self.mass_HT[..., None]
        return torch.where(mass_HT1 > 0, self.responsibility_HTM / mass_HT1, 0.0)

    @cached_property
    def effective_HT(self) -> Tensor:
        """exp H(r), the effective number of keys: 1 is a hard read, the number of keys is averaging, 0 sees no key."""
        entropy_HT = torch.special.entr(self.share_HTM).sum(-1)
        return torch.where(self.mass_HT > 0, entropy_HT.exp(), 0.0)

    @cached_property
    def evidence_HT(self) -> Tensor:
        """LSE_j(log prior + score), in nats: log p(query) under the mixture of keys, up to a constant of the layer."""
        return self.log_joint_HTM.logsumexp(-1)

    @property
    def price_HT(self) -> Tensor:
        """LSE - max >= 0, in nats: the gap of the bound when the likeliest key alone is read."""
        return self.evidence_HT - self.log_joint_HTM.amax(-1)

    @cached_property
    def prior_variance_HT(self) -> Tensor:
        """Var_j of the log-prior (plus the factor's logarithm) over the visible keys: large where position decides."""
        log_prior = self.log_prior_HTM
        if self.factor_HTM is not None:
            log_prior = log_prior + self.factor_HTM.log().clamp(min=LEAST)
        return self._variance(log_prior)

    @cached_property
    def score_variance_HT(self) -> Tensor:
        """Var_j of the score over the visible keys: large where content (or a rotary position) decides."""
        return self._variance(self.score_HTM)

    def _variance(self, x_HTM: Tensor) -> Tensor:
        seen, count = self.seen_HTM, self.seen_HTM.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(seen, x_HTM, 0.0).sum(-1, keepdim=True) / count
        return (torch.where(seen, x_HTM - mean, 0.0).square() / count).sum(-1)

    @property
    def usage_HM(self) -> Tensor:
        """N_k = sum_i r_ik: the usage of each key in queries (the sufficient statistic of EM)."""
        return self.responsibility_HTM.sum(1)

    @property
    def answer_HTK(self) -> Tensor:
        """The result of each query, computed in float64."""
        weight = self.responsibility_HTM if isinstance(self.how, Soft) else self.weight_HTM
        return weight @ self._value_HMK

    @property
    def _value_HMK(self) -> Tensor:
        return self.value_MHK.transpose(0, 1)

    @cached_property
    def spread_HT(self) -> Tensor:
        """sum_j r_j |v_j - o|^2 with o the mean under normalised r: the variance of what is read; 0 where the values agree."""
        value = self._value_HMK
        mean_HTK = self.share_HTM @ value
        # differences written out: products would lose digits where values agree
        away_HTM = torch.cdist(mean_HTK, value, compute_mode="donot_use_mm_for_euclid_dist").square()
        return (self.share_HTM * away_HTM).sum(-1)

    def without(self, head: int) -> Tensor:
        """The result of each query of a head without each key: (T, M, K); NaN where a query sees no other key.

        Of a soft read: o_-j = (o - r_j v_j) / (1 - r_j), without a second pass (with a factor, w_j v_j instead of r_j v_j). This
        loses digits as r_j nears 1, so the weights without each query's largest key, and those of reads that are not soft, are
        computed anew.
        """
        joint_TM, value_MK = self.log_joint_HTM[head], self._value_HMK[head]
        answer_TK = self.answer_HTK[head]
        if isinstance(self.how, Soft):
            r_TM, w_TM = self.posterior_HTM[head, ..., None], self.responsibility_HTM[head, ..., None]
            out = (answer_TK[:, None] - w_TM * value_MK) / (1 - r_TM)
            top_T = joint_TM.argmax(-1)
            weight_TM = joint_TM.scatter(1, top_T[:, None], -math.inf).softmax(-1)
            if self.factor_HTM is not None:
                weight_TM = weight_TM * self.factor_HTM[head]
            out[torch.arange(len(out)), top_T] = weight_TM @ value_MK
        else:
            out = answer_TK[:, None].repeat(1, len(value_MK), 1)
            for j in range(len(value_MK)):
                gone_TM = joint_TM.index_fill(1, torch.tensor([j]), -math.inf)
                out[:, j] = self.how.weigh(gone_TM[None, None], False)[0, 0].to(value_MK.dtype) @ value_MK
        seen_TM = self.seen_HTM[head]
        others_TM = seen_TM.sum(-1, keepdim=True) - seen_TM.int()
        return out.masked_fill((others_TM == 0)[..., None], math.nan)

    @cached_property
    def change_HTM(self) -> Tensor:
        """|o_-j - o|: the change of each query's result without key j; NaN where it sees no other key."""
        if isinstance(self.how, Soft) and not self.factored:
            return self._soft_change_HTM()
        keys, _, width = self.value_MHK.shape
        parts = []
        # a table (T, M, K) for each head would not fit in memory for long texts, so queries come in blocks
        for rows in torch.arange(len(self.query_T)).split(max(1, BLOCK // (keys * width))):
            part = self.only(rows)
            moved = [part.without(h) - part.answer_HTK[h][:, None] for h in range(self.heads)]
            parts.append(torch.stack([m.norm(dim=-1) for m in moved]))
        return torch.cat(parts, 1)

    def _soft_change_HTM(self) -> Tensor:
        """The change of a soft read without a table of reads: r_j |v_j - o| / (1 - r_j)."""
        value, r_HTM, answer = self._value_HMK, self.posterior_HTM, self.answer_HTK
        away_HTM = torch.cdist(answer, value, compute_mode="donot_use_mm_for_euclid_dist")
        change_HTM = away_HTM * r_HTM / (1 - r_HTM)
        # 1 - r_j loses its digits as r_j nears 1
        top_HT1 = self.log_joint_HTM.argmax(-1, keepdim=True)
        others = self.log_joint_HTM.scatter(-1, top_HT1, -math.inf).softmax(-1) @ value
        change_HTM = change_HTM.scatter(-1, top_HT1, (others - answer).norm(dim=-1, keepdim=True))
        seen = self.seen_HTM
        return change_HTM.masked_fill(seen.sum(-1, keepdim=True) - seen.int() == 0, math.nan)

    def only(self, index_N: Tensor) -> "LayerXRay":
        """The layer with these queries alone."""
        some = {name: getattr(self, name)[:, index_N] for name in ("score_HTM", "log_prior_HTM", "weight_HTM")}
        chosen_HT = None if self.chosen_HT is None else self.chosen_HT[:, index_N]
        rows = {"query_T": self.query_T[index_N], "read_THK": self.read_THK[index_N], "chosen_HT": chosen_HT}
        return replace(self, **some, **rows)

    def summary(self) -> list[dict[str, float]]:
        """For each head the means of its read-outs over the queries that see a key."""
        sees_T = self.seen_HTM.any(-1).any(0)
        numbers = {
            "effective": self.effective_HT,
            "evidence": self.evidence_HT,
            "prior": self.prior_variance_HT,
            "score": self.score_variance_HT,
            "price": self.price_HT,
            "spread": self.spread_HT,
            "mass": self.mass_HT,
        }
        means = {name: x_HT[:, sees_T].mean(-1).tolist() for name, x_HT in numbers.items()}
        return [{name: values[h] for name, values in means.items()} for h in range(self.heads)]


def counted(count: int, noun: str) -> str:
    """1 layer, 2 layers, 3 queries."""
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count} {noun}"


def percent(share: float) -> str:
    """16 %, 0.4 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"

"""One mutation of each mechanism, and the tests that must then fail: `python tests/mutations.py [words]` runs them on a copy.

Every mutation replaces a text that occurs once in its file. In a temporary copy of the tree the tests named are seen to pass as it
is, then to fail under the mutation, in a process of its own that is forked after PyTorch is imported. About four CPU-minutes.
"""

import io
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("multimodal", "tokenizers", "tests", "pyproject.toml")


class Mutation(NamedTuple):
    """In `file` of multimodal/, `old` becomes `new`; then each of `tests` fails (or one of its parameters)."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MECHANISM, LAYERS, REINFORCE = (
    "tests/attention/test_mechanism.py::test_",
    "tests/layers/test_layers.py::test_",
    "tests/attention/test_reinforce.py::test_",
)
FORMULA = MECHANISM + "every_score_under_every_prior_by_every_read_is_its_formula[{}]"
DENSE = LAYERS + "the_plain_version_is_the_oracle_of_the_fast_one[{}]"
PACKED = LAYERS + "packing_is_invisible[{}]"
CACHED = LAYERS + "a_cache_gives_the_states_of_the_whole_pass_at_every_length[{}]"
PIECES = LAYERS + "what_is_read_in_order_can_be_read_piece_by_piece[{}]"
LOCAL_P = MECHANISM + "local_p_is_luongs_equation_10_and_its_renormalised_twin"
EXPECTATION = REINFORCE + "its_expectation_is_the_gradient_of_the_expected_loss"
PAID = REINFORCE + "every_plan_and_core_pays_the_rows_it_should[{}]"
RECURRENT = LAYERS + "recurrent_layers_are_those_of_torch_sample_by_sample"
CONVOLVED = LAYERS + "temporal_convolutions_are_torchs_and_see_no_future"
BLOCKS = LAYERS + "long_samples_in_blocks_are_the_dense_oracle"

_MECHANISM = (
    (
        "mask dropped",
        "            total = total.masked_fill(closed[:, None], -math.inf)\n",
        "            total = total + 0\n",
        (FORMULA.format("scaled dot-ALiBi-soft"), FORMULA.format("additive-none-soft")),
    ),
    (
        "mask dropped before the kernel",
        "mask = None if pairs.allowed is None else pairs.allowed[:, None]",
        "mask = None",
        (FORMULA.format("scaled dot-none-soft"), DENSE.format("transformer")),
    ),
    (
        "causal flag dropped",
        "return sdpa(q, k, v_BMGK, scale, mask, pairs.causal)",
        "return sdpa(q, k, v_BMGK, scale, mask)",
        (FORMULA.format("dot-none-soft"), LAYERS + "what_is_read_in_order_can_be_read_piece_by_piece[transformer]"),
    ),
    (
        "scale of the kernel dropped",
        "is_causal=causal, scale=scale,",
        "is_causal=causal, scale=None,",
        (FORMULA.format("dot-none-soft"), MECHANISM + "one_more_column_brings_a_prior_of_each_key_to_the_fused_kernel"),
    ),
    (
        "a head that sees nothing",
        "        empty = (total == -math.inf).all(-1, keepdim=True)\n",
        "        empty = (total == -math.inf).all(-1, keepdim=True).all(1, keepdim=True)\n",
        (MECHANISM + "who_sees_nothing_reads_zero_and_learns_nothing_from_it[additive-blind head-soft]",),
    ),
    (
        "who sees nothing",
        "return total.masked_fill(empty, 0.0), empty",
        "return total, empty",
        (MECHANISM + "who_sees_nothing_reads_zero_and_learns_nothing_from_it[additive-none-soft]",),
    ),
    (
        "precision of scores lost",
        "torch.promote_types(score.dtype, torch.float32)",
        "torch.float32",
        (MECHANISM + "gradients_of_scores_are_finite_differences[additive]", FORMULA.format("additive-none-soft")),
    ),
    ("factor not applied", "            read = mean_of(v_BMHK, weight)\n", "", (LOCAL_P + "[dot-False]",)),
    (
        "groups of heads shuffled",
        "v_BMGK.repeat_interleave(groups, 2)\n",
        "v_BMGK.repeat(1, 1, groups, 1)\n",
        (FORMULA.format("additive-none-soft"), DENSE.format("grouped")),
    ),
    (
        "mask of a block of queries dropped",
        "allowed = None if pairs.allowed is None else some(pairs.allowed)",
        "allowed = None",
        (MECHANISM + "a_block_of_queries_at_a_time_is_the_whole",),
    ),
    (
        "causal flag of a block of queries dropped",
        "return Pairs(pairs.q[:, rows], pairs.k, allowed, pairs.causal)",
        "return Pairs(pairs.q[:, rows], pairs.k, allowed)",
        (MECHANISM + "a_block_of_queries_at_a_time_is_the_whole",),
    ),
    (
        "numbers of queries of a block lost",
        "return Pairs(pairs.q[:, rows], pairs.k,",
        "return Pairs(pairs.q[:, : rows.stop - rows.start], pairs.k,",
        (MECHANISM + "a_block_of_queries_at_a_time_is_the_whole[ALiBi]",),
    ),
    (
        "traced weights of who sees nothing",
        "weight.masked_fill(empty, 0.0), v_BMHK",
        "weight * 0.5, v_BMHK",
        (MECHANISM + "a_trace_tells_score_and_prior_apart_and_they_add_up_to_the_weights",),
    ),
)
_SCORES = (
    (
        "scale dropped",
        "return q_BTHK, k_BMGK, 1 / math.sqrt(q_BTHK.shape[-1])",
        "return q_BTHK, k_BMGK, 1.0",
        (
            FORMULA.format("scaled dot-none-soft"),
            MECHANISM + "at_first_scaled_scores_stay_broad_and_plain_ones_do_not",
            MECHANISM + "scaled_dot_product_is_a_mixture_of_gaussians_with_this_prior",
        ),
    ),
    (
        "dot product scaled",
        "        return q_BTHK, k_BMGK, 1.0\n",
        "        return q_BTHK, k_BMGK, q_BTHK.shape[-1] ** -0.5\n",
        (FORMULA.format("dot-none-soft"), MECHANISM + "at_first_scaled_scores_stay_broad_and_plain_ones_do_not"),
    ),
    (
        "rows and columns swapped",
        '"bthk,hkj->bthj", q_BTHK, weights.matrix.to(q_BTHK.dtype)), k_BMGK, 1.0',
        '"bthk,hjk->bthj", q_BTHK, weights.matrix.to(q_BTHK.dtype)), k_BMGK, 1.0',
        (FORMULA.format("general-none-soft"),),
    ),
    (
        "keys not normalised",
        "F.normalize(q_BTHK, dim=-1), F.normalize(k_BMGK, dim=-1)",
        "F.normalize(q_BTHK, dim=-1), k_BMGK",
        (FORMULA.format("cosine-none-soft"), MECHANISM + "a_score_of_cosines_cannot_focus_without_its_sharpness"),
    ),
    (
        "learned sharpness is its logarithm",
        "weights.log_scale.exp()[:, None]",
        "weights.log_scale[:, None]",
        (FORMULA.format("cosine, learned-none-soft"),),
    ),
    (
        "sharpness not learned",
        "return q * weights.log_scale.exp()",
        "return q * weights.log_scale.detach().exp()",
        (
            MECHANISM + "a_score_of_cosines_cannot_focus_without_its_sharpness",
            LAYERS + "every_weight_is_counted_and_learns[cosine]",
        ),
    ),
    (
        "norms of keys twice",
        "k_BMGK.square().sum(-1) * (-scale / 2)",
        "k_BMGK.square().sum(-1) * (-scale)",
        (
            FORMULA.format("Gaussian-none-soft"),
            MECHANISM + "scaled_dot_product_is_a_mixture_of_gaussians_with_this_prior",
        ),
    ),
    (
        "variance not inverted",
        "1 / (math.sqrt(q_BTHK.shape[-1]) if self.variance is None else self.variance)",
        "(math.sqrt(q_BTHK.shape[-1]) if self.variance is None else self.variance)",
        (FORMULA.format("narrow Gaussian-none-soft"),),
    ),
    (
        "extra column dropped",
        "        return with_column(q_BTHK, k_BMGK, -F.softplus(k_BMGK).sum(-1), 1.0)\n",
        "        return q_BTHK, k_BMGK, 1.0\n",
        (FORMULA.format("Bernoulli-none-soft"), MECHANISM + "a_mixture_of_bernoullis_is_float64_bayes"),
    ),
    (
        "bits of the wrong sign",
        "-F.softplus(k_BMGK).sum(-1)",
        "-F.softplus(-k_BMGK).sum(-1)",
        (FORMULA.format("Bernoulli-none-soft"), MECHANISM + "a_mixture_of_bernoullis_is_float64_bayes"),
    ),
    (
        "extra column scaled",
        "1), 1 / scale)",
        "1), 1.0)",
        (
            MECHANISM + "one_more_column_brings_a_prior_of_each_key_to_the_fused_kernel",
            FORMULA.format("Gaussian-none-soft"),
        ),
    ),
    (
        "places counted from the end",
        "return F.one_hot(order_BM, self.places)",
        "return F.one_hot(self.places - 1 - order_BM, self.places)",
        (FORMULA.format("location-none-soft"),),
    ),
    (
        "places counted over the pack",
        "count = int(order_BM.max()) + 1",
        "count = order_BM.shape[1]",
        (MECHANISM + "more_components_than_declared_are_refused", DENSE.format("location")),
    ),
    (
        "tanh dropped",
        "(q[:, :, :, None] + k[:, :, None]).tanh()",
        "(q[:, :, :, None] + k[:, :, None])",
        (FORMULA.format("additive-none-soft"),),
    ),
    (
        "keys by the queries' matrix",
        "k_BMHK, weights.key.to(q_BTHK.dtype)",
        "k_BMHK, weights.query.to(q_BTHK.dtype)",
        (FORMULA.format("additive-none-soft"), LAYERS + "every_weight_is_counted_and_learns[additive]"),
    ),
)
_PRIORS = (
    (
        "sign of the prior flipped",
        "return -slope_H[",
        "return slope_H[",
        (FORMULA.format("scaled dot-ALiBi-soft"), MECHANISM + "alibi_has_the_slopes_of_the_paper"),
    ),
    (
        "slopes off by one",
        "torch.arange(1, heads + 1, device",
        "torch.arange(0, heads, device",
        (MECHANISM + "alibi_has_the_slopes_of_the_paper", FORMULA.format("additive-ALiBi-soft")),
    ),
    (
        "distances mirrored",
        "weights.table[:, pairs.distance[:, 0].clamp",
        "weights.table[:, (-pairs.distance[:, 0]).clamp",
        (FORMULA.format("scaled dot-relative-soft"),),
    ),
    (
        "window not halved",
        "-away.square() / (2 * self.sigma**2)",
        "-away.square() / (self.sigma**2)",
        (FORMULA.format("general-local-p-soft"), LOCAL_P),
    ),
    (
        "window's centre short by one",
        "share_BHT[..., None] * pairs.count[:, None]",
        "share_BHT[..., None] * (pairs.count[:, None] - 1)",
        (FORMULA.format("general-local-p-soft"), LOCAL_P),
    ),
    (
        "window's centre without tanh",
        "weights.matrix.to(q_BTHK.dtype)).tanh()",
        "weights.matrix.to(q_BTHK.dtype))",
        (LOCAL_P,),
    ),
    (
        "mixing weights not normalised",
        "log_HM = weights.table.log_softmax(-1)",
        "log_HM = weights.table",
        (MECHANISM + "mixing_weights_are_the_components_probabilities",),
    ),
    (
        "mixing weights of the wrong component",
        "log_HM[:, pairs.k.order[:, 0].long()]",
        "log_HM.flip(-1)[:, pairs.k.order[:, 0].long()]",
        (
            MECHANISM + "mixing_weights_are_the_components_probabilities",
            MECHANISM + "a_mixture_of_bernoullis_is_float64_bayes",
            LAYERS + "a_persistent_memory_is_its_formula[mixing]",
        ),
    ),
)
_MASKS = (
    (
        "queries and keys swapped",
        "return (self.k.order - self.q.order)[:, None]",
        "return (self.q.order - self.k.order)[:, None]",
        (FORMULA.format("scaled dot-relative-soft"),),
    ),
    (
        "causal count off by one",
        "            return self.q.order + 1\n",
        "            return self.q.order\n",
        (FORMULA.format("general-local-p-soft"),),
    ),
    (
        "half of a sum lost",
        "return (*self.left.parts(), *self.right.parts())",
        "return self.left.parts()",
        (FORMULA.format("scaled dot-three-soft"), FORMULA.format("scaled dot-rule + prior-soft")),
    ),
    (
        "rule as a prior inverted",
        '.masked_fill(~allowed, float("-inf"))',
        '.masked_fill(allowed, float("-inf"))',
        (FORMULA.format("scaled dot-local-m-soft"),),
    ),
    (
        "window reach off by one",
        "        return self.size - 1\n",
        "        return max(self.size - 2, 0)\n",
        (BLOCKS + "[5-bare-fused]",),
    ),
    (
        "reach of either rule the smaller",
        "else max(left, right)",
        "else min(left, right)",
        (BLOCKS + "[of two-bare-fused]",),
    ),
)
_READS = (
    (
        "the least likely at test",
        "return log_joint_BHTM.argmax(-1)",
        "return log_joint_BHTM.argmin(-1)",
        (MECHANISM + "a_hard_read_is_one_row_of_the_values_bit_for_bit", FORMULA.format("scaled dot-none-hard")),
    ),
    (
        "a weighted sum, not a gather",
        "        value_BTHK = v_BMHK.gather(1, index)\n",
        "        value_BTHK = mean_of(v_BMHK, log_joint_BHTM.softmax(-1))\n",
        (MECHANISM + "a_hard_read_is_one_row_of_the_values_bit_for_bit",),
    ),
    (
        "share of means inverted",
        "device=key_BHT.device) >= self.expected",
        "device=key_BHT.device) < self.expected",
        (MECHANISM + "some_samples_of_a_hard_read_get_the_mean",),
    ),
    (
        "sampled from something flatter",
        "p = log_joint_BHTM.detach().softmax(-1)",
        "p = (log_joint_BHTM.detach() / 2).softmax(-1)",
        (
            MECHANISM + "samples_have_the_posteriors_frequencies[hard]",
            REINFORCE + "samples_average_to_the_exact_gradient",
        ),
    ),
    (
        "entropy's sign",
        "entropy_BHT = -(log_p.exp()",
        "entropy_BHT = (log_p.exp()",
        (MECHANISM + "a_hard_read_is_one_row_of_the_values_bit_for_bit", EXPECTATION + "[0.3-0.0]"),
    ),
    (
        "noise of the wrong sign",
        "log_joint_BHTM - torch.empty_like",
        "log_joint_BHTM + torch.empty_like",
        (MECHANISM + "samples_have_the_posteriors_frequencies[Gumbel]",),
    ),
    (
        "temperature inverted",
        "(log_joint_BHTM / self.temperature)",
        "(log_joint_BHTM * self.temperature)",
        (
            FORMULA.format("scaled dot-none-Gumbel"),
            MECHANISM + "a_gumbel_read_goes_from_one_value_to_their_mean_with_temperature",
        ),
    ),
    (
        "straight through without a gradient",
        "return one - relaxed.detach() + relaxed",
        "return one",
        (MECHANISM + "straight_through_is_one_hot_forward_and_the_softmax_backward",),
    ),
    (
        "shift reversed",
        "gated.roll(i - reach, dims=1)",
        "gated.roll(reach - i, dims=1)",
        (MECHANISM + "reweighting_is_the_turing_machines_equations",),
    ),
    (
        "gate inverted",
        "gate_B[:, None] * content_BM + (1 - gate_B[:, None]) * before_BM",
        "gate_B[:, None] * before_BM + (1 - gate_B[:, None]) * content_BM",
        (MECHANISM + "reweighting_is_the_turing_machines_equations",),
    ),
    (
        "not sharpened",
        "(shifted + 1e-12) ** sharpness_B[:, None]",
        "shifted + 1e-12",
        (MECHANISM + "reweighting_is_the_turing_machines_equations",),
    ),
    (
        "baseline follows the last reward",
        "self.mean.lerp_(reward.detach().to(self.mean.dtype), 0.1)",
        "self.mean.lerp_(reward.detach().to(self.mean.dtype), 0.9)",
        (REINFORCE + "the_baseline_is_a_moving_average_of_the_reward_of_one_row",),
    ),
)
_REINFORCE = (
    (
        "baseline sign",
        "reward_T[row_BT] - baseline.mean",
        "reward_T[row_BT] + baseline.mean",
        (REINFORCE + "a_baseline_near_the_mean_reward_takes_the_noise_out",),
    ),
    (
        "baseline that looks at the choice",
        "(counts_BT * advantage_BT)",
        "(counts_BT * (advantage_BT - baseline.mean * (seen.choice.key_BHT[:, 0] == 0)))",
        (EXPECTATION, REINFORCE + "samples_average_to_the_exact_gradient"),
    ),
    (
        "reward's sign",
        "reward_T, left_T = -_from_here_on(nll_T",
        "reward_T, left_T = _from_here_on(nll_T",
        (
            EXPECTATION,
            REINFORCE + "samples_average_to_the_exact_gradient",
            REINFORCE + "in_a_model_its_expectation_is_the_gradient_of_the_expected_loss",
        ),
    ),
    (
        "bonus for certainty",
        "loss = loss - read.entropy",
        "loss = loss + read.entropy",
        (EXPECTATION + "[0.3-0.0]", REINFORCE + "in_a_model_its_expectation_is_the_gradient_of_the_expected_loss"),
    ),
    (
        "its own row does not pay",
        "[end_T] - sum_T + x_T)",
        "[end_T] - sum_T)",
        (EXPECTATION, REINFORCE + "a_choice_is_paid_by_its_own_sample_from_its_row_on"),
    ),
    (
        "all of the pack pays",
        "(sum_T[end_T] - sum_T + x_T)",
        "(sum_T[-1] - sum_T + x_T)",
        (REINFORCE + "a_choice_is_paid_by_its_own_sample_from_its_row_on", PAID.format("runs-auto")),
    ),
    (
        "means are rewarded too",
        "seen.choice.sampled[:, 0] * paid_BT",
        "1 * paid_BT",
        (REINFORCE + "who_reads_the_mean_learns_from_its_gradient_alone",),
    ),
    (
        "what is written taken for what is read",
        "return (start_B + offset_B)[sample_BT]",
        "return start_B[sample_BT]",
        (PAID.format("writer-auto"),),
    ),
    (
        "what is read taken for what is written",
        "reads[sample_BT[first]] * written",
        "reads[sample_BT[first]]",
        (PAID.format("reader-auto"),),
    ),
)
_BASE = (
    (
        "gamma ignored",
        "return stream_TD + weights.gamma * update_TD",
        "return stream_TD + update_TD",
        (LAYERS + "merges_are_their_formulas", LAYERS + "gates_start_closed"),
    ),
    (
        "gamma starts open",
        "self.gamma = nn.Parameter(torch.zeros(1))",
        "self.gamma = nn.Parameter(torch.ones(1))",
        (LAYERS + "gates_start_closed",),
    ),
    (
        "concatenated the other way round",
        "return torch.cat([stream_TD, update_TD], -1)",
        "return torch.cat([update_TD, stream_TD], -1)",
        (LAYERS + "merges_are_their_formulas", LAYERS + "concatenation_widens_the_stream_and_a_last_linear_narrows_it"),
    ),
    (
        "residual in a replacement",
        "        return update_TD\n\n\n@dataclass(frozen=True)\nclass Concat",
        "        return stream_TD + update_TD\n\n\n@dataclass(frozen=True)\nclass Concat",
        (LAYERS + "merges_are_their_formulas",),
    ),
    (
        "state not carried",
        "return self.cache.state[index][rows].to(like.dtype)",
        "return like.new_zeros(len(rows), size)",
        (CACHED.format("GRU"), CACHED.format("LSTM"), CACHED.format("SNAIL"), PIECES.format("convolutions")),
    ),
    (
        "state not kept",
        "            self.cache.state[index][rows] = state_BF.to(self.cache.state[index].dtype)\n",
        "            pass\n",
        (CACHED.format("GRU"), PIECES.format("GRU")),
    ),
    (
        "rows not brought back",
        "self.back_T[self.order_T] = torch.arange",
        "self.back_T[:] = torch.arange",
        (RECURRENT, PACKED.format("GRU")),
    ),
    (
        "dropped samples not made up for",
        "(keep / (1 - self.drop_path))[sample_T]",
        "keep[sample_T]",
        (LAYERS + "dropout_thins_each_update_and_drop_path_leaves_out_samples",),
    ),
    (
        "rows dropped, not samples",
        "(keep / (1 - self.drop_path))[sample_T]",
        "((torch.rand_like(update_TD[:, :1]) >= self.drop_path) / (1 - self.drop_path))",
        (LAYERS + "dropout_thins_each_update_and_drop_path_leaves_out_samples",),
    ),
)
_RECURRENT = (
    (
        "read from the end as from the start",
        "mirror_T = row_T - places.order[row_T] + free_T[row_T] - 1 - places.order[row_T]",
        "mirror_T = row_T",
        (RECURRENT,),
    ),
    (
        "what is written read from its end",
        "free = [span.free for span in spans]",
        "free = [span.total for span in spans]",
        (RECURRENT + "[gru-True]", RECURRENT + "[lstm-True]", PIECES.format("GRU both ways")),
    ),
    (
        "state and cell swapped",
        "torch.cat([part[0] for part in end], -1)",
        "torch.cat([part[0] for part in end[::-1]], -1)",
        (CACHED.format("LSTM"), PIECES.format("LSTM")),
    ),
    (
        "state of the wrong sample",
        "return packed.data[sequences.back_T], state_BF.index_copy(0, rows,",
        "return packed.data[sequences.back_T], state_BF.index_copy(0, rows.flip(0),",
        (CACHED.format("GRU"),),
    ),
)
_TEMPORAL = (
    (
        "dilation off by one",
        "back_T = order_T - self.dilation\n",
        "back_T = order_T - self.dilation + 1\n",
        (CONVOLVED,),
    ),
    (
        "the sample before seen",
        "before_TD = rows[torch.where(back_T < 0, old_T, new_T)]",
        "before_TD = rows[new_T]",
        (CONVOLVED, PACKED.format("SNAIL")),
    ),
    (
        "what is kept off by one",
        "torch.arange(self.dilation, device=stream_TD.device) + totals[:, None] - self.dilation\n",
        "torch.arange(self.dilation, device=stream_TD.device) + totals[:, None] - self.dilation - 1\n",
        (CACHED.format("SNAIL"), CACHED.format("convolutions")),
    ),
    (
        "signal and gate swapped",
        "return signal.tanh() * gate.sigmoid()",
        "return gate.tanh() * signal.sigmoid()",
        (CONVOLVED,),
    ),
)
_ATTEND = (
    (
        "prior of the memory dropped",
        'Mechanism(score, layer.prior, read, self.heads, key, name="memory")',
        'Mechanism(score, None, read, self.heads, key, name="memory")',
        (LAYERS + "a_persistent_memory_is_its_formula[mixing]",),
    ),
    (
        "memory's queries numbered over the pack",
        "Pairs(context.layout.places[None, :, None], slots)",
        "everyone(len(q_THK), len(k_MGK), q_THK.device)",
        (PACKED.format("memory by distance"), CACHED.format("memory by distance"), PAID.format("memory-auto")),
    ),
)
_TWO = (
    (
        "last states off by one",
        "(read.places.order >= (reads - self.core.last)[",
        "(read.places.order >= (reads - self.core.last - 1)[",
        (
            LAYERS + "a_fixed_vector_is_the_last_state_of_what_was_read",
            LAYERS + "of_the_last_states_all_earlier_ones_are_unseen",
        ),
    ),
    (
        "cached position not from the writer's start",
        "place_TA = position_TA - cache.origin_BA[cache.row_index(layout.places.sample)]",
        "place_TA = position_TA",
        (CACHED.format("local-m"),),
    ),
)
_PLAN = (
    (
        "filled rows counted as rows",
        "order=self.queries(places.order + 1) - 1",
        "order=self.queries(places.order)",
        (PAID.format("blocks-auto"),),
    ),
    ("keys beyond the ends seen", "rule.allows(q, k) & there | ~asks", "rule.allows(q, k) | ~asks", (BLOCKS,)),
    (
        "blocks too narrow",
        "windows = wide.unfold(1, self.size + 2 * self.reach, self.size)",
        "windows = wide.unfold(1, self.size + 2 * self.reach - 1, self.size)",
        (BLOCKS,),
    ),
    (
        "prefix not free",
        "                mask[:, : span.free, : span.free] = True\n",
        "",
        (DENSE.format("transformer"),),
    ),
)
_KEPT = (
    (
        "a new token does not see itself",
        "rule.allows(q, k) & (k.order <= q.order)",
        "rule.allows(q, k) & (k.order < q.order)",
        (CACHED.format("transformer"),),
    ),
    (
        "mask of pieces dropped",
        "self.parts.append((row, total, Pairs(q, k, rule.allows(q, k))))",
        "self.parts.append((row, total, Pairs(q, k)))",
        (PIECES.format("transformer"),),
    ),
    (
        "cached position off by one",
        "order_M = torch.arange(self.window[1].stop, device=places.order.device)",
        "order_M = torch.arange(self.window[1].stop, device=places.order.device) + 1",
        (CACHED.format("ALiBi and a table"), CACHED.format("transformer")),
    ),
)
_CROSS = (
    (
        "samples see what others read",
        "self.pairs = Pairs(q, k, q.sample == k.sample)",
        "self.pairs = Pairs(q, k)",
        (DENSE.format("Bahdanau"), DENSE.format("fixed vector")),
    ),
    (
        "one key too many is there",
        "there = order_M < length_T[:, None, None]",
        "there = order_M <= length_T[:, None, None]",
        (CACHED.format("Bahdanau"),),
    ),
)
_CORE = (
    (
        "drop path alike in all blocks",
        "core.drop_path * depth / max(core.depth - 1, 1)",
        "core.drop_path",
        (LAYERS + "drop_path_rises_to_the_last_block_in_every_layer_of_it",),
    ),
    (
        "values' width forgotten in flops",
        "sum(m.heads * (m.key_width + m.value_width) for m",
        "sum(2 * m.heads * m.key_width for m",
        (LAYERS + "flops_of_unusual_cores_are_those_that_pytorch_counts[SNAIL]",),
    ),
    (
        "states as wide as the core",
        "layer.layer.state(self, layer.norm.weight.shape[0])",
        "layer.layer.state(self, self.width)",
        (CACHED.format("SNAIL"),),
    ),
    (
        "all states in one place",
        "                        counts[what] += 1\n",
        "",
        (CACHED.format("GRU"), CACHED.format("transformer")),
    ),
)
_LAYER = (
    (
        "turned whatever the score",
        "if self.turned and turns is not None",
        "if turns is not None",
        (LAYERS + "places_turn_what_is_compared_by_direction_and_nothing_else",),
    ),
    (
        "keys not turned",
        "rotate(q_THK, turns), rotate(k_TGK, k_turns)",
        "rotate(q_THK, turns), k_TGK",
        (LAYERS + "places_turn_what_is_compared_by_direction_and_nothing_else",),
    ),
)
_PRUNING = (
    (
        "the least used kept",
        "torch.argsort(N_k, descending=True)[: layer.slots]",
        "torch.argsort(N_k)[: layer.slots]",
        (LAYERS + "what_is_pruned_is_as_if_its_prior_were_nothing",),
    ),
)
_XRAY = (
    (
        "leave-one-out denominator",
        "(answer_TK[:, None] - w_TM * value_MK) / (1 - r_TM)",
        "(answer_TK[:, None] - w_TM * value_MK) / (1 + r_TM)",
        ("tests/look/test_xray.py::test_leave_one_out_is_a_second_pass_without_the_key",),
    ),
    (
        "nearly all taken from nearly all",
        "            out[torch.arange(len(out)), top_T] = weight_TM @ value_MK\n",
        "",
        ("tests/look/test_xray.py::test_leaving_out_keeps_its_digits_where_one_key_is_nearly_all",),
    ),
    (
        "entropy for effective number",
        "torch.where(self.mass_HT > 0, entropy_HT.exp(), 0.0)",
        "torch.where(self.mass_HT > 0, entropy_HT, 0.0)",
        ("tests/look/test_xray.py::test_read_outs_are_the_plain_sums",),
    ),
    (
        "price without the prior",
        "return self.evidence_HT - self.log_joint_HTM.amax(-1)",
        "return self.evidence_HT - self.score_HTM.amax(-1)",
        ("tests/look/test_xray.py::test_read_outs_are_the_plain_sums",),
    ),
    (
        "spread around zero",
        "mean_HTK = self.share_HTM @ value\n",
        "mean_HTK = 0 * self.share_HTM @ value\n",
        ("tests/look/test_xray.py::test_read_outs_are_the_plain_sums",),
    ),
    (
        "usage averaged",
        "return self.responsibility_HTM.sum(1)",
        "return self.responsibility_HTM.mean(1)",
        ("tests/look/test_xray.py::test_read_outs_are_the_plain_sums",),
    ),
)

_DATA, _STATE = "tests/data/test_data.py::test_", "tests/train/test_state.py::test_"

_PACKS = (
    (
        "a budget of one token less",
        "    within = (1 << (budget + 1)) - 1\n",
        "    within = (1 << budget) - 1\n",
        (_DATA + "a_pack_is_as_full_as_any_choice_with_its_first_sample",),
    ),
    (
        "those that waited are forgotten",
        '            fresh.again = deque(saved["waiting"])\n',
        "",
        (_DATA + "packs_go_on_from_a_state_with_other_workers_and_processes",),
    ),
    (
        "a source's state of later than the oldest that waits",
        "        oldest = min([place for place, _, _ in lane.waiting[:1]] + [lane.reached])\n",
        "        oldest = lane.reached + 128\n",
        (_DATA + "packs_go_on_from_a_state_with_other_workers_and_processes",),
    ),
)
_SOURCES = (
    (
        "a stream that ends goes on from its end",
        "                self.source.load_state_dict(copy.deepcopy(self.start))\n",
        "                pass\n",
        (_DATA + "a_stream_begins_again_when_it_ends_also_right_after_a_state",),
    ),
    (
        "turns are counted within a block",
        "        return who, block * self.share[who] + before\n",
        "        return who, before\n",
        (_DATA + "turns_are_counted_and_shares_kept_in_every_block",),
    ),
)
_STATES = (
    (
        "flipped bits are not noticed",
        '            if file_hash(path) != entry["sha256"]:\n',
        "            if False:\n",
        (_STATE + "a_damaged_state_is_noticed_and_the_one_before_is_used",),
    ),
    (
        "all states are kept",
        "self._all()[: -self.keep]",
        "self._all()[:0]",
        (_STATE + "the_last_ones_are_kept",),
    ),
)
_FIT = (
    (
        "the data begin anew",
        '                self.feed.restore(saved["data_state"])\n',
        "                pass\n",
        ("tests/train/test_fit.py::test_a_token_budget_is_resumed_exactly",),
    ),
    (
        "dropout of the same micro-batch differs from step to step only by its number",
        "/dropout/{self.step}/{number}",
        "/dropout/{number}",
        ("tests/train/test_fit.py::test_dropout_is_drawn_anew_in_every_step",),
    ),
    (
        "the worst model is the best",
        '(row[name] < self.best if name.endswith(" loss")',
        '(row[name] > self.best if name.endswith(" loss")',
        (_STATE + "the_best_model_is_kept",),
    ),
)

_STEP = (
    (
        "the norm's weights forgotten in the step",
        "return _columns(linear.weight * norm.weight)",
        "return _columns(linear.weight)",
        ("tests/generate/test_step.py::test_a_step_is_what_the_core_computes[default-alike]",),
    ),
    (
        "rows of unequal length step without a mask",
        "sdpa(q_B1HK, k_BMGK, v_BMGK, scale, plan.mask)",
        "sdpa(q_B1HK, k_BMGK, v_BMGK, scale)",
        ("tests/generate/test_step.py::test_a_step_is_what_the_core_computes[default-unlike]",),
    ),
    (
        "a product with a bias is plain",
        " and module.bias is None and ",
        " and ",
        ("tests/generate/test_step.py::test_what_was_put_into_a_core_is_not_passed_by[with_a_bias]",),
    ),
)
_ENTROPY = (
    (
        "no smoothing in the gradient",
        "                    grad -= smoothing / grad.shape[1]\n",
        "                    grad -= 0\n",
        ("tests/heads/test_cross_entropy.py::test_heads_lose_the_same_in_chunks[0.1]",),
    ),
    (
        "gradients where nothing is learned",
        "    if not torch.is_grad_enabled():  # which",
        "    if False:  # which",
        ("tests/heads/test_cross_entropy.py::test_an_evaluation_makes_no_gradients",),
    ),
)
_CHOOSING = (
    (
        "a rule may write into what others read",
        "chances_BV = rule(log_p_BV.clone(), written)",
        "chances_BV = rule(log_p_BV, written)",
        ("tests/generate/test_samplers.py::test_a_rule_that_writes_into_what_it_is_given_changes_nothing_else",),
    ),
)
_SPLIT = (
    (
        "what is free looks at everything",
        "context = mechanism(q_BTHK[:, some], k_BMGK[:, some], v_BMGK[:, some], self.context)",
        "context = mechanism(q_BTHK, k_BMGK, v_BMGK, self.causal)[:, some]",
        ("tests/attention/test_attention.py::test_long_samples_are_read_in_two_calls_without_a_mask[bare-4]",),
    ),
)

MUTATIONS = [
    Mutation(name, file, old, new, tests)
    for file, found in (
        ("generate/step.py", _STEP),
        ("cross_entropy.py", _ENTROPY),
        ("generate/choosing.py", _CHOOSING),
        ("attention/plan.py", _SPLIT),
        ("attention/mechanism.py", _MECHANISM),
        ("data/packs.py", _PACKS),
        ("data/sources.py", _SOURCES),
        ("train/state.py", _STATES),
        ("train/fit.py", _FIT),
        ("attention/scores.py", _SCORES),
        ("attention/priors.py", _PRIORS),
        ("masks.py", _MASKS),
        ("attention/reads.py", _READS),
        ("reinforce.py", _REINFORCE),
        ("layers/base.py", _BASE),
        ("layers/recurrent.py", _RECURRENT),
        ("layers/temporal.py", _TEMPORAL),
        ("layers/attend.py", _ATTEND),
        ("encoder_decoder.py", _TWO),
        ("attention/plan.py", _PLAN),
        ("attention/kept.py", _KEPT),
        ("attention/cross.py", _CROSS),
        ("core.py", _CORE),
        ("attention/layer.py", _LAYER),
        ("pruning.py", _PRUNING),
        ("look/posterior.py", _XRAY),
    )
    for name, old, new, tests in found
]


def mutated(mutation: Mutation, source: str) -> str:
    """The file's text under the mutation."""
    if source.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {source.count(mutation.old)} times in {mutation.file}"
        )
    return source.replace(mutation.old, mutation.new)


def outcome(tree: Path, tests: tuple[str, ...]) -> tuple[set[str], set[str], str]:
    """(tests that passed, tests that failed, what pytest said), run in a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        said = io.StringIO()
        report = _Report()
        try:
            with redirect_stdout(said), redirect_stderr(said):
                _run(tree, tests, report)
        except BaseException as error:
            said.write(repr(error))
        with os.fdopen(send, "w") as pipe:
            pipe.write(
                "\n".join([*(f"+{t}" for t in report.passed), *(f"-{t}" for t in report.failed)])
                + "\0"
                + said.getvalue()
            )
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        lines, _, said = pipe.read().partition("\0")
    os.waitpid(child, 0)
    marked = lines.splitlines()
    return {x[1:] for x in marked if x[0] == "+"}, {x[1:] for x in marked if x[0] == "-"}, said


class _Report:
    """A plugin that notes what becomes of each test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _run(tree: Path, tests: tuple[str, ...], report: _Report) -> None:
    import pytest

    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tokenizers")]
    sys.dont_write_bytecode = True
    options = ["-n", "0", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), "-c", str(tree / "pyproject.toml")]
    pytest.main([*options, *tests], plugins=[report])
    import multimodal

    assert str(tree) in str(multimodal.__file__), "the tests ran on another tree"


def among(name: str, tests: set[str]) -> bool:
    """Whether a test of this name, or one of its parameters, is among these."""
    return any(test == name or ("[" not in name and test.startswith(f"{name}[")) for test in tests)


def check(mutations: list[Mutation]) -> list[tuple[str, str, str]]:
    """Run them; what went wrong, as (mutation, test, what pytest said). Prints a table."""
    import pytest  # noqa: F401  all heavy imports before the processes are forked
    import scipy.stats  # noqa: F401
    import torch
    import torch.utils.flop_counter

    torch.set_num_threads(1)
    wrong: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "copy"
        tree.mkdir()
        for name in COPIED:
            source, ignore = ROOT / name, shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source, tree / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tree / name)
        asked = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        passed, failed, said = outcome(tree, asked)
        wrong += [("no mutation", test, said) for test in asked if among(test, failed) or not among(test, passed)]
        print(f"{len(asked)} tests, {len(passed)} with their parameters, pass as they are: {not wrong}", flush=True)
        for mutation in mutations:
            path = tree / "multimodal" / mutation.file
            source = path.read_text(encoding="utf-8")
            path.write_text(mutated(mutation, source), encoding="utf-8")
            _, failed, said = outcome(tree, mutation.tests)
            path.write_text(source, encoding="utf-8")
            alive = [test for test in mutation.tests if not among(test, failed)]
            wrong += [(mutation.name, test, said) for test in alive]
            state = f"{len(mutation.tests) - len(alive)} of {len(mutation.tests)} fail"
            print(f"{'survived' if alive else 'caught':<9}{mutation.file:<24}{mutation.name:<48}{state}", flush=True)
    return wrong


if __name__ == "__main__":
    chosen = [m for m in MUTATIONS if all(word in f"{m.file} {m.name}" for word in sys.argv[1:])]
    begun = time.process_time()
    problems = check(chosen)
    used = time.process_time() - begun + sum(os.times()[2:4])
    for which, test, said in problems:
        print(f"\n{which}: {test} did not do what it should\n{said[-1500:]}")
    print(f"{len(chosen)} mutations, {len({which for which, _, _ in problems})} not caught, {used:.0f} CPU-seconds")
    sys.exit(bool(problems))

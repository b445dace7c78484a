"""One mutation of each mechanism, and the tests that must then fail: `python tests/mutations.py [words]` runs them on a copy.

Every mutation replaces one expression or statement of one symbol, both written as Python with wildcards (see `Mutation`), so that
it survives new names of variables, other layout and moved lines. In a temporary copy of the tree the tests named are seen to pass
as it is, then to fail under the mutation, in a process of its own that is forked after PyTorch is imported. About four CPU-minutes.
`--list` shows what would be run.
"""

import ast
import builtins
import copy
import difflib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("multimodal", "tokenizers", "tests", "pyproject.toml")


class Mutation(NamedTuple):
    """In `symbol`, what `find` describes becomes `put`; then each of `tests` fails (or one of its parameters).

    symbol: "attention.mechanism:Mechanism.forward", of multimodal; a class stands for all its methods.
    find: an expression or a statement, which must occur once in the symbol. A name such as _q is a wildcard: it stands for any
        variable, everywhere for the same one; an attribute such as ._free for any attribute. `*_rest` and `**_more` in a call
        stand for its other arguments. All else is meant as written.
    put: what takes its place, with the same wildcards; _arg0, _arg1 .. are the symbol's own arguments; "pass" removes a statement.
    """

    name: str
    symbol: str
    find: str
    put: str
    tests: tuple[str, ...]


MECHANISM = "tests/attention/test_mechanism.py::test_"
LAYERS = "tests/layers/test_layers.py::test_"
REINFORCE = "tests/attention/test_reinforce.py::test_"
XRAY = "tests/look/test_xray.py::test_"
DATA = "tests/data/test_data.py::test_"
STATE = "tests/train/test_state.py::test_"
FIT = "tests/train/test_fit.py::test_"
STEP = "tests/generate/test_step.py::test_"
ENTROPY = "tests/heads/test_cross_entropy.py::test_"
SAMPLERS = "tests/generate/test_samplers.py::test_"
PLACES = "tests/generate/test_next_place.py::test_"
ATTENTION = "tests/attention/test_attention.py::test_"
FORMULA = MECHANISM + "every_score_under_every_prior_by_every_read_is_its_formula[{}]"
DENSE = LAYERS + "the_plain_version_is_the_oracle_of_the_fast_one[{}]"
PACKED = LAYERS + "packing_is_invisible[{}]"
CACHED = LAYERS + "a_cache_gives_the_states_of_the_whole_pass_at_every_length[{}]"
PIECES = LAYERS + "what_is_read_in_order_can_be_read_piece_by_piece[{}]"
PAID = REINFORCE + "every_plan_and_core_pays_the_rows_it_should[{}]"
LOCAL_P = MECHANISM + "local_p_is_luongs_equation_10_and_its_renormalised_twin"
EXPECTATION = REINFORCE + "its_expectation_is_the_gradient_of_the_expected_loss"
RECURRENT = LAYERS + "recurrent_layers_are_those_of_torch_sample_by_sample"
CONVOLVED = LAYERS + "temporal_convolutions_are_torchs_and_see_no_future"
BLOCKS = LAYERS + "long_samples_in_blocks_are_the_dense_oracle"

# fmt: off
_ALL = (
    ("a new token does not see itself", "attention.cached:StepPlan.pairs",
     "_k.order <= _q.order", "_k.order < _q.order",
     (CACHED.format("transformer"),)),
    ("mask of pieces dropped", "attention.cached:AppendPlan",
     "Pairs(_q, _k, _rule.allows(_q, _k))", "Pairs(_q, _k)",
     (PIECES.format("transformer"),)),
    ("cached position off by one", "attention.cached:StepPlan.pairs",
     "torch.arange(self.window[1].stop, device=_places.order.device)",
     "torch.arange(self.window[1].stop, device=_places.order.device) + 1",
     (CACHED.format("ALiBi and a table"), CACHED.format("transformer"))),
    ("samples see what others read", "attention.cross:_DenseCrossPlan.__init__",
     "Pairs(_q, _k, _q.sample == _k.sample)", "Pairs(_q, _k)",
     (DENSE.format("Bahdanau"), DENSE.format("fixed vector"))),
    ("one key too many is there", "attention.cross:_CachedCrossPlan.__init__",
     "_order < _length[:, None, None]", "_order <= _length[:, None, None]",
     (CACHED.format("Bahdanau"),)),
    ("turned whatever the score", "layers.attend:Attention",
     "self.turned and _turns is not None and (_k_turns is not None)", "_turns is not None and _k_turns is not None",
     (LAYERS + "places_turn_what_is_compared_by_direction_and_nothing_else",)),
    ("keys not turned", "layers.attend:Attention",
     "(rotate(_q, _turns), rotate(_k, _k_turns))", "(rotate(_q, _turns), _k)",
     (LAYERS + "places_turn_what_is_compared_by_direction_and_nothing_else",)),
    ("mask dropped", "attention.mechanism:Mechanism",
     "_total.masked_fill(_closed[:, None], -math.inf)", "_total + 0",
     (FORMULA.format("scaled dot-ALiBi-soft"), FORMULA.format("additive-none-soft"))),
    ("mask dropped before the kernel", "attention.mechanism:Mechanism.forward",
     "_mask = _pairs.allowed[:, None]", "_mask = None",
     (FORMULA.format("scaled dot-none-soft"), DENSE.format("transformer"))),
    ("causal flag dropped", "attention.mechanism:Mechanism.forward",
     "_pairs.causal and self.prior is None", "False",
     (FORMULA.format("dot-none-soft"), PIECES.format("transformer"))),
    ("scale of the kernel dropped", "attention.mechanism:Mechanism.forward",
     "F.scaled_dot_product_attention(*_all, scale=_scale, **_more)",
     "F.scaled_dot_product_attention(*_all, scale=None, **_more)",
     (FORMULA.format("dot-none-soft"), MECHANISM + "one_more_column_brings_a_prior_of_each_key_to_the_fused_kernel")),
    ("a head that sees nothing", "attention.mechanism:Mechanism",
     "(_total == -math.inf).all(-1, keepdim=True)", "(_total == -math.inf).all(-1, keepdim=True).all(1, keepdim=True)",
     (MECHANISM + "who_sees_nothing_reads_zero_and_learns_nothing_from_it[additive-blind head-soft]",)),
    ("who sees nothing", "attention.mechanism:Mechanism._log_prior",
     "_total.masked_fill(_empty, 0.0)", "_total",
     (MECHANISM + "who_sees_nothing_reads_zero_and_learns_nothing_from_it[additive-none-soft]",)),
    ("precision of scores lost", "attention.mechanism:Mechanism",
     "torch.promote_types(_score.dtype, torch.float32)", "torch.float32",
     (MECHANISM + "gradients_of_scores_are_finite_differences[additive]", FORMULA.format("additive-none-soft"))),
    ("factor not applied", "attention.mechanism:Mechanism",
     "_read = mean_of(_v, _weight)", "pass",
     (LOCAL_P + "[dot-False]",)),
    ("groups of heads shuffled", "attention.mechanism:Mechanism.forward",
     "(_k.repeat_interleave(_groups, 2), _v.repeat_interleave(_groups, 2))",
     "(_k.repeat_interleave(_groups, 2), _v.repeat(1, 1, _groups, 1))",
     (FORMULA.format("additive-none-soft"), DENSE.format("grouped"))),
    ("mask of a block of queries dropped", "attention.mechanism:rows_of",
     "Pairs(_pairs.q[:, _rows], _pairs.k, _allowed, _pairs.causal)", "Pairs(_pairs.q[:, _rows], _pairs.k, None, _pairs.causal)",
     (MECHANISM + "a_block_of_queries_at_a_time_is_the_whole",)),
    ("causal flag of a block of queries dropped", "attention.mechanism:rows_of",
     "Pairs(_pairs.q[:, _rows], _pairs.k, _allowed, _pairs.causal)", "Pairs(_pairs.q[:, _rows], _pairs.k, _allowed)",
     (MECHANISM + "a_block_of_queries_at_a_time_is_the_whole",)),
    ("numbers of queries of a block lost", "attention.mechanism:rows_of",
     "_pairs.q[:, _rows]", "_pairs.q[:, :_rows.stop - _rows.start]",
     (MECHANISM + "a_block_of_queries_at_a_time_is_the_whole[ALiBi]",)),
    ("traced weights of who sees nothing", "attention.mechanism:Mechanism",
     "Seen(self.name, _pairs, _score, _kept, _weight.masked_fill(_empty, 0.0), *_rest)",
     "Seen(self.name, _pairs, _score, _kept, _weight * 0.5, *_rest)",
     (MECHANISM + "a_trace_tells_score_and_prior_apart_and_they_add_up_to_the_weights",)),
    ("what is bidirectional looks at everything", "attention.plan:_Split.read",
     "_mechanism(_q[:, _some], _k[:, _some], _v[:, _some], self.context)", "_mechanism(_q, _k, _v, self.causal)[:, _some]",
     (ATTENTION + "long_samples_are_read_in_two_calls_without_a_mask[bare-4]",)),
    ("filled rows counted as rows", "attention.plan:_Blocks.__init__",
     "self.queries(_places.order + 1) - 1", "self.queries(_places.order)",
     (PAID.format("blocks-auto"),)),
    ("keys beyond the ends seen", "attention.plan:_Blocks.__init__",
     "_rule.allows(_q, _k) & _there", "_rule.allows(_q, _k)",
     (BLOCKS,)),
    ("blocks too narrow", "attention.plan:_Blocks.keys",
     "self.size + 2 * self.reach", "self.size + 2 * self.reach - 1",
     (BLOCKS,)),
    ("prefix not bidirectional", "attention.plan:_RunsPlan.__init__",
     "_mask[:, :_span._free, :_span._free] = True", "pass",
     (DENSE.format("transformer"),)),
    ("sign of the prior flipped", "attention.priors:ALiBi.log_prior",
     "-_slope[:, None, None]", "_slope[:, None, None]",
     (FORMULA.format("scaled dot-ALiBi-soft"), MECHANISM + "alibi_has_the_slopes_of_the_paper")),
    ("slopes off by one", "attention.priors:ALiBi.log_prior",
     "torch.arange(1, _heads + 1, device=_q.device)", "torch.arange(0, _heads, device=_q.device)",
     (MECHANISM + "alibi_has_the_slopes_of_the_paper", FORMULA.format("additive-ALiBi-soft"))),
    ("distances mirrored", "attention.priors:RelativeBias.log_prior",
     "_pairs.distance[:, 0]", "-_pairs.distance[:, 0]",
     (FORMULA.format("scaled dot-relative-soft"),)),
    ("window not halved", "attention.priors:PredictedWindow.log_prior",
     "2 * self.sigma ** 2", "self.sigma ** 2",
     (FORMULA.format("general-local-p-soft"), LOCAL_P)),
    ("window's centre short by one", "attention.priors:PredictedWindow.centre",
     "_pairs.count[:, None]", "_pairs.count[:, None] - 1",
     (FORMULA.format("general-local-p-soft"), LOCAL_P)),
    ("window's centre without tanh", "attention.priors:PredictedWindow.centre",
     "torch.einsum('bthk,hkj->bthj', _q, _weights.matrix.to(_q.dtype)).tanh()",
     "torch.einsum('bthk,hkj->bthj', _q, _weights.matrix.to(_q.dtype))",
     (LOCAL_P,)),
    ("mixing weights not normalised", "attention.priors:MixingWeights.log_prior",
     "_weights.table.log_softmax(-1)", "_weights.table",
     (MECHANISM + "mixing_weights_are_the_components_probabilities",)),
    ("mixing weights of the wrong component", "attention.priors:MixingWeights.log_prior",
     "_log[:, _pairs.k.order[:, 0].long()]", "_log.flip(-1)[:, _pairs.k.order[:, 0].long()]",
     (MECHANISM + "mixing_weights_are_the_components_probabilities", MECHANISM + "a_mixture_of_bernoullis_is_float64_bayes",
      LAYERS + "a_persistent_memory_is_its_formula[mixing]")),
    ("the least likely at test", "attention.reads:Hard",
     "_log_joint.argmax", "_log_joint.argmin",
     (MECHANISM + "a_hard_read_is_one_row_of_the_values_bit_for_bit", FORMULA.format("scaled dot-none-hard"))),
    ("a weighted sum, not a gather", "attention.reads:Hard.read",
     "_v.gather(1, _index)", "mean_of(_v, _arg1.softmax(-1))",
     (MECHANISM + "a_hard_read_is_one_row_of_the_values_bit_for_bit",)),
    ("share of means inverted", "attention.reads:Hard.read",
     "torch.rand(len(_key), 1, 1, device=_key.device) >= self.expected",
     "torch.rand(len(_key), 1, 1, device=_key.device) < self.expected",
     (MECHANISM + "some_samples_of_a_hard_read_get_the_mean",)),
    ("sampled from something flatter", "attention.reads:Hard",
     "_log_joint.detach()", "_log_joint.detach() / 2",
     (MECHANISM + "samples_have_the_posteriors_frequencies[hard]", REINFORCE + "samples_average_to_the_exact_gradient")),
    ("entropy's sign", "attention.reads:Hard.read",
     "-(_log_p.exp() * _log_p.nan_to_num(neginf=0.0)).sum(-1)", "(_log_p.exp() * _log_p.nan_to_num(neginf=0.0)).sum(-1)",
     (MECHANISM + "a_hard_read_is_one_row_of_the_values_bit_for_bit", EXPECTATION + "[0.3-0.0]")),
    ("noise of the wrong sign", "attention.reads:Gumbel.weigh",
     "_log_joint - torch.empty_like(_log_joint).exponential_().log()",
     "_log_joint + torch.empty_like(_log_joint).exponential_().log()",
     (MECHANISM + "samples_have_the_posteriors_frequencies[Gumbel]",)),
    ("temperature inverted", "attention.reads:Gumbel.weigh",
     "_log_joint / self.temperature", "_log_joint * self.temperature",
     (FORMULA.format("scaled dot-none-Gumbel"),
      MECHANISM + "a_gumbel_read_goes_from_one_value_to_their_mean_with_temperature")),
    ("straight through without a gradient", "attention.reads:Gumbel.weigh",
     "_one - _relaxed.detach() + _relaxed", "_one",
     (MECHANISM + "straight_through_is_one_hot_forward_and_the_softmax_backward",)),
    ("shift reversed", "attention.reads:reweighted",
     "_i - _reach", "_reach - _i",
     (MECHANISM + "reweighting_is_the_turing_machines_equations",)),
    ("gate inverted", "attention.reads:reweighted",
     "_gate[:, None] * _content + (1 - _gate[:, None]) * _before", "_gate[:, None] * _before + (1 - _gate[:, None]) * _content",
     (MECHANISM + "reweighting_is_the_turing_machines_equations",)),
    ("not sharpened", "attention.reads:reweighted",
     "(_shifted + 1e-12) ** _sharpness[:, None]", "_shifted + 1e-12",
     (MECHANISM + "reweighting_is_the_turing_machines_equations",)),
    ("baseline follows the last reward", "attention.reads:_Baseline.update",
     "self.mean.lerp_(_reward.detach().to(self.mean.dtype), 0.1)", "self.mean.lerp_(_reward.detach().to(self.mean.dtype), 0.9)",
     (REINFORCE + "the_baseline_is_a_moving_average_of_the_reward_of_one_row",)),
    ("baseline sign", "attention.reinforce:reward_loss",
     "_reward[_row] - _baseline.mean * _left[_row]", "_reward[_row] + _baseline.mean * _left[_row]",
     (REINFORCE + "a_baseline_near_the_mean_reward_takes_the_noise_out",)),
    ("baseline that looks at the choice", "attention.reinforce:reward_loss",
     "(_counts * _advantage)[:, None].mul(_seen.choice.log_p_BHT)",
     "(_counts * (_advantage - _seen.mechanism.read_weights.mean * (_seen.choice.key_BHT[:, 0] == 0)))[:, None]"
     ".mul(_seen.choice.log_p_BHT)",
     (EXPECTATION, REINFORCE + "samples_average_to_the_exact_gradient")),
    ("reward's sign", "attention.reinforce:reward_loss",
     "-_sum_to_end(_nll, _end)", "_sum_to_end(_nll, _end)",
     (EXPECTATION, REINFORCE + "samples_average_to_the_exact_gradient",
      REINFORCE + "in_a_model_its_expectation_is_the_gradient_of_the_expected_loss")),
    ("bonus for certainty", "attention.reinforce:reward_loss",
     "_loss - _read.entropy * (_paid[:, None] * _seen.choice.entropy_BHT).sum()",
     "_loss + _read.entropy * (_paid[:, None] * _seen.choice.entropy_BHT).sum()",
     (EXPECTATION + "[0.3-0.0]", REINFORCE + "in_a_model_its_expectation_is_the_gradient_of_the_expected_loss")),
    ("its own row does not pay", "attention.reinforce:_sum_to_end",
     "_sum[_end] - _sum + _x", "_sum[_end] - _sum",
     (EXPECTATION, REINFORCE + "a_choice_is_paid_by_its_own_sample_from_its_row_on")),
    ("all of the pack pays", "attention.reinforce:_sum_to_end",
     "_sum[_end]", "_sum[-1]",
     (REINFORCE + "a_choice_is_paid_by_its_own_sample_from_its_row_on", PAID.format("runs-auto"))),
    ("means are rewarded too", "attention.reinforce:reward_loss",
     "_seen.choice.sampled[:, 0]", "1",
     (REINFORCE + "who_reads_the_mean_learns_from_its_gradient_alone",)),
    ("what is written taken for what is read", "attention.reinforce:_rows",
     "(_start + _offset)[_sample]", "_start[_sample]",
     (PAID.format("writer-auto"),)),
    ("what is read taken for what is written", "attention.reinforce:_rows",
     "_reads[_sample[_first]] * _written", "_reads[_sample[_first]]",
     (PAID.format("reader-auto"),)),
    ("scale dropped", "attention.scores:ScaledDotProduct.features",
     "1 / math.sqrt(_q.shape[-1])", "1.0",
     (FORMULA.format("scaled dot-none-soft"), MECHANISM + "at_first_scaled_scores_stay_broad_and_plain_ones_do_not",
      MECHANISM + "scaled_dot_product_is_a_mixture_of_gaussians_with_this_prior")),
    ("dot product scaled", "attention.scores:DotProduct.features",
     "(_q, _k, self.scale)", "(_q, _k, _q.shape[-1] ** (-0.5))",
     (FORMULA.format("dot-none-soft"), MECHANISM + "at_first_scaled_scores_stay_broad_and_plain_ones_do_not")),
    ("rows and columns swapped", "attention.scores:General.features",
     "torch.einsum('bthk,hkj->bthj', _q, _weights.matrix.to(_q.dtype))",
     "torch.einsum('bthk,hjk->bthj', _q, _weights.matrix.to(_q.dtype))",
     (FORMULA.format("general-none-soft"),)),
    ("keys not normalised", "attention.scores:Cosine.features",
     "(F.normalize(_q, dim=-1), F.normalize(_k, dim=-1))", "(F.normalize(_q, dim=-1), _k)",
     (FORMULA.format("cosine-none-soft"), MECHANISM + "a_score_of_cosines_cannot_focus_without_its_sharpness")),
    ("learned sharpness is its logarithm", "attention.scores:Cosine.features",
     "_weights.log_scale.exp()", "_weights.log_scale",
     (FORMULA.format("cosine, learned-none-soft"),)),
    ("sharpness not learned", "attention.scores:Cosine.features",
     "_weights.log_scale", "_weights.log_scale.detach()",
     (MECHANISM + "a_score_of_cosines_cannot_focus_without_its_sharpness",
      LAYERS + "every_weight_is_counted_and_learns[cosine]")),
    ("norms of keys twice", "attention.scores:Gaussian.features",
     "-_scale / 2", "-_scale",
     (FORMULA.format("Gaussian-none-soft"), MECHANISM + "scaled_dot_product_is_a_mixture_of_gaussians_with_this_prior")),
    ("variance not inverted", "attention.scores:Gaussian.features",
     "1 / (math.sqrt(_q.shape[-1]) if self.variance is None else self.variance)",
     "math.sqrt(_q.shape[-1]) if self.variance is None else self.variance",
     (FORMULA.format("narrow Gaussian-none-soft"),)),
    ("extra column dropped", "attention.scores:Bernoulli.features",
     "with_column(_q, _k, -F.softplus(_k).sum(-1), 1.0)", "(_q, _k, 1.0)",
     (FORMULA.format("Bernoulli-none-soft"), MECHANISM + "a_mixture_of_bernoullis_is_float64_bayes")),
    ("bits of the wrong sign", "attention.scores:Bernoulli.features",
     "F.softplus(_k)", "F.softplus(-_k)",
     (FORMULA.format("Bernoulli-none-soft"), MECHANISM + "a_mixture_of_bernoullis_is_float64_bayes")),
    ("extra column scaled", "attention.scores:with_column",
     "1 / _scale", "1.0",
     (MECHANISM + "one_more_column_brings_a_prior_of_each_key_to_the_fused_kernel", FORMULA.format("Gaussian-none-soft"))),
    ("places counted from the end", "attention.scores:LocationBased.keys",
     "F.one_hot(_order, self.places)", "F.one_hot(self.places - 1 - _order, self.places)",
     (FORMULA.format("location-none-soft"),)),
    ("places counted over the pack", "attention.scores:LocationBased.keys",
     "int(_order.max()) + 1", "_order.shape[1]",
     (MECHANISM + "more_components_than_declared_are_refused", DENSE.format("location"))),
    ("tanh dropped", "attention.scores:Additive.log_likelihood",
     "(_q[:, :, :, None] + _k[:, :, None]).tanh()", "_q[:, :, :, None] + _k[:, :, None]",
     (FORMULA.format("additive-none-soft"),)),
    ("keys by the queries' matrix", "attention.scores:Additive.log_likelihood",
     "_weights.key", "_weights.query",
     (FORMULA.format("additive-none-soft"), LAYERS + "every_weight_is_counted_and_learns[additive]")),
    ("drop path alike in all blocks", "core:Transformer",
     "_core.drop_path * _depth / max(_core.depth - 1, 1)", "_core.drop_path",
     (LAYERS + "drop_path_rises_to_the_last_block_in_every_layer_of_it",)),
    ("values' width forgotten in flops", "core:Core.flops",
     "_m.heads * (_m.key_width + _m.value_width)", "2 * _m.heads * _m.key_width",
     (LAYERS + "flops_of_unusual_cores_are_those_that_pytorch_counts[SNAIL]",)),
    ("states as wide as the core", "core:Transformer._number_layers",
     "_layer.state(self.core, _width)", "_layer.state(self.core, self.core.width)",
     (CACHED.format("SNAIL"),)),
    ("all states in one place", "core:Transformer._number_layers",
     "_sublayer.body.index = len(self.state_sizes)", "_sublayer.body.index = 0",
     (CACHED.format("GRU"), CACHED.format("transformer"))),
    ("a budget of one token less", "data.packs:fullest",
     "_budget + 1", "_budget",
     (DATA + "a_pack_is_as_full_as_any_choice_with_its_first_sample",)),
    ("those that waited are forgotten", "data.packs:Packs.restore",
     "_fresh.again = deque(_saved['waiting'])", "pass",
     (DATA + "packs_resume_from_a_state_with_other_workers_and_processes",)),
    ("a source's state of later than the oldest that waits", "data.packs:Packs",
     "min([_place for _place, _, _ in _lane.waiting[:1]] + [_lane.reached])", "_lane.reached + 128",
     (DATA + "packs_resume_from_a_state_with_other_workers_and_processes",)),
    ("a stream that ends goes on from its end", "data.sources:IterableReader",
     "self.source.load_state_dict(copy.deepcopy(self.start))", "pass",
     (DATA + "a_stream_begins_again_when_it_ends_also_right_after_a_state",)),
    ("turns are counted within a block", "data.sources:Schedule.__call__",
     "_block * self.share[_who] + _before", "_before",
     (DATA + "visits_are_counted_and_every_block_has_the_shares",)),
    ("last states off by one", "encoder_decoder:TwoCores.forward",
     "(_context_B - self.core.last)[_context.info.sample.long()]",
     "(_context_B - self.core.last - 1)[_context.info.sample.long()]",
     (LAYERS + "a_fixed_vector_is_the_last_state_of_what_was_read",
      LAYERS + "of_the_last_states_all_earlier_ones_are_unseen")),
    ("cached position not from the writer's start", "encoder_decoder:TwoCores",
     "_position - _cache.origin_BA[_cache.row_index(_layout._info.sample)]", "_position",
     (CACHED.format("local-m"),)),
    ("axes of a kind taken for those of the core by number", "positions:on_axes",
     "_axes.index(_axis)", "_arg2.index(_axis)", ("tests/test_axes.py::test_kinds_of_other_axes_meet_on_those_of_the_core",)),
    ("what is written stands where places count it", "tokenizer:with_next",
     "_tokenizer.next_place(_written, _content)", "_tokenizer.places(len(_written) + 1)[-1]",
     (PLACES + "the_probability_is_that_of_the_answer_at_the_places_of_encode[{}-plain]",)),
    ("a row of beams takes the places of another", "generate.request:Request.take_hypotheses",
     "_before[tuple(_ids[:-1])]", "next(iter(_before.values()))",
     (PLACES + "the_probability_is_that_of_the_answer_at_the_places_of_encode[{'beams': 4}-plain]",)),
    ("a rule may write into what others read", "generate.next_token:_apply_rule",
     "_rule(_log_p.clone(), _written)", "_rule(_log_p, _written)",
     (SAMPLERS + "a_rule_that_writes_into_what_it_is_given_changes_nothing_else",)),
    ("the norm's weights forgotten in the step", "generate.step:_product",
     "_weight * _norm.weight.detach()", "_weight",
     (STEP + "a_step_is_what_the_core_computes[default-alike-copied]",)),
    ("rows of unequal length step without a mask", "generate.step:_Rows.read",
     "F.scaled_dot_product_attention(*_all, attn_mask=self.mask, **_more)", "F.scaled_dot_product_attention(*_all, **_more)",
     (STEP + "a_step_is_what_the_core_computes[default-unlike-copied]",)),
    ("a product with a bias is plain", "generate.step:_as_made",
     "is_untouched(_module) and _module.bias is None and ('forward' not in vars(_module))",
     "is_untouched(_module) and 'forward' not in vars(_module)",
     (STEP + "what_was_put_into_a_core_is_not_passed_by[with_a_bias]",)),
    ("no smoothing in the gradient", "heads.cross_entropy:_Chunked.forward",
     "_smoothing / _grad.shape[1]", "0",
     (ENTROPY + "heads_lose_the_same_in_chunks[0.1]",)),
    ("gradients where nothing is learned", "heads.cross_entropy:linear_cross_entropy",
     "not torch.is_grad_enabled()", "False",
     (ENTROPY + "an_evaluation_makes_no_gradients",)),
    ("prior of the memory dropped", "layers.attend:_Persistent.__init__",
     "_layer.prior", "None",
     (LAYERS + "a_persistent_memory_is_its_formula[mixing]",)),
    ("memory's queries numbered over the pack", "layers.attend:_Persistent.forward",
     "Pairs(_context.layout._info[None, :, None], _slots)", "Pairs(all_pairs(len(_arg1), 1, _arg1.device).q, _slots)",
     (PACKED.format("memory by distance"), CACHED.format("memory by distance"), PAID.format("memory-auto"))),
    ("gamma ignored", "layers.base:Gated.merge",
     "_weights.gamma * _update", "_update",
     (LAYERS + "merges_are_their_formulas", LAYERS + "gates_start_closed")),
    ("gamma starts open", "layers.base:_Gamma.__init__",
     "torch.zeros", "torch.ones",
     (LAYERS + "gates_start_closed",)),
    ("concatenated the other way round", "layers.base:Concat.merge",
     "[_stream, _update]", "[_update, _stream]",
     (LAYERS + "merges_are_their_formulas", LAYERS + "concatenation_widens_the_stream_and_a_last_linear_narrows_it")),
    ("residual in a replacement", "layers.base:Replace.merge",
     "return _update", "return _arg1 + _update",
     (LAYERS + "merges_are_their_formulas",)),
    ("state not carried", "layers.base:Context.state",
     "self.cache.state[_index][_rows].to(_like.dtype)", "self.cache.state[_index][_rows].to(_like.dtype) * 0",
     (CACHED.format("GRU"), CACHED.format("LSTM"), CACHED.format("SNAIL"), PIECES.format("convolutions"))),
    ("state not stored", "layers.base:Context.save_state",
     "self.cache.state[_index][_rows] = _state.to(self.cache.state[_index].dtype)", "pass",
     (CACHED.format("GRU"), PIECES.format("GRU"))),
    ("rows not brought back", "layers.base:Sequences",
     "self.back_T[self.order_T]", "self.back_T[:]",
     (RECURRENT, PACKED.format("GRU"))),
    ("dropped samples not made up for", "layers.base:Sublayer",
     "_keep / (1 - self.drop_path)", "_keep",
     (LAYERS + "dropout_thins_each_update_and_drop_path_leaves_out_samples",)),
    ("rows dropped, not samples", "layers.base:Sublayer",
     "_update * (_keep / (1 - self.drop_path))[_sample]",
     "_update * ((torch.rand_like(_update[:, :1]) >= self.drop_path) / (1 - self.drop_path))",
     (LAYERS + "dropout_thins_each_update_and_drop_path_leaves_out_samples",)),
    ("read from the end as from the start", "layers.recurrent:_Recurrent._from_the_end",
     "_row - _order[_row] + _length[_row] - 1 - _order[_row]", "_row",
     (RECURRENT,)),
    ("what is written read from its end", "layers.recurrent:_Recurrent._from_the_end",
     "[_span.bidirectional for _span in _spans]", "[_span.total for _span in _spans]",
     (RECURRENT + "[gru-True]", RECURRENT + "[lstm-True]", PIECES.format("GRU both ways"))),
    ("state and cell swapped", "layers.recurrent:_run",
     "[_part[0] for _part in _end]", "[_part[0] for _part in _end[::-1]]",
     (CACHED.format("LSTM"), PIECES.format("LSTM"))),
    ("state of the wrong sample", "layers.recurrent:_run",
     "_state.index_copy(0, _rows, _end.to(_state.dtype))", "_state.index_copy(0, _rows.flip(0), _end.to(_state.dtype))",
     (CACHED.format("GRU"),)),
    ("leave-one-out denominator", "look.layer_xray:LayerXRay.without",
     "1 - _r", "1 + _r",
     (XRAY + "leave_one_out_is_a_second_pass_without_the_key",)),
    ("nearly all taken from nearly all", "look.layer_xray:LayerXRay.without",
     "_out[torch.arange(len(_out)), _top] = _weight @ _value", "pass",
     (XRAY + "leaving_out_keeps_its_digits_where_one_key_is_nearly_all",)),
    ("entropy for effective number", "look.layer_xray:LayerXRay.effective_HT",
     "_entropy.exp()", "_entropy",
     (XRAY + "read_outs_are_the_plain_sums",)),
    ("price without the prior", "look.layer_xray:LayerXRay.price_HT",
     "self.log_joint_HTM", "self.score_HTM",
     (XRAY + "read_outs_are_the_plain_sums",)),
    ("spread around zero", "look.layer_xray:LayerXRay.spread_HT",
     "self.share_HTM @ _value", "0 * self.share_HTM @ _value",
     (XRAY + "read_outs_are_the_plain_sums",)),
    ("usage averaged", "look.layer_xray:LayerXRay.usage_HM",
     "self.responsibility_HTM.sum", "self.responsibility_HTM.mean",
     (XRAY + "read_outs_are_the_plain_sums",)),
    ("queries and keys swapped", "masks:Pairs.distance",
     "self.k.order - self.q.order", "self.q.order - self.k.order",
     (FORMULA.format("scaled dot-relative-soft"),)),
    ("causal count off by one", "masks:Pairs.count",
     "self.q.order + 1", "self.q.order",
     (FORMULA.format("general-local-p-soft"),)),
    ("half of a sum lost", "masks:Sum.parts",
     "(*self.left.parts(), *self.right.parts())", "self.left.parts()",
     (FORMULA.format("scaled dot-three-soft"), FORMULA.format("scaled dot-rule + prior-soft"))),
    ("rule as a prior inverted", "masks:Rule.log_prior",
     "~_allowed", "_allowed",
     (FORMULA.format("scaled dot-local-m-soft"),)),
    ("window reach off by one", "masks:Window.reach",
     "self.size - 1", "max(self.size - 2, 0)",
     (BLOCKS + "[5-bare-fused]",)),
    ("reach of either rule the smaller", "masks:Or.reach",
     "max(_left, _right)", "min(_left, _right)",
     (BLOCKS + "[of two-bare-fused]",)),
    ("the data begin anew", "train.loop:_Training",
     "self._feed.restore(_saved['data_state'])", "pass",
     (FIT + "a_token_budget_is_resumed_exactly",)),
    ("dropout alike in all steps", "train.loop:_Training",
     "f'{self.recipe.seed}/dropout/{self.step}/{_number}'", "f'{self.recipe.seed}/dropout/{_number}'",
     (FIT + "dropout_is_drawn_anew_in_every_step",)),
    ("the worst model is the best", "train.stopping:BestSoFar",
     "_value < self.value", "_value > self.value",
     (STATE + "the_best_model_is_saved",)),
    ("flipped bits are not noticed", "train.state:check_manifest",
     "file_hash(_path) != _entry['sha256']", "False",
     (STATE + "a_damaged_state_is_noticed_and_the_one_before_is_used",)),
    ("all states stay", "train.state:Checkpoints.save",
     "-self.keep", "0",
     (STATE + "the_last_states_stay",)),
    ("the least used stays", "zoo.pruning:pruned",
     "torch.argsort(_n_k, descending=True)", "torch.argsort(_n_k)",
     (LAYERS + "what_is_pruned_is_as_if_its_prior_were_nothing",)),
    ("dilation off by one", "zoo.temporal_conv:_TemporalConv.forward",
     "_order - self.dilation", "_order - self.dilation + 1",
     (CONVOLVED,)),
    ("the sample before seen", "zoo.temporal_conv:_TemporalConv.forward",
     "_before = _rows[torch.where(_back < 0, _old, _new)]", "_before = _rows[_new]",
     (CONVOLVED, PACKED.format("SNAIL"))),
    ("what is stored off by one", "zoo.temporal_conv:_TemporalConv.forward",
     "torch.arange(self.dilation, device=_stream.device) + _totals[:, None] - self.dilation",
     "torch.arange(self.dilation, device=_stream.device) + _totals[:, None] - self.dilation - 1",
     (CACHED.format("SNAIL"), CACHED.format("convolutions"))),
    ("signal and gate swapped", "zoo.temporal_conv:_TemporalConv.forward",
     "_signal.tanh() * _gate.sigmoid()", "_gate.tanh() * _signal.sigmoid()",
     (CONVOLVED,)),
)
# fmt: on
MUTATIONS = [Mutation(*mutation) for mutation in _ALL]

WILDCARD = re.compile(r"_[a-z]\w*")
Bound = dict[str, Any]  # what each wildcard stands for: the name of a variable or attribute, or a list of arguments


def parsed(pattern: str, statement: bool = False) -> ast.expr | ast.stmt:
    """The syntax that a `find` or a `put` is written in; statement: also of an expression, the statement that it is alone."""
    (node,) = ast.parse(pattern).body
    return node.value if isinstance(node, ast.Expr) and not statement else node


def wild(node: Any) -> str:
    """The name of a wildcard that stands for variables, or ''."""
    return node.id if isinstance(node, ast.Name) and WILDCARD.fullmatch(node.id) else ""


def matches(pattern: Any, node: Any, bound: Bound) -> bool:
    """Whether a node, a list of nodes or a plain value is as the pattern describes; `bound` gets what the wildcards stand for."""
    if name := wild(pattern):
        return isinstance(node, ast.Name) and bound.setdefault(name, node.id) == node.id
    if isinstance(pattern, list):
        star = next((i for i, x in enumerate(pattern) if isinstance(x, ast.Starred) and wild(x.value)), None)
        if star is not None:
            end = len(node) - (len(pattern) - star - 1)
            if end < star:
                return False
            bound["*" + pattern[star].value.id] = node[star:end]
            pattern, node = pattern[:star] + pattern[star + 1 :], node[:star] + node[end:]
        return len(pattern) == len(node) and all(matches(x, y, bound) for x, y in zip(pattern, node, strict=True))
    if not isinstance(pattern, ast.AST):
        return pattern == node
    if type(pattern) is not type(node):
        return False
    for field in set(pattern._fields) - {"ctx", "kind", "type_comment"}:
        wanted, there = getattr(pattern, field), getattr(node, field)
        if field == "attr" and WILDCARD.fullmatch(wanted):
            if bound.setdefault("." + wanted, there) != there:
                return False
        elif field == "keywords":  # in any order
            others = {keyword.arg: keyword for keyword in there}
            more = [keyword for keyword in wanted if keyword.arg is None and wild(keyword.value)]
            for keyword in wanted:
                if keyword not in more and not (
                    keyword.arg in others and matches(keyword.value, others.pop(keyword.arg).value, bound)
                ):
                    return False
            if others and not more:
                return False
            for keyword in more:
                bound["**" + keyword.value.id] = list(others.values())
        elif not matches(wanted, there, bound):
            return False
    return True


class _Filled(ast.NodeTransformer):
    """Writes into a `put` what its wildcards stand for."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.bound[node.id], node.ctx) if wild(node) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        node.attr = self.bound[f".{node.attr}"] if WILDCARD.fullmatch(node.attr) else node.attr
        return node

    def visit_Starred(self, node: ast.Starred) -> Any:
        return self.bound[f"*{node.value.id}"] if wild(node.value) else self.generic_visit(node)  # pyright: ignore

    def visit_keyword(self, node: ast.keyword) -> Any:
        more = wild(node.value) if node.arg is None else ""
        return self.bound[f"**{more}"] if more else self.generic_visit(node)


def symbols(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """(qualified name, definition) of each function and class of a module and of each method."""
    ahead: list[tuple[str, ast.stmt]] = [("", node) for node in tree.body]
    while ahead:
        before, node = ahead.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield before + node.name, node
        if isinstance(node, ast.ClassDef):
            ahead += [(f"{before}{node.name}.", inner) for inner in node.body]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of multimodal, by its name in `Mutation.symbol`."""
    home = ROOT / "multimodal"
    return {
        ".".join(p for p in path.relative_to(home).with_suffix("").parts if p != "__init__"): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(home.rglob("*.py"))
    }


def path_of(mutation: Mutation, root: Path) -> Path:
    """The file of its symbol in a copy of the repository.

    Raises:
        ValueError: there is no such module; it names candidates.
    """
    module = root.joinpath("multimodal", *mutation.symbol.partition(":")[0].split("."))
    for path in (module.with_suffix(".py"), module / "__init__.py"):
        if path.is_file():
            return path
    raise ValueError(
        f"{mutation.name}: symbol {mutation.symbol} is not there; candidates: {candidates(mutation, None)}"
    )


def found(mutation: Mutation, inside: ast.AST) -> list[tuple[ast.AST, Bound]]:
    """The nodes that are as `find` describes, each with what the wildcards stand for."""
    pattern, hits = parsed(mutation.find, statement=isinstance(parsed(mutation.put), ast.stmt)), []
    for node in ast.walk(inside):
        bound: Bound = {}
        if matches(pattern, node, bound):
            hits.append((node, bound))
    return hits


def candidates(mutation: Mutation, inside: ast.AST | None) -> str:
    """For a mutation that no longer applies: where else its pattern occurs, and what is most like its symbol or its pattern."""
    home = mutation.symbol.partition(":")[0]
    elsewhere = [
        f"{module}:{name}"
        for module, tree in sorted(modules().items(), key=lambda item: item[0] != home)  # its own module comes first
        for name, node in symbols(tree)
        if isinstance(node, ast.FunctionDef) and found(mutation, node)
    ]
    if inside is None:
        there = [f"{home}:{name}" for name, _ in symbols(modules().get(home, ast.Module([], [])))]
        near = difflib.get_close_matches(mutation.symbol, there, cutoff=0.7)
    else:
        kind = ast.stmt if isinstance(parsed(mutation.find), ast.stmt) else ast.expr
        texts = {ast.unparse(node) for node in ast.walk(inside) if isinstance(node, kind)}
        near = [
            repr(x) for x in difflib.get_close_matches(mutation.find, [x for x in texts if len(x) < 200], cutoff=0.0)
        ]
    return ", ".join([*near, *elsewhere[:5]]) or "none"


def mutated(mutation: Mutation, source: str) -> str:
    """The file's text under the mutation.

    Raises:
        ValueError: the symbol is not there, or not one place of it is as `find` describes; it names candidates.
    """
    tree = ast.parse(source)
    where, name = f"{mutation.name}: symbol {mutation.symbol}", mutation.symbol.partition(":")[2]
    inside = dict(symbols(tree)).get(name)
    if inside is None:
        raise ValueError(f"{where} is not there; candidates: {candidates(mutation, None)}")
    hits = found(mutation, inside)
    if not hits:
        raise ValueError(f"{where} has no {mutation.find!r}; candidates: {candidates(mutation, inside)}")
    if len(hits) > 1:
        raise ValueError(f"{where} has {mutation.find!r} {len(hits)} times; take in more of what surrounds it")
    node, bound = hits[0]
    if isinstance(inside, ast.FunctionDef):
        bound |= {f"_arg{i}": argument.arg for i, argument in enumerate(inside.args.args)}
    put = parsed(mutation.put)
    # a name that nobody defines would make every test fail, and prove nothing
    known = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | set(vars(builtins))
    unknown = {n.id for n in ast.walk(put) if isinstance(n, ast.Name) and not wild(n)} - known
    unknown |= {name for n in ast.walk(put) if (name := wild(n)) and not {name, f"*{name}", f"**{name}"} & set(bound)}
    if unknown:
        raise ValueError(f"{where}: {mutation.put!r} has the names {sorted(unknown)}, which are not there")
    filled = _Filled(bound).visit(copy.deepcopy(put))
    for parent in ast.walk(inside):
        for field, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, field, filled)
            elif isinstance(value, list):
                value[:] = [filled if item is node else item for item in value]
    return ast.unparse(ast.fix_missing_locations(tree))


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
            path = path_of(mutation, tree)
            source = path.read_text(encoding="utf-8")
            path.write_text(mutated(mutation, source), encoding="utf-8")
            _, failed, said = outcome(tree, mutation.tests)
            path.write_text(source, encoding="utf-8")
            alive = [test for test in mutation.tests if not among(test, failed)]
            wrong += [(mutation.name, test, said) for test in alive]
            state = f"{len(mutation.tests) - len(alive)} of {len(mutation.tests)} fail"
            print(f"{'survived' if alive else 'caught':<9}{mutation.symbol:<44} {mutation.name:<48}{state}", flush=True)
    return wrong


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--list"]
    chosen = [m for m in MUTATIONS if all(word in f"{m.symbol} {m.name}" for word in words)]
    if "--list" in sys.argv:
        for m in chosen:
            print(f"{m.name}, in {m.symbol}:\n    {m.find}\n    -> {m.put}")
            print("".join(f"    must fail: {test}\n" for test in m.tests))
        sys.exit()
    start = time.process_time()
    problems = check(chosen)
    used = time.process_time() - start + sum(os.times()[2:4])
    for which, test, said in problems:
        print(f"\n{which}: {test} did not do what it should\n{said[-1500:]}")
    print(f"{len(chosen)} mutations, {len({which for which, _, _ in problems})} not caught, {used:.0f} CPU-seconds")
    sys.exit(bool(problems))

"""Pure tensor functions, torch only: no models, files, devices, processes, configuration or logging."""

from whet.ops.address import address, permutation
from whet.ops.address import uniform as addressed_uniform
from whet.ops.credit import broadcast, gae, group_center, group_zscore, leave_one_out, monte_carlo
from whet.ops.kl import AdaptiveKL, Controller, FixedKL, HalvingKL, exact_kl, k1, k2, k3
from whet.ops.logprobs import entropy, linear_logprobs, token_logprobs
from whet.ops.masked import masked_mean, masked_sum, whiten
from whet.ops.policy import (
    cispo,
    clip,
    dual_clip,
    kl_penalised,
    nll,
    reinforce,
    sequence_ratio,
    token_ratio,
    unclipped,
)
from whet.ops.preference import answer_logp, dpo, gap, hinge, implicit_reward, ipo, sigmoid
from whet.ops.ranking import by_element, centring, k_way, log_exp, nth, pairwise, ranking_loss, regression
from whet.ops.reduce import Counts, element_mean, fixed_length, sequence_mean, sequence_sum, token_mean
from whet.ops.shaping import (
    attention,
    clip_score,
    dense,
    last_index,
    linear,
    penalise,
    per_sequence,
    per_token,
    terminal,
    uniform,
    weighted_sum,
)
from whet.ops.value import explained_variance, value_loss

# fmt: off
__all__ = [
    "AdaptiveKL", "Controller", "Counts", "FixedKL", "HalvingKL", "address", "addressed_uniform", "answer_logp",
    "attention", "broadcast", "by_element", "centring", "cispo", "clip", "clip_score", "dense", "dpo",
    "dual_clip", "element_mean", "entropy", "exact_kl", "explained_variance", "fixed_length", "gae", "gap",
    "group_center", "group_zscore", "hinge", "implicit_reward", "ipo", "k1", "k2", "k3", "k_way",
    "kl_penalised", "last_index", "leave_one_out", "linear", "linear_logprobs", "log_exp", "masked_mean",
    "masked_sum", "monte_carlo", "nll", "nth", "pairwise", "penalise", "per_sequence", "per_token",
    "permutation", "ranking_loss", "regression", "reinforce", "sequence_mean", "sequence_ratio", "sequence_sum",
    "sigmoid", "terminal", "token_logprobs", "token_mean", "token_ratio", "unclipped", "uniform", "value_loss",
    "weighted_sum", "whiten",
]
# fmt: on

"""Slots of a method and the choices for each: an op by name, with its formula, its source and differences to other libraries.

Imports no torch. The command-line help, `whet explain` and the docs read these tables, and `methods/compose.py` builds
methods from them. The options of a choice are the keyword-only parameters of its op; `{option}` in a formula is replaced
by the recipe's value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from whet.methods.options import (
    KL,
    Count,
    Elements,
    Entropy,
    NotNegative,
    Positive,
    Share,
    Truncated,
    Value,
)

Half = Annotated[float, msgspec.Meta(ge=0, lt=0.5)]


@dataclass(frozen=True)
class Choice:
    """A choice for a slot. `op` is a name in `whet.ops` or a user's function.

    `reads` maps parameters of the op to columns with another name. `extra` are options in addition to the op's (a weight,
    the target of a controller). `hidden` are options of the op that the method sets, not the recipe.
    """

    op: str | Callable[..., Any]
    formula: str
    source: str = ""
    peers: str = ""
    reads: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()


OPTIONS: dict[str, tuple[Any, str]] = {
    "alpha": (float, "share: of the answer's length (gae_adaptive), or of the alpha divergence"),
    "beta": (Positive, "initial coefficient"),
    "bound": (Positive | None, "largest value; null sets no limit"),
    "buffer": (Count, "tokens before the limit over which the penalty grows"),
    "cap": (Positive, "largest weight"),
    "coef": (NotNegative, "coefficient"),
    "cov_high": (float, "tokens with a larger covariance are not drawn"),
    "cov_low": (float, "tokens with a smaller covariance are not drawn"),
    "ddof": (Literal[0, 1], "1 divides by n - 1, 0 by n"),
    "desirable": (NotNegative, "weight of good answers"),
    "divergence": (str, "which divergence"),
    "eps": (NotNegative, "added to the deviation"),
    "gamma": (Share, "discount per token"),
    "heads": (Literal["mean", "max"], "how the weights of the attention heads are combined"),
    "clip_high": (NotNegative, "upper bound of the clip: the ratio's is 1 + clip_high"),
    "high": (NotNegative, "upper bound of the interval"),
    "k": (NotNegative, "deviations below the mean"),
    "label_smoothing": (Half, "probability that a label is wrong"),
    "gae_lambda": (Share, "0 is one-step TD, 1 is Monte-Carlo"),
    "length": (Count | None, "constant length; null is sampling.max_new_tokens"),
    "limit": (Count | None, "longest answer, in tokens; null is sampling.max_new_tokens"),
    "clip_low": (NotNegative, "lower bound of the clip: the ratio's is 1 - clip_low"),
    "low": (NotNegative, "lower bound of the interval"),
    "margin": (NotNegative, "target for the gap between the two rewards"),
    "mean": (bool, "divide by the answer's length"),
    "normalized": (bool, "weights sum to 1"),
    "shift_mean": (bool, "subtract the mean"),
    "share": (Share, "share of the mini-batch's tokens"),
    "target": (Positive, "target KL of the controller"),
    "temperature": (Positive, "difference in score at which the better answer wins with probability 0.73"),
    "tau": (Positive, "sharpness of the mixture"),
    "tau_negative": (Positive, "sharpness of the gate where the advantage is negative"),
    "tau_positive": (Positive, "sharpness of the gate where the advantage is positive"),
    "ties": (Literal["drop", "half"], "equal ranks: leave the pair out, or take the mean loss of both orders"),
    "undesirable": (NotNegative, "weight of bad answers"),
}
"""All options of parts: each name has one type, one range and one meaning."""

NARROWER: dict[str, dict[str, Any]] = {
    "dual_clip": {"bound": Annotated[float, msgspec.Meta(gt=1)], "clip_low": Positive, "clip_high": Positive},
    "clip": {"clip_low": Positive, "clip_high": Positive},
    "dppo": {"bound": Positive, "divergence": Literal["tv", "kl"]},
    "clip_score": {"bound": Positive},
    "exo_pair": {"label_smoothing": Annotated[float, msgspec.Meta(gt=0, lt=0.5)]},
    "gae_adaptive": {"alpha": Positive},
    "implicit_reward": {
        "alpha": Annotated[float, msgspec.Meta(gt=0, le=1)],
        "divergence": Literal["reverse_kl", "forward_kl", "js", "alpha"],
    },
}
"""Options for which an op allows a smaller range than OPTIONS."""

ONLINE_SLOTS: dict[str, dict[str, Choice]] = {
    "normalize": {
        "group_normalized": Choice(
            "group_normalized",
            "r_n <- (r_n - mean_group r_n) / (std_group r_n + {eps})   for each reward n by itself",
            "GDPO, Liu et al. 2026, eq. 4",
            "TRL eps 1e-4",
            {"reward_applies": "reward_applies"},
        ),
    },
    "combine": {
        "weighted_sum": Choice("weighted_sum", "s = sum_n w_n r_n,  w = {weights}"),
        "minimum": Choice(
            "minimum",
            "s = min_n w_n r_n,  w = {weights}",
            "Coste et al. 2023 (worst case)",
            "",
            {"reward_applies": "reward_applies"},
        ),
        "lower_bound": Choice(
            "lower_bound",
            "s = mean_n w_n r_n - {k} std_n w_n r_n,  w = {weights}",
            "Coste et al. 2023 (uncertainty)",
            "",
            {"reward_applies": "reward_applies"},
        ),
    },
    "reward_normalization": {
        "batch": Choice(
            "batch_normalized",
            "s <- (s - mean s) / (std s + {eps}) over the rollout;  shift_mean {shift_mean}, ddof {ddof}",
            "Engstrom et al. 2020 (reward scaling)",
            "TRL's whiten_rewards whitens rewards per token and keeps their mean",
        ),
        "running": Choice(
            "standardize",
            "s <- (s - m) / d,  m the mean score of the first rollout, d the running deviation",
            "Stiennon et al. 2020 (scores of the starting policy have mean 0); Zheng et al. 2023",
        ),
    },
    "reward_clip": {
        "clip_score": Choice(
            "clip_score", "s <- clip(s, -{bound}, {bound})", "DeepSpeed-Chat, Yao et al. 2023 (bound 5)"
        ),
    },
    "overlong": {
        "soft_overlong": Choice(
            "soft_overlong",
            "s <- s + clip(({limit} - {buffer} - |y|) / {buffer}, -1, 0)",
            "DAPO, Yu et al. 2025, eq. 13",
        ),
    },
    "reward_placement": {
        "terminal": Choice(
            "terminal",
            "r_T = s, on the last trained token",
            "Ziegler et al. 2019",
            "DeepSpeed-Chat and TRL's PPO write one slot after the last token where the row has room; OpenRLHF as here",
        ),
        "uniform": Choice("uniform", "r_t = s / |y|"),
        "linear": Choice("linear", "r_t = w_t s,  w_t = t / T;  normalized to sum 1: {normalized}"),
        "attention": Choice(
            "attention",
            "r_t = a_t s,  a the last layer's attention ({heads} over heads) of the last token to the answer's tokens, "
            "detached, sum 1",
            "attention-based credit, Chan et al. 2024",
            "Chan et al. take the reward model's attention, here it is the policy's own",
            extra={"heads": "mean"},
        ),
    },
    "advantage": {
        "gae": Choice(
            "gae",
            "A_t = sum_k ({gamma} {gae_lambda})^k delta_t+k,  delta_t = r_t + {gamma} V_t+1 - V_t",
            "Schulman et al. 2016, eq. 16",
            "verl skips holes in the mask, as here; TRL walks through them",
            {"rewards": "token_reward", "values": "old_value"},
        ),
        "gae_adaptive": Choice(
            "gae_adaptive",
            "A_t = gae with lambda = max(0, 1 - 1 / ({alpha} |y|)), gamma = {gamma}",
            "VAPO, Yue et al. 2025, eq. 8",
            "",
            {"rewards": "token_reward", "values": "old_value"},
        ),
        "monte_carlo": Choice(
            "monte_carlo", "A_t = sum_k {gamma}^k r_t+k", "Williams 1992", "", {"rewards": "token_reward"}
        ),
        "leave_one_out": Choice(
            "leave_one_out",
            "A = R - mean of the other answers' R,  R = sum_t r_t",
            "RLOO, Ahmadian et al. 2024",
            "verl gives a group of one its raw reward; here it is refused",
        ),
        "group_center": Choice("group_center", "A = R - mean_group R,  R = sum_t r_t", "Dr. GRPO, Liu et al. 2025"),
        "group_zscore": Choice(
            "group_zscore",
            "A = (R - mean_group R) / (std_group R + {eps}),  R = sum_t r_t",
            "GRPO, Shao et al. 2024, section 4.1.2",
            "eps 1e-4 (TRL), 1e-6 (verl), 1e-9 (OpenRLHF), all with n - 1; a group of one gives 0 here, R in verl",
        ),
        "group_mean_scaled": Choice(
            "group_mean_scaled",
            "A = (R - mean_group R) / mean_group R, 0 where the mean is 0,  R = sum_t r_t",
            "MaxRL, Tajwar et al. 2026",
            "TRL adds eps to the mean",
        ),
        "group_steps": Choice(
            "group_steps",
            "A_t = sum of the steps' rewards from t on, each (r - mean) / (std + {eps}) over all steps of the group",
            "GRPO process supervision, Shao et al. 2024, section 4.1.3",
        ),
        "against_greedy": Choice(
            "against_greedy",
            "A_t = sum_k {gamma}^k r_t+k - s(greedy answer)",
            "ReMax, Li et al. 2023, eq. 9",
            "",
            {"rewards": "token_reward"},
        ),
        "optimal_baseline": Choice(
            "optimal_baseline",
            "A_t = G_t - B_t,  B_t = sum_i W_it G_it / sum_i W_it,  W_it = sum_{s<=t} (1 - 2 pi_s + sum_v pi_v^2),  gamma {gamma}",
            "optimal token baseline, Li et al. 2026 (verl's form)",
            "",
            {"rewards": "token_reward"},
        ),
    },
    "normalize_advantage": {
        "whiten": Choice(
            "whiten",
            "A <- (A - mean A) / (std A + {eps}) over all tokens of the rollout;  shift_mean {shift_mean}, ddof {ddof}",
            "Andrychowicz et al. 2021 (advantage normalization)",
            "n - 1 (TRL, verl), n (OpenRLHF), none (DeepSpeed-Chat)",
            {"x": "advantage"},
        ),
    },
    "importance_correction": {
        "token_weight": Choice(
            "token_weight", "c_t = min(pi_old / pi_sampler, {cap})", "TIS, Yao et al. 2025", "verl, TRL: cap 2 to 3"
        ),
        "sequence_weight": Choice(
            "sequence_weight", "c = min(prod_t pi_old / pi_sampler, {cap})", "sequence TIS, Liu et al. 2025"
        ),
        "token_mask": Choice(
            "token_mask",
            "c_t = pi_old / pi_sampler inside [{low}, {high}], 0 outside",
            "IcePop, Ling team 2025",
            "verl's rejection takes the token out of the denominator too; here, as in IcePop, it stays",
        ),
        "sequence_mask": Choice(
            "sequence_mask",
            "c = prod_t pi_old / pi_sampler inside [{low}, {high}], 0 outside",
            "masked importance sampling, Liu et al. 2025",
        ),
        "geometric_mask": Choice(
            "geometric_mask",
            "c = 1 where the geometric mean of pi_old / pi_sampler is inside [{low}, {high}], 0 outside",
            "verl's geometric rejection",
        ),
    },
    "ratio": {
        "token": Choice("token_ratio", "rho_t = pi / pi_old of token t", "Schulman et al. 2017"),
        "sequence": Choice("sequence_ratio", "rho = (prod_t pi / pi_old)^(1/|y|)", "GSPO, Zheng et al. 2025, eq. 7"),
        "product": Choice(
            "product_ratio",
            "rho = prod_t pi / pi_old",
            "the whole answer's ratio; TRL's RLOO (with surrogate clip and reduction sequence_mean)",
        ),
        "sequence_token": Choice(
            "sequence_token_ratio",
            "rho_t = sg[(prod pi / pi_old)^(1/|y|)] pi_t / sg[pi_t]",
            "GSPO-token, Zheng et al. 2025, eq. 14",
            "verl's gspo is this form",
        ),
    },
    "surrogate": {
        "clip": Choice(
            "clip", "-min(rho A, clip(rho, 1 - {clip_low}, 1 + {clip_high}) A)", "PPO, Schulman et al. 2017, eq. 7"
        ),
        "dual_clip": Choice(
            "dual_clip",
            "-min(rho A, clip(rho, 1 - {clip_low}, 1 + {clip_high}) A), and at most -{bound} A where A < 0",
            "Ye et al. 2020, eq. 5",
            "on at 3.0 in verl, off elsewhere",
        ),
        "unclipped": Choice("unclipped", "-rho A", "TRPO's surrogate, Schulman et al. 2015, eq. 14"),
        "kl_penalized": Choice(
            "kl_penalized",
            "-rho A + b KL(old || new),  b from {beta}, halved or doubled towards {target} nats per token",
            "PPO-KL, Schulman et al. 2017, eq. 8",
            extra={"beta": 1.0, "target": 0.01},
        ),
        "reinforce": Choice("reinforce", "-A log pi", "Williams 1992"),
        "cispo": Choice(
            "cispo",
            "-sg[clip(rho, 1 - {clip_low}, 1 + {clip_high})] A log pi",
            "CISPO, MiniMax 2025, eq. 4",
            "TRL clamps above only, at an absolute bound; verl to [1 - low, 1 + high]",
        ),
        "sapo": Choice(
            "sapo",
            "-(4 / tau) sigmoid(tau (rho - 1)) A,  tau = {tau_positive} where A > 0, {tau_negative} elsewhere",
            "SAPO, Gao et al. 2025, eq. 6",
        ),
        "gmpo": Choice(
            "gmpo",
            "-A exp(mean_t of log rho_t clipped to [-{clip_low}, {clip_high}] on the side that A's sign says)",
            "GMPO, Zhao et al. 2025, eq. 4",
        ),
        "dppo": Choice(
            "dppo",
            "-rho A, no gradient where a token moves away beyond D_{divergence}(pi, pi_old) > {bound}",
            "DPPO, Qi et al. 2026",
            "verl's loss is -A sg[rho] log pi, the same gradient",
        ),
    },
    "select": {
        "clip_cov": Choice(
            "clip_cov",
            "no gradient on {share} of the tokens, drawn where {cov_low} < cov(log pi, A) < {cov_high}",
            "Clip-Cov, Cui et al. 2025, eq. 12",
            "verl draws at random, here by address",
            hidden=("clip_low", "clip_high"),
        ),
        "kl_cov": Choice(
            "kl_cov",
            "+ {coef} |log pi - log pi_old| on the {share} of tokens with the largest cov(log pi, A)",
            "KL-Cov, Cui et al. 2025, eq. 13",
            extra={"coef": 1.0},
        ),
    },
    "kl_in_loss": {
        "k2": Choice(
            "k2",
            "{coef} (log pi - log pi_ref)^2 / 2",
            "Schulman 2020; gradient of the token's KL(policy || reference)",
            "",
            {"logp": "full_logp"},
            {"coef": 0.04},
        ),
        "k3": Choice(
            "k3",
            "{coef} (pi_ref / pi - 1 - log(pi_ref / pi)),  clamped to {bound}",
            "GRPO, Shao et al. 2024, eq. 4; gradient of the token's KL(reference || policy)",
            "clamped to 10 in OpenRLHF and verl (bound 10), not in TRL",
            {"logp": "full_logp"},
            {"coef": 0.04},
        ),
        "k3_weighted": Choice(
            "k3_weighted",
            "{coef} rho (pi_ref / pi - 1 - log(pi_ref / pi))",
            "DeepSeek-V3.2 2025; gradient of the token's KL(policy || reference)",
            "TRL multiplies by the ratio by default",
            {"logp": "full_logp", "old_logp": "old_full_logp"},
            {"coef": 0.04},
        ),
        "exact": Choice(
            "dense",
            "{coef} sum_v pi_v log(pi_v / pi_ref,v) at every token",
            "the token's KL(policy || reference) over the whole vocabulary",
            "",
            {"token_score": "exact_kl"},
            {"coef": 0.04},
        ),
        "k2_sequence": Choice(
            "k2_sequence",
            "{coef} (sum_t log pi - log pi_ref)^2 / 2 of the whole answer",
            "gradient of KL(policy || reference) over whole answers: with reduction sequence_sum it shares the optimum of a KL "
            "in the reward",
            "",
            {"logp": "full_logp"},
            {"coef": 0.04},
        ),
    },
    "reduction": {
        "token_mean": Choice("token_mean", "sum over all tokens / number of all tokens", "DAPO, PPO"),
        "sequence_mean": Choice(
            "sequence_mean",
            "(1/N) sum_i (1/|y_i|) sum_t",
            "GRPO",
            "answers without trained tokens count in TRL's N, not in verl's, OpenRLHF's and here",
        ),
        "sequence_sum": Choice("sequence_sum", "(1/N) sum_i sum_t", "the answer's log-prob as a whole"),
        "fixed_length": Choice("fixed_length", "(1/(N {length})) sum_i sum_t", "Dr. GRPO, Liu et al. 2025"),
    },
}
"""Slots of online methods that hold a part. `kl_in_reward`, `truncated`, `value` and `entropy` are records of `options`."""

PAIR_LOSSES: dict[str, Choice] = {
    "sigmoid": Choice(
        "sigmoid",
        "-p log sigmoid(w - l - {margin}) - (1 - p) log sigmoid(l - w + {margin}),  smoothing {label_smoothing}",
        "DPO, Rafailov et al. 2023, eq. 7; cDPO, Mitchell 2023",
        "the newest TRL ignores label_smoothing in its sigmoid loss; here it counts",
    ),
    "hinge": Choice("hinge", "max(0, 1 - (w - l))", "SLiC, Zhao et al. 2023"),
    "ipo": Choice(
        "ipo",
        "((w - l) / beta - 1 / (2 beta))^2",
        "IPO, Azar et al. 2023, eq. 17",
        "TRL divides each log-ratio by its length (score.mean true), OpenRLHF and the paper do not",
    ),
    "exo_pair": Choice("exo_pair", "KL(sigmoid(w - l) || 1 - {label_smoothing})", "EXO, Ji et al. 2024, eq. 16"),
    "nca_pair": Choice(
        "nca_pair", "-log sigmoid(w) - (log sigmoid(-w) + log sigmoid(-l)) / 2", "NCA, Chen et al. 2024"
    ),
    "robust": Choice(
        "robust",
        "(-(1 - e) log sigmoid(w - l) + e log sigmoid(l - w)) / (1 - 2 e),  e = {label_smoothing}",
        "Robust DPO, Chowdhury et al. 2024",
    ),
    "bco_pair": Choice(
        "bco_pair",
        "-log sigmoid(w - d) - log sigmoid(d - l),  d the running mean reward",
        "BCO, Jung et al. 2024",
        "older TRL: cumulative mean, this mini-batch included; newest TRL: no d. Here: 0.9 d + 0.1 mean, of the mini-batches "
        "(online: rollouts) before",
    ),
    "sppo_hard": Choice(
        "sppo_hard",
        "(w / beta - 1 / (2 beta))^2 + (l / beta + 1 / (2 beta))^2",
        "SPPO, Wu et al. 2024, eq. 4.7",
    ),
    "aot": Choice(
        "aot",
        "sigmoid loss of sorted policy gaps minus sorted reference gaps of the mini-batch, smoothing {label_smoothing}",
        "AOT, Melnyk et al. 2024",
    ),
    "aot_unpaired": Choice(
        "aot_unpaired",
        "sigmoid loss of sorted w minus sorted l of the mini-batch, smoothing {label_smoothing}",
        "AOT unpaired, Melnyk et al. 2024",
    ),
    "apo_zero": Choice("apo_zero", "1 - sigmoid(w) + sigmoid(l)", "APO-zero, D'Oosterlinck et al. 2024, eq. 7"),
    "apo_down": Choice("apo_down", "sigmoid(w) + 1 - sigmoid(w - l)", "APO-down, D'Oosterlinck et al. 2024, eq. 8"),
    "discopop": Choice(
        "discopop",
        "(1 - m) (-log sigmoid(g)) + m exp(-g),  g = w - l, m = sigmoid(g / {tau})",
        "DiscoPOP, Lu et al. 2024, eq. 5",
    ),
    "sft": Choice("nll", "-log pi of the chosen answer's tokens, a mean over all of them", "the SFT loss"),
}

SINGLE_LOSSES: dict[str, Choice] = {
    "kto": Choice(
        "kto",
        "{desirable} (1 - sigmoid(w - beta z)) of good answers, {undesirable} (1 - sigmoid(beta z - w)) of bad ones, "
        "z = max(0, mean log pi / pi_ref of mismatched answers)",
        "KTO, Ethayarajh et al. 2024, eq. 7",
        "TRL mismatches within a device's batch, here each answer with the nearest earlier row of another prompt",
    ),
    "bco": Choice(
        "bco",
        "-log sigmoid(w - d) of good answers, -log sigmoid(d - w) of bad ones, d the running mean reward",
        "BCO, Jung et al. 2024",
        "TRL: d over all answers so far, and weights for unlike prompts; here 0.9 d + 0.1 mean, no weights",
    ),
    "apo_zero_unpaired": Choice(
        "apo_zero_unpaired",
        "{desirable} (1 - sigmoid(w)) of good answers, {undesirable} sigmoid(w) of bad ones",
        "APO-zero, D'Oosterlinck et al. 2024",
    ),
}

SCORES: dict[str, Choice] = {
    "implicit_reward": Choice(
        "implicit_reward",
        "w = beta s(u),  u = log pi(y) - log pi_ref(y), divided by |y|: {mean},  s of {divergence}",
        "Rafailov et al. 2023; f-divergences: Wang et al. 2023",
        "alpha is 1 - alpha of the f-DPO paper, as in TRL",
    ),
    "policy_score": Choice(
        "policy_score", "w = beta log pi(y), divided by |y|: {mean}", "CPO, Xu et al. 2024; SimPO, Meng et al. 2024"
    ),
    "log_odds": Choice("log_odds", "w = log(p / (1 - p)),  p = exp(mean_t log pi)", "ORPO, Hong et al. 2024, eq. 4"),
}

LABELS: dict[str, Choice] = {
    "hard": Choice(
        "hard_label",
        "p = 1: the answer with the higher score is the better one; equal scores give no pair",
        "Guo et al. 2024",
    ),
    "bradley_terry": Choice(
        "bradley_terry",
        "p = sigmoid((s_w - s_l) / {temperature}),  s the scores of the two answers",
        "Bradley and Terry 1952",
        "hard labels only in TRL's online DPO",
    ),
}
"""How scores label the pairs of online preference methods."""

PREFERENCE_SLOTS: dict[str, dict[str, Choice]] = {
    "implicit_reward": SCORES,
    "loss": PAIR_LOSSES | SINGLE_LOSSES,
    "pairs": LABELS,
}

REWARD_SLOTS: dict[str, dict[str, Choice]] = {
    "loss": {
        "k_way": Choice(
            "ranking_loss",
            "mean over the pairs of one prompt of -log sigmoid(s_better - s_worse);  ties {ties}",
            "Ouyang et al. 2022, eq. 1",
            "OpenRLHF and TRL train on single pairs: the same answer is read K - 1 times and overfits",
        ),
        "pairwise": Choice(
            "pairwise",
            "-p log sigmoid(g) - (1 - p) log sigmoid(-g),  g = s_chosen - s_rejected - margin of the row, p its probability or 1",
            "Bradley-Terry; Touvron et al. 2023, eq. 2",
        ),
        "log_exp": Choice("log_exp", "log(1 + exp(s_rejected - s_chosen))", "the same number as pairwise"),
        "absolute": Choice("regression", "(s - score of the row)^2 / 2"),
        "process": Choice(
            "step_loss",
            "softplus(s_t) - label_t s_t at the last token of each step",
            "Lightman et al. 2023; Uesato et al. 2022",
            "TRL's PRM classifies a separator token; here the score of the step's last token",
        ),
    },
}

HIDDEN = ("beta", "delta", "scale", "shift", "weights")
"""Options of ops that a recipe does not set on the part: the method's beta, running state, and the weights of the rewards."""


ALIASES: Mapping[str, Mapping[str, str]] = {
    "reduction": {
        "token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum": "sequence_sum",
        "seq-mean-token-sum-norm": "fixed_length",
    }
}  # fmt: skip
"""Names of choices in verl (`loss_agg_mode`), which are accepted too."""


def named(value: Any) -> Any:
    """Expand a bare name: "clip" becomes {"name": "clip"}."""
    return {"name": value} if isinstance(value, str) else value


def changed(slots: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes to slots: a part with the same name keeps its other options, a part with a new name does not."""
    out = dict(slots)
    for slot, value in changes.items():
        now, value = out.get(slot), named(value) if slot in PART_SLOTS else value
        if isinstance(value, Mapping) and value.get("name") in ALIASES.get(slot, {}):
            value = {**value, "name": ALIASES[slot][value["name"]]}
        if isinstance(now, Mapping) and isinstance(value, Mapping):
            value = dict(value) if value.get("name", now.get("name")) != now.get("name") else {**now, **value}
        out[slot] = value
    return out


PART_SLOTS = frozenset({*ONLINE_SLOTS, *PREFERENCE_SLOTS, *REWARD_SLOTS})
"""Slots that hold a part, which may be given as a bare name."""

PLAIN_SLOTS: dict[str, tuple[Any, str]] = {
    "num_generations": (Elements, "answers per prompt"),
    "beta": (Positive, "strength of the implicit KL: rewards are beta x log-ratios"),
    "centering": (NotNegative, "weight of (chosen + rejected)^2, which keeps the scores near 0"),
    "entropy": (Entropy | None, "a bonus for entropy"),
    "kl_in_reward": (KL | None, "KL(policy || reference) subtracted from the reward; null switches it off"),
    "ptx_coef": (NotNegative, "weight of the pre-training loss in the same update; 0 switches it off"),
    "dynamic_sampling": (
        Annotated[int, msgspec.Meta(ge=0, le=10_000)],
        "largest number of rounds that replace groups whose answers all have the same score; 0 switches it off",
    ),
    "sft_weight": (NotNegative, "weight of the SFT loss on the chosen answer"),
    "truncated": (Truncated, "what happens to an answer cut off at the length limit"),
    "value": (Value | None, "the critic's loss; null trains without a critic"),
}
"""Slots that hold a number or a record, with their type and meaning."""

OPTIONAL = frozenset(
    {
        "normalize",
        "reward_normalization",
        "reward_clip",
        "overlong",
        "normalize_advantage",
        "importance_correction",
        "ratio",
        "select",
        "kl_in_loss",
    }
)
"""Part slots that may be empty."""

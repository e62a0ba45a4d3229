"""Catalogue of methods by name: the choice for each slot, with the paper's values. Imports no torch.

A method is defined only here, by choices from `choices`; no other code depends on its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whet.methods.choices import changed


@dataclass(frozen=True)
class Method:
    """A method as data: a one-line description, its source, its slots, and where its defaults differ from the source."""

    about: str
    source: str
    slots: Mapping[str, Any]
    differs: tuple[str, ...] = ()


_BASE: Mapping[str, Any] = {
    "num_generations": 1,
    "dynamic_sampling": 0,
    "normalize": None,
    "combine": {"name": "weighted_sum"},
    "reward_normalization": None,
    "reward_clip": None,
    "overlong": None,
    "truncated": {"rule": "keep"},
    "reward_placement": {"name": "terminal"},
    "kl_in_reward": None,
    "advantage": {"name": "monte_carlo"},
    "normalize_advantage": None,
    "importance_correction": None,
    "ratio": {"name": "token"},
    "surrogate": {"name": "clip"},
    "select": None,
    "kl_in_loss": None,
    "reduction": {"name": "token_mean"},
    "value": None,
    "entropy": None,
    "ptx_coef": 0.0,
}
_FRONT = ("dynamic_sampling", "normalize", "combine", "reward_clip", "overlong", "truncated")
"""Slots before the score of an answer that also matter for methods on pairs; rescaling does not change the order."""

_PPO = changed(
    _BASE,
    {
        "kl_in_reward": {"coef": 0.05},
        "advantage": {"name": "gae", "gamma": 1.0, "gae_lambda": 0.95},
        "normalize_advantage": "whiten",
        "value": {"clip_range_vf": 0.2, "vf_coef": 1.0},
    },
)
_REINFORCE = changed(_BASE, {"kl_in_reward": {"coef": 0.05}, "ratio": None, "surrogate": "reinforce"})
_GROUP = changed(_BASE, {"num_generations": 8, "advantage": "group_zscore", "reduction": "sequence_mean"})
_DAPO = changed(_GROUP, {"surrogate": {"name": "clip", "clip_high": 0.28}, "reduction": "token_mean"})
_NO_KL = "no KL to the reference: set kl_in_loss or kl_in_reward to have one"

ONLINE: Mapping[str, Method] = {
    "ppo": Method(
        "PPO against reward models or functions",
        "Ziegler et al. 2019; Ouyang et al. 2022 without ptx",
        _PPO,
        ("the critic is a model of its own, so value.vf_coef scales its gradient alone",),
    ),
    "ppo_kl": Method(
        "PPO with an adaptive KL penalty instead of the clip",
        "Schulman et al. 2017, section 4",
        changed(_PPO, {"ratio": None, "surrogate": "kl_penalized"}),
        ("the KL that steers beta is a mean over the rollout's tokens after its last update",),
    ),
    "instructgpt": Method(
        "PPO-ptx: PPO with the pre-training loss in the same update",
        "Ouyang et al. 2022, eq. 2",
        changed(_PPO, {"kl_in_reward": {"coef": 0.02}, "ptx_coef": 0.1}),
        ("ptx and PPO are means per token here; the paper's coefficient 27.8 belongs to its own normalization",),
    ),
    "deepspeed_chat": Method(
        "PPO as DeepSpeed-Chat does it",
        "Yao et al. 2023",
        changed(
            _PPO,
            {
                "kl_in_reward": {"coef": 0.1},
                "reward_clip": {"name": "clip_score", "bound": 5.0},
                "normalize_advantage": None,
            },
        ),
        ("the score lands on the last trained token, in DeepSpeed-Chat one slot later where the row has room",),
    ),
    "unclipped": Method(
        "PPO without its clip: TRPO's surrogate without a limit on the update; use rollout.target_kl with it",
        "Schulman et al. 2015, eq. 14",
        changed(_PPO, {"surrogate": "unclipped"}),
        ("no trust region",),
    ),
    "policy_gradient": Method(
        "the plain policy gradient with a critic, one update a rollout",
        "Schulman et al. 2017, eq. 2",
        changed(_PPO, {"ratio": None, "surrogate": "reinforce"}),
        (),
    ),
    "vapo": Method(
        "PPO with a Monte-Carlo critic, a length-adaptive lambda and a higher clip above",
        "Yue et al. 2025",
        changed(
            _PPO,
            {
                "num_generations": 16,
                "kl_in_reward": None,
                "advantage": {"name": "gae_adaptive", "alpha": 0.05},
                "normalize_advantage": None,
                "surrogate": {"name": "clip", "clip_high": 0.28},
                "value": {"clip_range_vf": None, "gae_lambda": 1.0},
            },
        ),
        ("no value pre-training and no NLL term on right answers; train the critic's reward model first", _NO_KL),
    ),
    "reinforce": Method(
        "REINFORCE: returns to go of score minus KL, no critic, one update a rollout", "Williams 1992", _REINFORCE
    ),
    "reinforce_pp": Method(
        "REINFORCE++: returns to go whitened over the batch, PPO's clip, no critic",
        "Hu et al. 2025",
        changed(_BASE, {"kl_in_reward": {"coef": 0.01}, "normalize_advantage": "whiten"}),
    ),
    "reinforce_pp_baseline": Method(
        "REINFORCE++ with group baseline: minus the group's mean, then the batch's deviation; k2 in the loss",
        "Hu et al. 2025",
        changed(
            _GROUP,
            {
                "advantage": "group_center",
                "normalize_advantage": "whiten",
                "kl_in_loss": {"name": "k2", "coef": 0.001},
                "reduction": "token_mean",
            },
        ),
    ),
    "rloo": Method(
        "RLOO: the answer's whole return against the mean of the other answers",
        "Ahmadian et al. 2024",
        changed(_REINFORCE, {"num_generations": 4, "advantage": "leave_one_out", "reduction": "sequence_sum"}),
        (
            "one update a rollout; TRL clips the whole answer's ratio (surrogate clip, ratio product, reduction sequence_mean)",
        ),
    ),
    "remax": Method(
        "ReMax: minus the score of the greedy answer",
        "Li et al. 2023, algorithm 1",
        changed(_REINFORCE, {"advantage": "against_greedy", "reduction": "sequence_sum"}),
    ),
    "optimal_baseline": Method(
        "REINFORCE with the token baseline of least variance",
        "Li et al. 2026",
        changed(
            _REINFORCE,
            {"num_generations": 8, "advantage": "optimal_baseline", "kl_in_reward": None, "reduction": "sequence_sum"},
        ),
        (_NO_KL,),
    ),
    "grpo": Method(
        "GRPO: group z-score, clip, k3 in the loss; no critic",
        "Shao et al. 2024, eq. 3",
        changed(_GROUP, {"kl_in_loss": {"name": "k3", "coef": 0.04}}),
        ("8 answers a prompt (the paper 64)",),
    ),
    "grpo_process": Method(
        "GRPO on rewards per step: each token is credited with the normalized steps that follow",
        "Shao et al. 2024, section 4.1.3",
        changed(_GROUP, {"advantage": "group_steps", "kl_in_loss": {"name": "k3", "coef": 0.04}}),
    ),
    "dr_grpo": Method(
        "Dr. GRPO: only centered, divided by a constant length",
        "Liu et al. 2025",
        changed(_GROUP, {"advantage": "group_center", "reduction": "fixed_length"}),
        (_NO_KL,),
    ),
    "dapo": Method(
        "DAPO: higher clip above, mean over tokens, groups without spread refilled, soft overlong penalty",
        "Yu et al. 2025",
        changed(
            _DAPO, {"num_generations": 16, "dynamic_sampling": 3, "overlong": {"name": "soft_overlong", "buffer": 32}}
        ),
        (
            "overlong.buffer 32 tokens (the paper 4096 of 20480)",
            "at most dynamic_sampling rounds of new prompts (the paper: until full)",
            _NO_KL,
        ),
    ),
    "gspo": Method(
        "GSPO: one ratio for the whole answer",
        "Zheng et al. 2025",
        changed(_GROUP, {"ratio": "sequence", "surrogate": {"name": "clip", "clip_low": 3e-4, "clip_high": 4e-4}}),
        (_NO_KL,),
    ),
    "cispo": Method(
        "CISPO: the clipped ratio weighs the plain policy gradient",
        "MiniMax 2025",
        changed(_GROUP, {"surrogate": "cispo", "reduction": "token_mean"}),
        (_NO_KL,),
    ),
    "gdpo": Method(
        "GDPO: each reward normalized in its group before they are summed, then the batch",
        "Liu et al. 2026",
        changed(
            _GROUP, {"normalize": "group_normalized", "advantage": "group_center", "normalize_advantage": "whiten"}
        ),
        ("the batch's normalization weighs tokens, as in verl", _NO_KL),
    ),
    "maxrl": Method(
        "MaxRL: centered and divided by the group's mean, for rewards of 0 and 1",
        "Tajwar et al. 2026",
        changed(_GROUP, {"advantage": "group_mean_scaled", "reduction": "token_mean"}),
        (_NO_KL,),
    ),
    "sapo": Method(
        "SAPO: a soft gate instead of the clip",
        "Gao et al. 2025",
        changed(_GROUP, {"surrogate": "sapo"}),
        (_NO_KL,),
    ),
    "gmpo": Method(
        "GMPO: the geometric mean of an answer's clipped ratios",
        "Zhao et al. 2025",
        changed(_GROUP, {"ratio": None, "surrogate": "gmpo"}),
        (_NO_KL,),
    ),
    "dppo": Method(
        "DPPO: tokens that moved too far in total variation are stopped",
        "Qi et al. 2026",
        changed(_GROUP, {"surrogate": "dppo", "reduction": "token_mean"}),
        ("the old policy is the learner's, which is the sampler's here", _NO_KL),
    ),
    "clip_cov": Method(
        "Clip-Cov: a few tokens of high covariance get no gradient",
        "Cui et al. 2025",
        changed(
            _GROUP,
            {
                "surrogate": {"name": "clip", "clip_low": 1.0, "clip_high": 1.0},
                "select": "clip_cov",
                "reduction": "token_mean",
            },
        ),
        (_NO_KL,),
    ),
    "kl_cov": Method(
        "KL-Cov: the tokens of highest covariance pay a KL",
        "Cui et al. 2025",
        changed(_GROUP, {"surrogate": "unclipped", "select": "kl_cov", "reduction": "token_mean"}),
        (_NO_KL,),
    ),
}
"""Online methods: sample answers, score them, compute advantages and train."""

ONLINE_PREFERENCE: Mapping[str, Method] = {
    "online_dpo": Method(
        "online DPO: the best and the worst of the own answers under the rewards, as a pair",
        "Guo et al. 2024",
        {
            **{slot: _BASE[slot] for slot in _FRONT},
            "num_generations": 2,
            "pairs": {"name": "hard"},
            "beta": 0.1,
            "implicit_reward": {"name": "implicit_reward"},
            "loss": {"name": "sigmoid"},
            "sft_weight": 0.0,
        },
        (
            "the best against the worst of all answers; groups whose scores are equal give no pair",
            "labels are hard as in the paper, where a judge that is a language model labels; pairs: bradley_terry bounds the "
            "distance to the reference",
        ),
    ),
}
"""Online preference methods: sample like the online methods, train like the preference methods."""

_DPO: Mapping[str, Any] = {
    "beta": 0.1, "implicit_reward": {"name": "implicit_reward"}, "loss": {"name": "sigmoid"}, "sft_weight": 0.0,
}  # fmt: skip

PREFERENCE: Mapping[str, Method] = {
    "dpo": Method("direct preference optimization on pairs or rankings", "Rafailov et al. 2023", _DPO),
    "ipo": Method(
        "identity preference optimization: the squared loss on the log-ratio gap",
        "Azar et al. 2023",
        changed(_DPO, {"loss": "ipo"}),
        ("log-ratios are summed as in the paper; TRL divides each by its length (implicit_reward.mean true)",),
    ),
    "orpo": Method(
        "ORPO: SFT on the chosen answer and its odds against the rejected one, no reference",
        "Hong et al. 2024",
        {"implicit_reward": {"name": "log_odds"}, "loss": {"name": "sigmoid", "weight": 0.1}, "sft_weight": 1.0},
        ("the SFT term is a mean over the chosen answers' tokens; TRL's also counts the prompts'",),
    ),
    "simpo": Method(
        "SimPO: mean log-probs with a margin, no reference",
        "Meng et al. 2024",
        changed(
            _DPO,
            {
                "beta": 2.0,
                "implicit_reward": {"name": "policy_score", "mean": True},
                "loss": {"name": "sigmoid", "margin": 0.5},
            },
        ),
    ),
    "cpo": Method(
        "CPO: log-probs without reference, and SFT on the chosen answer",
        "Xu et al. 2024",
        changed(_DPO, {"implicit_reward": "policy_score", "sft_weight": 1.0}),
        ("the SFT term is a mean over the chosen answers' tokens",),
    ),
    "kto": Method(
        "KTO on single answers that are good or bad",
        "Ethayarajh et al. 2024",
        {"beta": 0.1, "implicit_reward": {"name": "implicit_reward"}, "loss": {"name": "kto"}},
        ("an answer is mismatched with the nearest earlier row of another prompt, once, not within the mini-batch",),
    ),
}
"""Preference methods: train the policy directly on pairs, or on answers labeled good or bad."""

REWARD: Mapping[str, Method] = {
    name: Method(about, source, {"loss": {"name": name}, **more})
    for name, about, source, more in (
        ("k_way", "all pairs of one ranking as one element", "Ouyang et al. 2022, eq. 1", {}),
        (
            "pairwise",
            "Bradley-Terry on pairs, with a margin where rows have one",
            "Touvron et al. 2023",
            {"centering": 0.0},
        ),
        ("log_exp", "the same loss as pairwise, without margin", "Bradley-Terry", {"centering": 0.0}),
        ("absolute", "squared error to absolute scores", "regression", {}),
        ("process", "a label for every step", "Lightman et al. 2023", {}),
    )
}
"""Reward-model methods, by the recipe's `algorithm.name`."""

_SFT: Mapping[str, Any] = {"loss": {"name": "sft"}, "reduction": {"name": "token_mean"}}
SUPERVISED: Mapping[str, Method] = {
    "pretrain": Method("next-token training on `text` rows", "maximum likelihood", _SFT),
    "sft": Method(
        "instruction tuning on prompt + completion, messages or text rows; the answers are trained",
        "Ouyang et al. 2022, section 3.5",
        _SFT,
    ),
}
"""Methods that train on texts and demonstrations."""

READS: Mapping[str, str] = {
    "pretrain": "texts", "sft": "demonstrations",
    "k_way": "rankings", "pairwise": "pairs", "log_exp": "pairs", "absolute": "labeled", "process": "steps",
}  # fmt: skip
"""Method of `whet.data.Reader` that reads the rows of a method, if it is not `pairs`."""


def slots_of(verb: str, name: str | None = None) -> Mapping[str, Any]:
    """Return the slots of a command's method with their defaults; `name` selects a reward-model method."""
    if verb == "reward":
        return REWARD[name or "k_way"].slots
    return {**ONLINE, **ONLINE_PREFERENCE, **PREFERENCE}[verb].slots


TRAINED: tuple[str, ...] = (*SUPERVISED, "reward", *ONLINE, *ONLINE_PREFERENCE, *PREFERENCE)
"""The methods that train a model."""


def shipped_recipe(verb: str) -> str:
    """Return the command whose shipped recipe a command starts from: one with the same needs if it has none of its own."""
    if verb in PREFERENCE:
        return "dpo"
    if verb in ONLINE_PREFERENCE:
        return "grpo"
    if verb in ONLINE:
        slots = ONLINE[verb].slots
        if slots["value"]:
            return "ppo"
        if slots["surrogate"]["name"] == "reinforce":
            return "reinforce"
        return "grpo" if slots["surrogate"] == ONLINE["grpo"].slots["surrogate"] and slots["ratio"] else "gspo"
    return verb

"""The table of metrics: every number that a run logs, with its formula, unit and better direction. Imports no torch.

The loops log only names of this table (`checked`), and docs/metrics.md is made from it. The live view shows the numbers that
have `shown`, in the order of the table, so it depends on no method's name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Direction = Literal["higher", "lower"]
EVALUATED = "eval/"
"""What the name of each number of an evaluation begins with."""
FAMILIES: Mapping[str, str] = {
    "sft": "sft, pretrain",
    "reward": "reward models",
    "pairs": "preference methods on pairs",
    "singles": "preference methods on single answers",
    "online": "online methods with an advantage",
    "online_pairs": "online methods on pairs",
}
"""The kinds of methods, by the numbers that they have."""
OFFLINE, PREFERENCE = ("sft", "reward", "pairs", "singles"), ("pairs", "singles")
ROLLOUT = ("online", "online_pairs")
ALL = tuple(FAMILIES)


@dataclass(frozen=True)
class Metric:
    """One metric, or with `{...}` in its name several with one meaning.

    `better` is the direction of an improvement, None if neither is better by itself. `of` are the families of methods that log it,
    `when` the condition within them. `source` names what other libraries call it, or where it is from. `shown` metrics are in the
    live view and in the summary. `timed` ones depend on the clock: no two runs have the same.
    """

    name: str
    formula: str
    unit: str
    better: Direction | None = None
    of: tuple[str, ...] = ROLLOUT
    when: str = ""
    source: str = ""
    shown: bool = False
    timed: bool = False

    @property
    def evaluation(self) -> bool:
        """Whether it is measured on held-out rows or prompts."""
        return self.name.startswith(EVALUATED)

    def matches(self, name: str) -> bool:
        """Return whether a logged name is this metric."""
        return _pattern(self.name).fullmatch(name) is not None


ROLES = "policy|reward|critic"


@lru_cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = [f"(?:{ROLES})" if one == "{role}" else r"\d+" if one == "{k}" else ".+" if one.startswith("{") else re.escape(one)
             for one in re.split(r"({\w+})", name)]  # fmt: skip
    return re.compile("".join(parts), re.DOTALL)


_ONLINE = (
    Metric("score", "mean over the answers of the combined score s: rewards weighted, normalized, bounded, penalized for length",
           "score", "higher", source="TRL: objective/scores; cleanrl: objective/scores", shown=True),
    Metric("reward/{name}", "mean of this reward over the answers to which it applies, before its weight", "score", "higher",
           shown=True),
    Metric("score_std", "standard deviation of s over the answers, divided by n; reward models: of the model's scores (process: over "
           "the steps)", "score", of=(*ROLLOUT, "reward"), shown=True),
    Metric("zero_spread", "share of the prompts whose answers all have the same score, from which a group method learns nothing",
           "share", "lower", when="several answers per prompt", source="TRL: frac_reward_zero_std"),
    Metric("total_reward", "mean over the answers of sum_t r_t, the placed score minus the KL penalty", "score", "higher",
           of=("online",), when="kl_in_reward", source="cleanrl: objective/score_total; minus score it is objective/non_score_reward"),
    Metric("kl", "mean over the answers of sum_t log pi_old(y_t) - log pi_ref(y_t) over the trained tokens (with the exact KL, its "
           "sum): KL(policy || reference)", "nats per answer", when="the method reads the reference",
           source="TRL, cleanrl: objective/kl", shown=True),
    Metric("entropy", "mean over the trained tokens of -sum_v pi_old(v) log pi_old(v)", "nats per token",
           source="cleanrl: ppo/policy/entropy", shown=True),
    Metric("clip_fraction", "share of the trained tokens whose gradient the clip stops: rho > 1 + clip_high with A > 0, or rho < 1 - "
           "clip_low with A < 0; mean over the updates", "share", of=("online",), when="the surrogate clips a ratio",
           source="verl: pg_clipfrac; TRL: clip_ratio/region_mean", shown=True),
    Metric("explained_variance", "1 - Var(R - V) / Var(R) over the trained tokens, V the critic's values and R the returns of the "
           "rollout; mean over the updates", "share", "higher", of=("online",), when="with a critic",
           source="cleanrl: explained_variance", shown=True),
    Metric("length", "mean number of tokens that the policy wrote per answer, with the end token", "tokens", shown=True),
    Metric("truncated", "share of the answers that were cut off at sampling.max_new_tokens", "share", "lower", source="TRL: "
           "completions/clipped_ratio; 1 minus cleanrl's share of answers with an end token", shown=True),
    Metric("kl_old", "mean over the trained tokens of rho - 1 - log rho, rho = pi / pi_old: an estimate of KL(old || new); mean over "
           "the updates", "nats per token", source="cleanrl: approx_kl; Schulman 2020, estimator k3"),
    Metric("kl_old_k1", "mean over the trained tokens of -log rho; mean over the updates", "nats per token",
           source="cleanrl: old_approx_kl; Schulman 2020, estimator k1"),
    Metric("ratio_mean", "mean of rho over the trained tokens; mean over the updates", "-", source="cleanrl: ppo/val/ratio"),
    Metric("ratio_std", "standard deviation of rho over the trained tokens (divided by n); mean over the updates", "-",
           source="the root of cleanrl's ppo/val/ratio_var"),
    Metric("ratio_outside", "share of the trained tokens with rho outside [1 - clip_low, 1 + clip_high], whatever A; mean over the "
           "updates", "share", of=("online",), when="the surrogate clips a ratio", source="cleanrl: clipfrac"),
    Metric("dual_clip_fraction", "share of the trained tokens with A < 0 and rho > bound; mean over the updates", "share",
           of=("online",), when="surrogate dual_clip", source="verl: pg_clipfrac_lower"),
    Metric("advantage_mean", "mean of A over the trained tokens, as the loss reads it", "score", of=("online",),
           source="cleanrl: ppo/policy/advantages_mean"),
    Metric("advantage_std", "standard deviation of A over the trained tokens (divided by n)", "score", of=("online",)),
    Metric("value_mean", "mean of the critic's values V over the trained tokens, when the rollout was taken", "score", of=("online",),
           when="with a critic", source="cleanrl: ppo/val/mean"),
    Metric("returns_mean", "mean of the returns R over the trained tokens", "score", of=("online",), when="with a critic",
           source="cleanrl: ppo/returns/mean"),
    Metric("returns_std", "standard deviation of R over the trained tokens (divided by n)", "score", of=("online",),
           when="with a critic", source="the root of cleanrl's ppo/returns/var"),
    Metric("value_error", "mean of (V - R)^2 over the trained tokens, V current; mean over the updates", "score^2", "lower",
           of=("online",), when="with a critic", source="cleanrl: ppo/val/error"),
    Metric("value_clip_fraction", "share of the trained tokens where the clipped value has the larger error, so that V has no "
           "gradient; mean over the updates", "share", of=("online",), when="value.clip_range_vf",
           source="cleanrl: ppo/val/clipfrac; verl: critic/vf_clipfrac"),
    Metric("sampler_gap", "mean over the trained tokens of |log pi_sampler - log pi_old|: how far generator and learner differ", "nats",
           "lower", source="TRL: sampling/sampling_logp_difference/mean"),
    Metric("implicit_reward", "mean of beta s(u), u = log pi(y) - log pi_ref(y), over the answers in pairs; 0 for losses without it; "
           "mean over the updates", "nats", of=("online_pairs",)),
    Metric("staleness", "mean age of the weights that wrote the tokens", "steps", "lower", when="generator.max_staleness"),
    Metric("staleness_max", "largest age of the weights that wrote a token", "steps", "lower", when="generator.max_staleness"),
    Metric("rounds", "rounds of generation of this step", "-", "lower", of=("online",), when="dynamic_sampling"),
    Metric("groups_replaced", "prompts that were replaced because their answers all had the same score", "prompts", "lower",
           of=("online",), when="dynamic_sampling"),
    Metric("groups_with_spread", "prompts of the step whose answers differ in score", "prompts", "higher", of=("online",),
           when="dynamic_sampling"),
    Metric("epoch", "mean over the updates of the number of the pass over the rollout, from 0", "-"),
    Metric("stopped", "1 if the updates of this step ended early", "0 or 1", when="rollout.target_kl was exceeded"),
    Metric("loss/{role}/{stream}/{term}", "the term's weight x its reduced loss over the mini-batch (docs/methods.md); mean over the "
           "updates", "-", source="cleanrl: policy_loss, value_loss"),
    Metric("state/{name}", "a value that the method carries from step to step: a KL or entropy coefficient, a running mean or "
           "deviation", "-", when="the method has a KL in the reward, a controller or running statistics"),
    Metric("seconds/generate", "from the start of the step until its answers are there", "seconds", timed=True),
)  # fmt: skip

_OFFLINE = (
    Metric("loss", "sum of the losses of all terms over the batch", "-", "lower", of=OFFLINE, shown=True),
    Metric("{role}/train/{term}", "the term's weight x its reduced loss over the batch (docs/methods.md)", "-", "lower", of=OFFLINE),
    Metric("token_accuracy", "share of the trained tokens than which no token is more likely, given the tokens before", "share",
           "higher", of=("sft",), source="TRL: mean_token_accuracy", shown=True),
    Metric("accuracy", "share of the pairs of different rank that the scores order correctly, a tie counts one half (process: share "
           "of the steps with a label other than 0.5 whose score has its sign)", "share", "higher", of=("reward",),
           when="rows that are compared, or process", source="TRL: accuracy", shown=True),
    Metric("margin", "mean over the pairs of different rank of the better answer's score minus the other's", "score", "higher",
           of=("reward",), when="rows that are compared", source="TRL: margin", shown=True),
    Metric("score_mean", "mean of the model's scores over the answers (process: over the steps), before head.standardize", "score",
           of=("reward",), source="TRL: mean_reward", shown=True),
    Metric("rewards/margin", "rewards/chosen - rewards/rejected", "nats", "higher", of=(*PREFERENCE, "online_pairs"),
           when="single answers: a batch with both labels", source="TRL: rewards/margins", shown=True),
    Metric("rewards/accuracy", "share of the pairs whose chosen answer has the larger implicit reward, a tie counts one half", "share",
           "higher", of=("pairs", "online_pairs"), source="TRL: rewards/accuracies, where a tie counts 0", shown=True),
    Metric("rewards/chosen", "mean implicit reward of the chosen (single answers: good) answers: beta sum_t (log pi - log pi_ref), "
           "the mean over t with implicit_reward.mean; without a reference beta sum_t log pi (cpo), beta mean_t log pi (simpo), "
           "weight x mean_t log pi (orpo)", "nats", "higher", of=(*PREFERENCE, "online_pairs"), source="TRL: rewards/chosen",
           shown=True),
    Metric("rewards/rejected", "the same of the rejected (single answers: bad) answers", "nats", "lower",
           of=(*PREFERENCE, "online_pairs"), source="TRL: rewards/rejected", shown=True),
    Metric("logps/chosen", "mean of sum_t log pi(y_t) over the chosen (single answers: good) answers", "nats per answer",
           of=(*PREFERENCE, "online_pairs"), source="TRL: logps/chosen, for simpo and orpo per token there", shown=True),
    Metric("logps/rejected", "the same of the rejected (single answers: bad) answers", "nats per answer",
           of=(*PREFERENCE, "online_pairs"), source="TRL: logps/rejected", shown=True),
    Metric("log_odds", "mean of log odds(chosen) - log odds(rejected), odds = p / (1 - p), p = exp(mean_t log pi)", "nats", "higher",
           of=("pairs",), when="implicit_reward log_odds (orpo)", source="TRL: log_odds_chosen; Hong et al. 2024, eq. 4"),
    Metric("kl_baseline", "max(0, mean of sum_t (log pi - log pi_ref) over the mismatched answers), the z of the loss",
           "nats per answer", of=("singles",), when="loss kto", source="TRL: kl; Ethayarajh et al. 2024, eq. 7"),
)  # fmt: skip

_EVERY = (
    Metric("grad_norm/{role}", "2-norm of the gradient before it is clipped (max_grad_norm); online: mean over the updates", "-",
           of=ALL, source="TRL: grad_norm", shown=True),
    Metric("lr/{role}", "learning rate; online: mean over the updates", "-", of=ALL, source="cleanrl: lr"),
    Metric("tokens", "trained tokens of the step; online: tokens that the policy wrote, each counted once", "tokens", of=ALL),
    Metric("tokens_per_second", "tokens / seconds", "tokens per second", "higher", of=ALL, timed=True),
    Metric("seconds", "duration of the step, without its evaluation", "seconds", "lower", of=ALL, timed=True),
    Metric("seconds/eval", "duration of the evaluation after this step", "seconds", of=ALL, when="eval", timed=True),
)  # fmt: skip

_EVALUATION = (
    Metric("eval/score", "mean over the held-out prompts' answers of the training rewards, weighted and summed", "score", "higher",
           shown=True),
    Metric("eval/reward/{name}", "mean of a training reward over these answers", "score", "higher"),
    Metric("eval/judge/{name}", "mean of a judge's score over these answers; training never sees it", "score", "higher", shown=True),
    Metric("eval/win_rate/{name}", "share of the prompts whose mean score of its answers is higher than at the start of the run, "
           "a tie counts one half", "share", "higher", shown=True),
    Metric("eval/win_rate_low/{name}", "lower end of the 95 % bootstrap interval of eval/win_rate", "share", "higher"),
    Metric("eval/win_rate_high/{name}", "upper end of the 95 % bootstrap interval of eval/win_rate", "share", "higher"),
    Metric("eval/kl", "mean over these answers of sum_t log pi(y_t) - log pi_ref(y_t): KL(policy || reference)", "nats per answer",
           shown=True),
    Metric("eval/length", "mean length of these answers", "tokens"),
    Metric("eval/truncated", "share of these answers that were cut off", "share", "lower"),
    Metric("eval/pass@{k}/{name}", "probability that at least one of k answers to a prompt has score 1", "share", "higher",
           when="a score of 0 or 1", source="Chen et al. 2021, eq. 1"),
    Metric("eval/loss", "loss of the objective over the held-out rows", "-", "lower", of=OFFLINE, shown=True),
    Metric("eval/{role}/train/{term}", "loss of one term over the held-out rows", "-", "lower", of=OFFLINE),
    Metric("eval/accuracy", "share of the held-out pairs that are ordered correctly, a tie counts one half", "share", "higher",
           of=("reward", "pairs"), shown=True),
    Metric("eval/margin", "mean over the held-out pairs of the better answer's score (implicit reward; orpo: log odds) minus the "
           "other's", "score", "higher", of=("reward", "pairs")),
    Metric("eval/calibration_error", "mean over bins of |accuracy - mean predicted probability|, weighted by the pairs in the bin",
           "share", "lower", of=("reward", "pairs"), source="expected calibration error, Guo et al. 2017"),
    Metric("eval/best_step", "the step with the best value of eval.keep_best so far", "step", of=ALL, when="eval.keep_best"),
    Metric("eval/stopped_early", "1 in the last line of a run that eval.early_stop ended", "0 or 1", of=ALL, when="eval.early_stop"),
)  # fmt: skip

METRICS: tuple[Metric, ...] = (*_ONLINE, *_OFFLINE, *_EVALUATION, *_EVERY)
"""Every metric. The first one whose name matches a logged name is meant, so literal names stand before patterns."""
_LITERAL = sorted(METRICS, key=lambda one: ("{" in one.name, one.name.startswith(("reward/", "eval/reward/"))))


@lru_cache(maxsize=4096)
def find(name: str) -> Metric | None:
    """Return the metric that a logged name belongs to, or None for a name that a user logs (`StepLog.log`).

    >>> find("reward/helpful").name, find("reward/train/pairwise").name, find("mine")
    ('reward/{name}', '{role}/train/{term}', None)
    """
    return next((one for one in _LITERAL if one.matches(name)), None)


def direction(name: str) -> Direction | None:
    """Return whether a higher or a lower value of a logged name is better; None if neither is, or if the name is unknown.

    >>> direction("eval/win_rate/judge"), direction("eval/loss"), direction("kl")
    ('higher', 'lower', None)
    """
    found = find(name)
    return None if found is None else found.better


def timed(name: str) -> bool:
    """Return whether a metric depends on the clock, so that no two runs have it equal."""
    found = find(name)
    return found is not None and found.timed


def checked(names: Iterable[str]) -> None:
    """Raise ValueError for a name that the table does not have."""
    for name in names:
        if find(name) is None:
            raise ValueError(f"metric {name!r} is not in the table; add it to METRICS in whet/loops/metrics.py")


def order(names: Iterable[str]) -> list[str]:
    """Return the names that matter, in the order of the table: those with `shown`.

    >>> order(["grad_norm/policy", "ratio_mean", "reward/b", "kl", "score"])
    ['score', 'reward/b', 'kl', 'grad_norm/policy']
    """
    found = [(METRICS.index(metric), name) for name in names if (metric := find(name)) is not None and metric.shown]
    return [name for _, name in sorted(found, key=lambda one: one[0])]

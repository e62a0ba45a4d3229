"""Columns: all per-token and per-answer values, with shape, unit, and the stage and role that produce them.

The learner and the rollout files use this list. To add a measured column, add a line here and its reader (with its name in
`BARE`) in `models/readers.py`; any other column, a line here and the stage that produces it.
Shapes: B rows, T positions from the first response token.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column. If it is measured, `role` is the role that computes it, and `reads` is the output of its reader."""

    name: str
    shape: str
    unit: str
    stage: str
    meaning: str
    role: str | None = None
    reads: str | None = None

    @property
    def per_token(self) -> bool:
        """True if the second axis is the position."""
        return self.shape.startswith("(B, T")


_ALL = (
    Column("mask", "(B, T)", "bool", "record", "True for trained tokens"),
    Column("element", "(B,)", "index", "record", "number of the element (answer, pair, ranking) of the row"),
    Column(
        "index",
        "(B,)",
        "index",
        "record",
        "position of the row in its element: 0 chosen, 1 rejected; 0 ... K-1 in a ranking",
    ),
    Column("number", "(B,)", "index", "record", "number of the row in its mini-batch; selects its dropout mask"),
    Column("chosen_mask", "(B, T)", "bool", "record", "the mask for chosen answers, False for rejected ones"),
    Column("rank", "(B,)", "rank", "record", "rank from the data, 1 is best, equal ranks are ties"),
    Column("target", "(B,)", "score", "record", "absolute score from the data"),
    Column("margin", "(B,)", "score", "record", "by how much the chosen answer is better, from the data"),
    Column("probability", "(B,)", "probability", "record", "probability that the chosen answer is better"),
    Column("good", "(B,)", "bool", "record", "True if the answer is desirable"),
    Column("segment_end", "(B, T)", "bool", "record", "True on the last token of a step that has a score or a label"),
    Column("segment_label", "(B, T)", "probability", "record", "label in [0, 1] of the step that ends here"),
    Column("group", "(B,)", "index", "generate", "number of the prompt of an answer"),
    Column("address", "(B,)", "key", "generate", "random key of the answer; in updates also of step and epoch"),
    Column("truncated", "(B,)", "bool", "generate", "True if the answer was cut off at the length limit"),
    Column("temperature", "(B,)", "-", "generate", "sampling temperature of the answer"),
    Column("token_version", "(B, T)", "version", "generate", "version of the weights that generated the token"),
    Column("sampler_logp", "(B, T)", "nats", "generate", "log-prob of the token reported by the generator"),
    Column(
        "support",
        "(B, T, S)",
        "token",
        "generate",
        "tokens that could be sampled under top-p, top-k and min-p, padded with -1",
    ),
    Column("baseline", "(B,)", "reward", "reward", "the combined score of the greedy answer to the same prompt"),
    Column("rewards", "(B, R)", "reward", "reward", "one score per named reward, before combining"),
    Column(
        "reward_applies", "(B, R)", "bool", "reward", "False where a reward does not apply to an answer; its score is 0"
    ),
    Column("token_score", "(B, T)", "reward", "reward", "dense scores, one per token"),
    Column("score", "(B,)", "reward", "reward", "combined score of an answer; in reward modeling, the model's score"),
    Column(
        "old_logp", "(B, T)", "nats", "measure", "the policy's log-prob when the rollout was taken", "policy", "logp"
    ),
    Column(
        "old_full_logp",
        "(B, T)",
        "nats",
        "measure",
        "old_logp over the whole vocabulary, without top-p, top-k and min-p",
        "policy",
        "full_logp",
    ),
    Column(
        "old_collision",
        "(B, T)",
        "probability",
        "measure",
        "sum of the policy's squared probabilities, measured when the rollout was taken",
        "policy",
        "collision",
    ),
    Column(
        "old_exact_kl",
        "(B, T)",
        "nats",
        "measure",
        "KL(policy || reference) over the whole vocabulary, measured when the rollout was taken",
        "policy",
        "exact_kl",
    ),
    Column(
        "attention_mean",
        "(B, T)",
        "share",
        "measure",
        "attention from the last token of the answer to each token, last layer, mean over heads",
        "policy",
        "attention_mean",
    ),
    Column(
        "attention_max",
        "(B, T)",
        "share",
        "measure",
        "like attention_mean, but with the maximum over heads",
        "policy",
        "attention_max",
    ),
    Column("old_entropy", "(B, T)", "nats", "measure", "entropy when the rollout was taken", "policy", "entropy"),
    Column(
        "entropy_at", "(B, T)", "bool", "generate", "True where an entropy that no part reads is computed, for the log"
    ),
    Column(
        "ref_logp",
        "(B, T)",
        "nats",
        "measure",
        "the reference's log-prob over the whole vocabulary, at the sampling temperature",
        "reference",
        "full_logp",
    ),
    Column(
        "old_value",
        "(B, T)",
        "reward",
        "measure",
        "the critic's value before each token, measured when the rollout was taken",
        "critic",
        "value",
    ),
    Column(
        "final_value", "(B,)", "reward", "measure", "the critic's value after the last token", "critic", "final_value"
    ),
    Column("kl", "(B, T)", "nats", "advantage", "estimate of KL(policy || reference) per token"),
    Column("token_reward", "(B, T)", "reward", "advantage", "reward of each token: score minus KL penalty"),
    Column("advantage", "(B, T)", "reward", "advantage", "advantage of each token, whitened if the method requires it"),
    Column("returns", "(B, T)", "reward", "advantage", "advantage before whitening + value"),
    Column("correction", "(B, T)", "-", "advantage", "importance weight from the sampler to the old policy"),
    Column("now_logp", "(B, T)", "nats", "select", "log-prob before an update, without gradient", "policy", "logp"),
    Column("now_full_logp", "(B, T)", "nats", "select", "now_logp over the whole vocabulary", "policy", "full_logp"),
    Column("selected", "(B, T)", "bool", "select", "True for tokens that the method selects"),
    Column("matched", "(B,)", "nats", "select", "log-ratio gap of the reference at the same rank in the mini-batch"),
    Column("rival", "(B,)", "reward", "select", "reward of the other side at the same rank in the mini-batch"),
    Column("kl_baseline", "(B,)", "nats", "select", "mean log-ratio of mismatched answers, at least 0"),
    Column("full_logp", "(B, T)", "nats", "update", "current log-prob over the whole vocabulary, with gradient"),
    Column("exact_kl", "(B, T)", "nats", "update", "current KL(policy || reference), whole vocabulary, with gradient"),
    Column("logp", "(B, T)", "nats", "update", "current log-prob, with gradient"),
    Column(
        "correct", "(B, T)", "0 or 1", "update", "1 if no token was more likely than this one, at the current weights"
    ),
    Column("entropy", "(B, T)", "nats", "update", "current entropy, with gradient"),
    Column("full_entropy", "(B, T)", "nats", "update", "current entropy over the whole vocabulary, with gradient"),
    Column("value", "(B, T)", "reward", "update", "current value, with gradient"),
    Column("ratio", "(B, T)", "-", "update", "pi / pi_old of the sampled token"),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}


def measured(names: frozenset[str]) -> dict[str, list[Column]]:
    """Return the columns in `names` that a learner measures, grouped by role."""
    roles: dict[str, list[Column]] = {}
    for name in sorted(names):
        column = COLUMNS[name]
        if column.role is not None:
            roles.setdefault(column.role, []).append(column)
    return roles

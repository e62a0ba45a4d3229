"""Columns: all per-token and per-answer values, with shape, unit, and the step ("hop") and role that produce them.

The learner, the Parquet rollouts and the viewer use this list. To add a statistic, add one line here and one reader.
Shapes: B rows, T positions from the first response token.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column. For measured columns, `role` is the role that computes it and `reads` the column that its reader returns."""

    name: str
    shape: str
    unit: str
    hop: str
    meaning: str
    role: str | None = None
    reads: str | None = None

    @property
    def per_token(self) -> bool:
        """Whether the second axis is the position."""
        return self.shape.startswith("(B, T")


_ALL = (
    Column("mask", "(B, T)", "bool", "record", "True where a token is trained"),
    Column("element", "(B,)", "index", "record", "which element (answer, pair, ranking) a row belongs to"),
    Column(
        "index",
        "(B,)",
        "index",
        "record",
        "the row's position in its element: 0 chosen, 1 rejected; 0 ... K-1 in a ranking",
    ),
    Column("number", "(B,)", "index", "record", "the row's number in its mini-batch: the address of its dropout"),
    Column("chosen_mask", "(B, T)", "bool", "record", "the mask on chosen answers, False on rejected ones"),
    Column("rank", "(B,)", "rank", "record", "rank given by people, 1 is best, equal ranks are ties"),
    Column("target", "(B,)", "score", "record", "absolute score given by people"),
    Column("margin", "(B,)", "score", "record", "how much better the chosen answer was said to be"),
    Column("probability", "(B,)", "probability", "record", "probability that the chosen answer is better"),
    Column("good", "(B,)", "bool", "record", "the answer is desirable"),
    Column("segment_end", "(B, T)", "bool", "record", "True on the last token of a step that has a score or a label"),
    Column("segment_label", "(B, T)", "probability", "record", "how right the step that ends here is"),
    Column("group", "(B,)", "index", "generate", "which prompt an answer belongs to"),
    Column("address", "(B,)", "key", "generate", "a key of the answer (draw, answer), in an update of the update too"),
    Column("truncated", "(B,)", "bool", "generate", "the answer was cut off at the length limit"),
    Column("temperature", "(B,)", "-", "generate", "temperature the answer was sampled at"),
    Column("token_version", "(B, T)", "version", "generate", "the version of the weights that made the token"),
    Column("sampler_logp", "(B, T)", "nats", "generate", "log-prob reported by the generator"),
    Column(
        "support",
        "(B, T, S)",
        "token",
        "generate",
        "the tokens that could be drawn under top-p, top-k and min-p, -1 behind them",
    ),
    Column("baseline", "(B,)", "reward", "reward", "the combined score of the greedy answer to the same prompt"),
    Column("rewards", "(B, R)", "reward", "reward", "one score per named reward, before they are combined"),
    Column("token_score", "(B, T)", "reward", "reward", "dense scores, one per token"),
    Column("score", "(B,)", "reward", "reward", "the combined score of an answer; in reward modeling the model's own"),
    Column(
        "old_logp", "(B, T)", "nats", "measure", "the policy's log-prob when the rollout was taken", "policy", "logp"
    ),
    Column(
        "old_full_logp",
        "(B, T)",
        "nats",
        "measure",
        "the same under the whole vocabulary, where only a part of it could be drawn",
        "policy",
        "full_logp",
    ),
    Column(
        "old_collision",
        "(B, T)",
        "probability",
        "measure",
        "sum of the squared probabilities then",
        "policy",
        "collision",
    ),
    Column(
        "old_exact_kl",
        "(B, T)",
        "nats",
        "measure",
        "KL(policy || reference) over the whole vocabulary then",
        "policy",
        "exact_kl",
    ),
    Column(
        "attention_mean",
        "(B, T)",
        "share",
        "measure",
        "attention of the answer's last token to its tokens, last layer, mean over heads",
        "policy",
        "attention_mean",
    ),
    Column(
        "attention_max",
        "(B, T)",
        "share",
        "measure",
        "the same with the largest head at each token",
        "policy",
        "attention_max",
    ),
    Column("old_entropy", "(B, T)", "nats", "measure", "entropy of the policy then", "policy", "entropy"),
    Column(
        "ref_logp",
        "(B, T)",
        "nats",
        "measure",
        "the reference's log-prob at the sample's own temperature, under the whole vocabulary",
        "reference",
        "full_logp",
    ),
    Column("old_value", "(B, T)", "reward", "measure", "the critic's value before each token, then", "critic", "value"),
    Column(
        "final_value", "(B,)", "reward", "measure", "the critic's value after the last token", "critic", "final_value"
    ),
    Column("kl", "(B, T)", "nats", "advantage", "estimate of KL(policy || reference) per token"),
    Column("token_reward", "(B, T)", "reward", "advantage", "placed score minus KL penalty"),
    Column("advantage", "(B, T)", "reward", "advantage", "credit of each token, whitened if the method says so"),
    Column("returns", "(B, T)", "reward", "advantage", "advantage before whitening + value"),
    Column("correction", "(B, T)", "-", "advantage", "importance weight from the sampler to the old policy"),
    Column("now_logp", "(B, T)", "nats", "select", "log-prob before an update, without gradient", "policy", "logp"),
    Column("now_full_logp", "(B, T)", "nats", "select", "the same under the whole vocabulary", "policy", "full_logp"),
    Column("selected", "(B, T)", "bool", "select", "the tokens that the method's selection names"),
    Column("matched", "(B,)", "nats", "select", "the reference's gap of the same rank in the mini-batch"),
    Column("rival", "(B,)", "reward", "select", "the other side's reward of the same rank in the mini-batch"),
    Column("kl_baseline", "(B,)", "nats", "select", "mean log-ratio of mismatched answers, at least 0"),
    Column("full_logp", "(B, T)", "nats", "update", "log-prob now under the whole vocabulary, with gradient"),
    Column(
        "exact_kl", "(B, T)", "nats", "update", "KL(policy || reference) now over the whole vocabulary, with gradient"
    ),
    Column("logp", "(B, T)", "nats", "update", "log-prob now, with gradient"),
    Column("entropy", "(B, T)", "nats", "update", "entropy now, with gradient"),
    Column("full_entropy", "(B, T)", "nats", "update", "entropy now over the whole vocabulary, with gradient"),
    Column("value", "(B, T)", "reward", "update", "value now, with gradient"),
    Column("ratio", "(B, T)", "-", "update", "pi / pi_old on the sampled token"),
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

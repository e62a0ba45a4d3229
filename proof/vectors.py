"""Makes docs/conformance: inputs and expected outputs of every formula, computed in plain Python numbers, without torch.

    python -m proof.vectors

Each formula is written out once more here, from its paper, as loops over lists; nothing of whet is imported.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "conformance"

T = [[0.31, -0.72, 1.15, 0.08], [-1.4, 0.55, -0.2, 0.93], [0.64, -0.11, -0.87, 0.42]]
LOGP = [[-0.9, -1.7, -0.35, -2.2], [-1.1, -0.6, -2.9, -0.15], [-0.45, -1.3, -0.8, -1.9]]
OLD = [[-1.2, -1.6, -0.5, -1.4], [-0.7, -0.9, -2.6, -0.4], [-0.5, -1.1, -1.3, -1.2]]
REF = [[-1.0, -1.9, -0.4, -1.8], [-1.3, -0.5, -2.2, -0.3], [-0.6, -1.4, -0.7, -2.4]]
VALUE = [[0.2, -0.4, 0.9, 0.1], [0.6, 0.3, -0.5, -0.2], [-0.8, 0.7, 0.15, 0.4]]
MASK = [[True, True, True, False], [True, False, True, True], [True, True, False, False]]
SCORE = [1.3, -0.4, 0.7, 0.7, -1.6, 0.2]
GROUP = [0, 0, 0, 1, 1, 1]
CHOSEN, REJECTED = [0.8, -0.3, 1.7, -2.1], [-0.2, 0.4, 1.1, -0.9]
GAP = [c - r for c, r in zip(CHOSEN, REJECTED, strict=True)]


def each(f: Callable[..., float], *tables: list[list[float]]) -> list[list[float]]:
    """f entry by entry."""
    return [[f(*values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def masked(table: list[list[float]], mask: list[list[bool]] = MASK) -> list[list[float]]:
    """0 outside the mask."""
    return each(lambda x, on: x if on else 0.0, table, mask)


def logsigmoid(x: float) -> float:
    """log(1 / (1 + e^-x)) without overflow."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return math.exp(logsigmoid(x))


def places(row: list[bool]) -> list[int]:
    """The trained places of a row."""
    return [t for t, on in enumerate(row) if on]


MASK_NUMBERS = [[0.25, 0.0, 1.0, 0.5], [1.0, 0.75, 0.0, 0.1], [0.6, 0.9, 0.3, 0.0]]
RATIO = each(lambda a, b: math.exp(a - b), LOGP, OLD)


def gae(gamma: float, gae_lambda: float) -> list[list[float]]:
    """The sum of discounted TD errors over the trained tokens that follow, holes skipped."""
    out = [[0.0] * 4 for _ in T]
    for i, row in enumerate(MASK):
        steps = places(row)
        delta = [
            T[i][t] + gamma * (VALUE[i][steps[n + 1]] if n + 1 < len(steps) else 0.0) - VALUE[i][t]
            for n, t in enumerate(steps)
        ]
        for n, t in enumerate(steps):
            out[i][t] = sum((gamma * gae_lambda) ** (k - n) * delta[k] for k in range(n, len(steps)))
    return out


def to_go(gamma: float) -> list[list[float]]:
    """The discounted sum of the rewards of the trained tokens that follow."""
    out = [[0.0] * 4 for _ in T]
    for i, row in enumerate(MASK):
        steps = places(row)
        for n, t in enumerate(steps):
            out[i][t] = sum(gamma ** (k - n) * T[i][steps[k]] for k in range(n, len(steps)))
    return out


def whitened(ddof: int, eps: float) -> list[list[float]]:
    """(x - mean) / (deviation + eps) over the trained tokens of all rows."""
    flat = [T[i][t] for i, row in enumerate(MASK) for t in places(row)]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - ddof))
    return masked(each(lambda x: (x - mean) / (deviation + eps), T))


def by_group(f: Callable[[float, list[float]], float]) -> list[float]:
    """f(score, scores of its group)."""
    return [f(s, [o for o, h in zip(SCORE, GROUP, strict=True) if h == g]) for s, g in zip(SCORE, GROUP, strict=True)]


def zscore(s: float, own: list[float], ddof: int = 1, eps: float = 1e-6) -> float:
    """(s - mean) / (deviation + eps)."""
    mean = sum(own) / len(own)
    return (s - mean) / (math.sqrt(sum((o - mean) ** 2 for o in own) / (len(own) - ddof)) + eps)


def clipped(low: float, high: float) -> list[list[float]]:
    """PPO's clip."""
    return each(lambda r, a: -min(r * a, min(max(r, 1 - low), 1 + high) * a), RATIO, T)


def dual(bound: float) -> list[list[float]]:
    """PPO's clip, never above -bound A where A < 0."""
    return each(lambda x, a: min(x, -bound * a) if a < 0 else x, clipped(0.2, 0.2), T)


def placed(weights: Callable[[int, int], float], scores: list[float]) -> list[list[float]]:
    """weights(n-th trained token, trained tokens) x score."""
    out = [[0.0] * 4 for _ in MASK]
    for i, row in enumerate(MASK):
        steps = places(row)
        for n, t in enumerate(steps):
            out[i][t] = weights(n + 1, len(steps)) * scores[i]
    return out


def token_sum(i: int, table: list[list[float]]) -> float:
    """Sum over a row's trained tokens."""
    return sum(table[i][t] for t in places(MASK[i]))


def vectors() -> list[dict[str, Any]]:
    """Every vector: function, formula, positional inputs, options, expected output."""
    out: list[dict[str, Any]] = []

    def add(function: str, formula: str, inputs: dict[str, Any], expected: Any, **options: Any) -> None:
        out.append(
            {"function": function, "formula": formula, "inputs": inputs, "options": options, "expected": expected}
        )

    pair = {"chosen": CHOSEN, "rejected": REJECTED}
    two = {"logp": LOGP, "ref_logp": REF}
    surrogate = {"ratio": RATIO, "advantage": T}
    add("k1", "logp - ref_logp", two, each(lambda a, b: a - b, LOGP, REF))
    add("k2", "(logp - ref_logp)^2 / 2", two, each(lambda a, b: (a - b) ** 2 / 2, LOGP, REF))
    add("k3", "e^(ref - logp) - 1 - (ref - logp)", two, each(lambda a, b: math.exp(b - a) - 1 - (b - a), LOGP, REF))
    add("token_ratio", "e^(logp - old_logp)", {"logp": LOGP, "old_logp": OLD}, RATIO)
    means = [math.exp(sum(LOGP[i][t] - OLD[i][t] for t in places(MASK[i])) / len(places(MASK[i]))) for i in range(3)]
    add(
        "sequence_ratio",
        "e^(mean_t logp - old_logp)",
        {"logp": LOGP, "old_logp": OLD, "mask": MASK},
        [[m] * 4 for m in means],
    )
    add("clip", "-min(r A, clip(r, 1 - low, 1 + high) A)", surrogate, clipped(0.2, 0.2), clip_low=0.2, clip_high=0.2)
    add("clip", "-min(r A, clip(r, 1 - low, 1 + high) A)", surrogate, clipped(0.1, 0.28), clip_low=0.1, clip_high=0.28)
    add(
        "dual_clip",
        "clip, and at most -bound A where A < 0",
        surrogate,
        dual(1.2),
        clip_low=0.2,
        clip_high=0.2,
        bound=1.2,
    )
    add("unclipped", "-r A", surrogate, each(lambda r, a: -r * a, RATIO, T))
    add("reinforce", "-A logp", {"logp": LOGP, "advantage": T}, each(lambda p, a: -a * p, LOGP, T))
    add(
        "cispo", "-clip(r, 1 - low, 1 + high) A logp", {"logp": LOGP, **surrogate},
        each(lambda p, r, a: -min(max(r, 0.0), 1.28) * a * p, LOGP, RATIO, T), clip_low=1.0, clip_high=0.28,
    )  # fmt: skip
    add(
        "kl_penalized", "-r A + beta (r - 1 - log r)", {"logp": LOGP, "old_logp": OLD, "advantage": T},
        each(lambda p, o, a: -math.exp(p - o) * a + 0.7 * (math.exp(p - o) - 1 - (p - o)), LOGP, OLD, T), beta=0.7,
    )  # fmt: skip
    add(
        "sapo", "-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A", surrogate,
        each(lambda r, a: -4 / (1.0 if a > 0 else 1.05) * sigmoid((1.0 if a > 0 else 1.05) * (r - 1)) * a, RATIO, T),
        tau_positive=1.0, tau_negative=1.05,
    )  # fmt: skip
    kept = []
    for i in range(3):
        a, terms = SCORE[i], []
        for t in places(MASK[i]):
            x = LOGP[i][t] - OLD[i][t]
            bounded = min(max(x, -0.2), 0.25)
            terms.append(min(x, bounded) if a > 0 else max(x, bounded))
        kept.append([-math.exp(sum(terms) / len(terms)) * a] * 4)
    add(
        "gmpo", "-A e^(mean of log-ratios clipped on A's side)",
        {"logp": LOGP, "old_logp": OLD, "advantage": [[SCORE[i]] * 4 for i in range(3)], "mask": MASK}, kept, clip_low=0.2, clip_high=0.25,
    )  # fmt: skip
    timed = {"rewards": T, "values": VALUE, "mask": MASK}
    for gamma, gae_lambda in ((1.0, 0.95), (0.9, 0.0), (0.9, 1.0)):
        add(
            "gae",
            "sum_k (gamma gae_lambda)^k delta_t+k, holes skipped",
            timed,
            gae(gamma, gae_lambda),
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
    add("whiten", "(x - mean) / (std + eps), n - 1", {"x": T, "mask": MASK}, whitened(1, 1e-8), ddof=1, eps=1e-8)
    add("whiten", "(x - mean) / (std + eps), n", {"x": T, "mask": MASK}, whitened(0, 1e-8), ddof=0, eps=1e-8)
    grouped = {"score": SCORE, "group": GROUP}
    add("group_center", "s - mean", grouped, by_group(lambda s, own: s - sum(own) / len(own)))
    add("group_zscore", "(s - mean) / (std + eps), n - 1", grouped, by_group(zscore), eps=1e-6)
    add(
        "group_zscore",
        "(s - mean) / (std + eps), n",
        grouped,
        by_group(lambda s, own: zscore(s, own, 0, 1e-4)),
        ddof=0,
        eps=1e-4,
    )
    add(
        "leave_one_out", "s - mean of the others", grouped, by_group(lambda s, own: s - (sum(own) - s) / (len(own) - 1))
    )
    shaped = {"score": SCORE[:3], "mask": MASK}
    add("terminal", "all on the last trained token", shaped, placed(lambda n, of: float(n == of), SCORE))
    add("uniform", "s / T on each", shaped, placed(lambda n, of: 1 / of, SCORE))
    add("linear", "(t / T) s", shaped, placed(lambda n, of: n / of, SCORE), normalized=False)
    add("linear", "2 t s / (T (T + 1))", shaped, placed(lambda n, of: n / (of * (of + 1) / 2), SCORE), normalized=True)
    add(
        "soft_overlong", "s + clip((limit - buffer - |y|) / buffer, -1, 0)", shaped,
        [s + min(max((4 - 3 - len(places(row))) / 3, -1), 0) for s, row in zip(SCORE[:3], MASK, strict=True)], limit=4, buffer=3,
    )  # fmt: skip
    squared = []
    for v, o, r in ((a, b, c) for rows in zip(VALUE, T, LOGP, strict=True) for a, b, c in zip(*rows, strict=True)):
        bounded = o + min(max(v - o, -0.2), 0.2)
        squared.append(max((v - r) ** 2, (bounded - r) ** 2) / 2)
    add(
        "value_loss", "max((V - R)^2, (V_clipped - R)^2) / 2", {"value": VALUE, "old_value": T, "returns": LOGP},
        [squared[4 * i : 4 * i + 4] for i in range(3)], clip=0.2,
    )  # fmt: skip
    corrected = {"old_logp": LOGP, "sampler_logp": OLD, "mask": MASK}
    add("token_weight", "min(old / sampler, cap)", corrected, masked(each(lambda r: min(r, 1.3), RATIO)), cap=1.3)
    add(
        "token_mask",
        "old / sampler in [low, high], else 0",
        corrected,
        masked(each(lambda r: r if 0.8 <= r <= 1.5 else 0.0, RATIO)),
        low=0.8,
        high=1.5,
    )
    products = [math.exp(token_sum(i, each(lambda a, b: a - b, LOGP, OLD))) for i in range(3)]
    add(
        "sequence_weight",
        "min(prod old / sampler, cap)",
        corrected,
        masked([[min(p, 1.1)] * 4 for p in products]),
        cap=1.1,
    )

    add(
        "sequence_mask",
        "prod old / sampler in [low, high], else 0",
        corrected,
        masked([[p if 0.5 <= p <= 2.0 else 0.0] * 4 for p in products]),
        low=0.5,
        high=2.0,
    )
    add(
        "geometric_mask",
        "1 where (prod old / sampler)^(1/|y|) in [low, high]",
        corrected,
        masked([[float(0.9 <= m <= 1.1)] * 4 for m in means]),
        low=0.9,
        high=1.1,
    )
    add(
        "product_ratio",
        "e^(sum_t logp - old_logp)",
        {"logp": LOGP, "old_logp": OLD, "mask": MASK},
        [[p] * 4 for p in products],
    )
    add("monte_carlo", "sum_k gamma^k r_t+k, holes skipped", {"rewards": T, "mask": MASK}, to_go(0.9), gamma=0.9)
    adaptive = [gae(0.9, max(0.0, 1 - 1 / (0.8 * len(places(MASK[i])))))[i] for i in range(3)]
    add("gae_adaptive", "gae with gae_lambda = max(0, 1 - 1 / (alpha |y|))", timed, adaptive, gamma=0.9, alpha=0.8)
    add(
        "against_greedy", "return to go - baseline", {"rewards": T, "baseline": SCORE[:3], "mask": MASK},
        masked([[x - b for x in row] for row, b in zip(to_go(1.0), SCORE, strict=False)]),
    )  # fmt: skip
    positive = {"score": [abs(s) for s in SCORE], "group": GROUP}
    add(
        "group_mean_scaled",
        "(s - mean) / mean",
        positive,
        [
            (s - m) / m
            for s, m in (
                (abs(s), sum(abs(o) for o, h in zip(SCORE, GROUP, strict=True) if h == g) / 3)
                for s, g in zip(SCORE, GROUP, strict=True)
            )
        ],
    )
    k3 = each(lambda a, b: math.exp(b - a) - 1 - (b - a), LOGP, REF)
    add("k3_weighted", "ratio x k3", {**two, "old_logp": OLD}, each(lambda r, k: r * k, RATIO, k3))
    add(
        "k2_sequence", "(sum_t logp - ref)^2 / 2 on the last trained token", {**two, "mask": MASK},
        placed(lambda n, of: float(n == of), [token_sum(i, each(lambda a, b: a - b, LOGP, REF)) ** 2 / 2 for i in range(3)]),
    )  # fmt: skip
    gap_of = [token_sum(i, each(lambda a, b: a - b, LOGP, REF)) for i in range(3)]
    links_of = {
        "reverse_kl": lambda u: u, "forward_kl": lambda u: -math.exp(-u), "js": logsigmoid,
        "alpha": lambda u: math.exp((0.3 - 1) * u) / (0.3 - 1),
    }  # fmt: skip
    for name, link in links_of.items():
        add(
            "implicit_reward",
            f"beta s(log pi - log pi_ref), {name}",
            {**two, "mask": MASK},
            [0.4 * link(u) for u in gap_of],
            beta=0.4,
            divergence=name,
            alpha=0.3,
        )
    add(
        "policy_score",
        "beta mean_t logp",
        {"logp": LOGP, "mask": MASK},
        [0.4 * token_sum(i, LOGP) / len(places(MASK[i])) for i in range(3)],
        beta=0.4,
        mean=True,
    )
    p_mean = [math.exp(token_sum(i, LOGP) / len(places(MASK[i]))) for i in range(3)]
    add(
        "log_odds",
        "log(p / (1 - p)), p = e^(mean_t logp)",
        {"logp": LOGP, "mask": MASK},
        [math.log(p / (1 - p)) for p in p_mean],
    )
    good, baseline = [True, False, True, False], [0.3] * 4
    add(
        "kto", "wd (1 - sigmoid(w - beta z)) of good, wu (1 - sigmoid(beta z - w)) of bad",
        {"score": CHOSEN, "good": good, "kl_baseline": baseline},
        [1.2 * (1 - sigmoid(w - 0.15)) if g else 0.8 * (1 - sigmoid(0.15 - w)) for w, g in zip(CHOSEN, good, strict=True)],
        beta=0.5, desirable=1.2, undesirable=0.8,
    )  # fmt: skip
    add(
        "bco",
        "L(w - delta) of good, L(delta - w) of bad",
        {"score": CHOSEN, "good": good},
        [-logsigmoid(w - 0.2 if g else 0.2 - w) for w, g in zip(CHOSEN, good, strict=True)],
        delta=0.2,
    )
    add(
        "apo_zero_unpaired",
        "1 - sigmoid(w) of good, sigmoid(w) of bad",
        {"score": CHOSEN, "good": good},
        [1 - sigmoid(w) if g else sigmoid(w) for w, g in zip(CHOSEN, good, strict=True)],
    )
    several = [[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]]
    add(
        "minimum",
        "min_n w_n r_n",
        {"rewards": several},
        [min(0.5 * a, 2.0 * b, c) for a, b, c in several],
        weights=[0.5, 2.0, 1.0],
    )
    spread = [[sum(r) / 3, math.sqrt(sum((x - sum(r) / 3) ** 2 for x in r) / 3)] for r in several]
    add(
        "lower_bound",
        "mean - k std (n)",
        {"rewards": several},
        [m - 1.5 * d for m, d in spread],
        weights=[1.0, 1.0, 1.0],
        k=1.5,
    )
    add("standardize", "(s - shift) / scale", {"score": SCORE}, [(s - 0.3) / 1.7 for s in SCORE], shift=0.3, scale=1.7)
    add(
        "batch_normalized",
        "(s - mean) / (std + eps), n - 1",
        {"score": SCORE},
        [zscore(s, SCORE, 1, 1e-8) for s in SCORE],
        eps=1e-8,
    )
    add(
        "step_loss",
        "log(1 + e^s) - label s",
        {"token_score": T, "segment_label": MASK_NUMBERS},
        each(lambda s, y: math.log1p(math.exp(s)) - y * s, T, MASK_NUMBERS),
    )

    def stopped(p: float, o: float, a: float) -> float:
        return -math.exp(p - o) * a  # the value is -ratio A whether or not its gradient is stopped

    add(
        "dppo",
        "-r A (no gradient beyond the bound)",
        {"ratio": RATIO, "logp": LOGP, "old_logp": OLD, "advantage": T},
        each(stopped, LOGP, OLD, T),
        bound=0.15,
    )
    logits = [[0.4, -1.1, 0.9], [1.3, 0.2, -0.7]]
    other = [[0.1, 0.5, -0.2], [-0.4, 0.8, 0.3]]
    soft = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in logits]
    soft_other = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in other]
    add(
        "exact_kl",
        "sum_v p_v log(p_v / q_v)",
        {"logits": logits, "ref_logits": other},
        [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in zip(soft, soft_other, strict=True)],
    )
    add("entropy", "-sum_v p_v log p_v", {"logits": logits}, [-sum(a * math.log(a) for a in p) for p in soft])
    add(
        "token_logprobs",
        "log softmax(logits / T)[id]",
        {"logits": logits, "ids": [2, 0]},
        [
            math.log(math.exp(row[t] / 0.7) / sum(math.exp(x / 0.7) for x in row))
            for row, t in zip(logits, (2, 0), strict=True)
        ],
        temperature=0.7,
    )

    def losses(name: str, formula: str, f: Callable[[float, float], float], **options: float) -> None:
        add(name, formula, pair, [f(c, r) for c, r in zip(CHOSEN, REJECTED, strict=True)], **options)

    def links(name: str, formula: str, f: Callable[[float], float], **options: float) -> None:
        add(name, formula, {"gap": GAP}, [f(g) for g in GAP], **options)

    losses("pairwise", "-log sigmoid(c - r)", lambda c, r: -logsigmoid(c - r))
    losses("log_exp", "log(1 + e^(r - c))", lambda c, r: math.log1p(math.exp(r - c)))
    losses("centering", "(c + r)^2", lambda c, r: (c + r) ** 2)
    links(
        "sigmoid",
        "-(1 - e) log sigmoid(g) - e log sigmoid(-g)",
        lambda g: -0.9 * logsigmoid(g) - 0.1 * logsigmoid(-g),
        label_smoothing=0.1,
    )
    links("hinge", "max(0, 1 - g)", lambda g: max(0.0, 1 - g))
    links("ipo", "(g / beta - 1 / (2 beta))^2", lambda g: (g / 0.3 - 1 / 0.6) ** 2, beta=0.3)
    links(
        "exo_pair", "KL(sigmoid(g) || 1 - e)",
        lambda g: sigmoid(g) * math.log(sigmoid(g) / 0.99) + sigmoid(-g) * math.log(sigmoid(-g) / 0.01), label_smoothing=0.01,
    )  # fmt: skip
    links(
        "robust",
        "((1 - e) L(g) - e L(-g)) / (1 - 2 e)",
        lambda g: (-0.9 * logsigmoid(g) + 0.1 * logsigmoid(-g)) / 0.8,
        label_smoothing=0.1,
    )
    links(
        "discopop",
        "(1 - m) L(g) + m e^-g, m = sigmoid(g / tau)",
        lambda g: (1 - sigmoid(g / 0.5)) * -logsigmoid(g) + sigmoid(g / 0.5) * math.exp(-g),
        tau=0.5,
    )
    losses(
        "nca_pair", "L(c) + (L(-c) + L(-r)) / 2", lambda c, r: -logsigmoid(c) - (logsigmoid(-c) + logsigmoid(-r)) / 2
    )
    losses(
        "bco_pair", "L(c - delta) + L(delta - r)", lambda c, r: -logsigmoid(c - 0.2) - logsigmoid(0.2 - r), delta=0.2
    )
    losses(
        "sppo_hard",
        "(c / b - 1 / (2 b))^2 + (r / b + 1 / (2 b))^2",
        lambda c, r: (c / 0.4 - 1.25) ** 2 + (r / 0.4 + 1.25) ** 2,
        beta=0.4,
    )
    losses("apo_zero", "1 - sigmoid(c) + sigmoid(r)", lambda c, r: 1 - sigmoid(c) + sigmoid(r))
    losses("apo_down", "sigmoid(c) + 1 - sigmoid(c - r)", lambda c, r: sigmoid(c) + 1 - sigmoid(c - r))
    four = [[-3.1, -0.9], [-2.2, -4.0], [-2.8, -1.5], [-2.5, -3.3]]
    add(
        "dpo", "L(beta ((chosen - ref_chosen) - (rejected - ref_rejected)))",
        dict(zip(("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp"), four, strict=True)),
        [-logsigmoid(0.5 * ((a - c) - (b - d))) for a, b, c, d in zip(*four, strict=True)], beta=0.5,
    )  # fmt: skip
    ranks = [[2, 1, 3], [1, 1, 2]]
    scores = [[0.4, 1.1, -0.6], [0.9, -0.2, 0.5]]
    each_pair = []
    for s, k in zip(scores, ranks, strict=True):
        own = [-logsigmoid(s[i] - s[j]) for i in range(3) for j in range(3) if k[i] < k[j]]
        each_pair.append(sum(own) / len(own))
    add(
        "k_way",
        "mean over ordered pairs of L(s_better - s_worse), ties dropped",
        {"scores": scores, "ranks": ranks},
        each_pair,
    )
    add(
        "regression",
        "(s - target)^2 / 2",
        {"score": CHOSEN, "target": REJECTED},
        [(c - r) ** 2 / 2 for c, r in zip(CHOSEN, REJECTED, strict=True)],
    )
    return out


def text() -> str:
    """The file's text."""
    return json.dumps({"version": 1, "tolerance": 1e-9, "vectors": vectors()}, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "vectors.json").write_text(text(), encoding="utf-8")

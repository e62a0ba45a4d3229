"""`make mutants`: one-line mutations of the mathematics, each of which must turn the tests that cover it red.

    python -m proof.mutants [PART OF A FILE'S NAME]

A mutant is a file, the text that is replaced (once), the replacement and the tests that must fail. Each runs in a process of its
own on a copy of the sources. A survivor is a bug of the tests; the exit status is 1 then.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in src/whet/`file`; `tests` are paths below tests/."""

    file: str
    old: str
    new: str
    tests: str


def _of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new, tests) for old, new in changes]


MUTANTS: list[Mutant] = [
    *_of(
        "ops/policy.py",
        "ops/test_policy.py",
        ("return exp(logp - old_logp)\n", "return exp(old_logp - logp)\n"),
        ("return exp(masked_mean(logp - old_logp, mask, 1))", "return exp(masked_mean(old_logp - logp, mask, 1))"),
        ("masked_mean(logp - old_logp, mask, 1)[:, None].detach()", "masked_mean(logp - old_logp, mask, 1)[:, None]"),
        ("held = torch.where(advantage < 0,", "held = torch.where(advantage > 0,"),
        (
            "ratio.clamp(min=1 - clip_low), ratio.clamp(max=1 + clip_high)",
            "ratio.clamp(min=1 - clip_high), ratio.clamp(max=1 + clip_low)",
        ),
        (
            "torch.where(advantage < 0, torch.minimum(clipped, -bound",
            "torch.where(advantage > 0, torch.minimum(clipped, -bound",
        ),
        ("torch.minimum(clipped, -bound * advantage)", "torch.maximum(clipped, -bound * advantage)"),
        ("return -times(ratio, advantage)\n", "return times(ratio, advantage)\n"),
        ("expm1(log_ratio), beta - advantage)", "expm1(log_ratio), -beta - advantage)"),
        ("- advantage - beta * log_ratio", "- advantage + beta * log_ratio"),
        ("return -advantage * logp\n", "return advantage * logp\n"),
        ("-ratio.detach().clamp(1 - clip_low, 1 + clip_high)", "-ratio.clamp(1 - clip_low, 1 + clip_high)"),
        (
            "torch.where(advantage > 0, ratio.new_tensor(tau_positive)",
            "torch.where(advantage < 0, ratio.new_tensor(tau_positive)",
        ),
        ("torch.sigmoid(tau * (ratio - 1))", "torch.sigmoid(tau * (1 - ratio))"),
        (
            "torch.minimum(log_ratio, bounded), torch.maximum(log_ratio, bounded)",
            "torch.maximum(log_ratio, bounded), torch.minimum(log_ratio, bounded)",
        ),
        ("log_ratio.clamp(-clip_low, clip_high)", "log_ratio.clamp(-clip_high, clip_low)"),
        (
            "((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))",
            "((advantage > 0) & (ratio < 1)) | ((advantage < 0) & (ratio > 1))",
        ),
        ("away & (distance > bound)", "away | (distance > bound)"),
        ("rest = (1 - old) * (", "rest = (1 - p) * ("),
        ("return times(loss, weight.detach())", "return times(loss, weight)"),
        ("torch.where(selected, loss, loss.detach())", "torch.where(selected, loss.detach(), loss)"),
        ("loss + coef * (logp - old_logp).abs()", "loss + coef * (logp - old_logp)"),
        ("return -full_entropy\n", "return full_entropy\n"),
    ),
    *_of(
        "ops/overflow.py",
        "ops/test_overflow.py",
        ("torch.where(grad == 0, torch.zeros_like(x), grad * x.exp())", "grad * x.exp()"),
        ("torch.as_tensor(weight == 0, device=x.device)", "torch.as_tensor(x == 0, device=x.device)"),
    ),
    *_of(
        "ops/policy.py",
        "ops/test_overflow.py",
        ("return -times(ratio, advantage)\n", "return -ratio * advantage\n"),
        ("exp(mean + (logp - logp.detach()))", "exp(mean) * (logp - logp.detach()).exp()"),
    ),
    *_of(
        "ops/advantage.py",
        "ops/test_advantage.py",
        (
            "delta = rewards[:, t] + gamma * next_value - values[:, t]",
            "delta = rewards[:, t] + next_value - values[:, t]",
        ),
        (
            "delta = rewards[:, t] + gamma * next_value - values[:, t]",
            "delta = rewards[:, t] + gamma * next_value + values[:, t]",
        ),
        ("advantage = delta + gamma * gae_lambda * running", "advantage = delta + gae_lambda * running"),
        (
            "running = torch.where(here, advantage, running)",
            "running = torch.where(here, advantage, torch.zeros_like(running))",
        ),
        ("next_value = torch.where(here, values[:, t], next_value)", "next_value = values[:, t]"),
        ("next_value = running if final_value is None else final_value", "next_value = running"),
        ("gae_lambda=(1 - 1 / (alpha * length)).clamp(min=0)", "gae_lambda=(1 - 1 / (alpha * length))"),
        ("return score - total / count", "return score + total / count"),
        ("(count - ddof).clamp(min=1)", "count"),
        ("centered / (deviation + eps)", "centered / deviation.clamp(min=eps)"),
        ("(total - score) / (count - 1)", "total / count"),
        ("mean > 0, (score - mean) / torch.where(mean", "mean > 0, score / torch.where(mean"),
        ("ends = segment_end & mask", "ends = mask"),
        ("return monte_carlo(normalized, mask)", "return normalized"),
        (
            "monte_carlo(rewards, mask, gamma=gamma) - baseline[:, None]",
            "monte_carlo(rewards, mask, gamma=gamma) + baseline[:, None]",
        ),
        ("1 - 2 * old_logp.exp() + old_collision", "1 - old_logp.exp() + old_collision"),
        ("alone = (count < 2)", "alone = (count < 1)"),
    ),
    *_of(
        "ops/kl.py",
        "ops/test_kl.py",
        ("return logp - ref_logp\n", "return ref_logp - logp\n"),
        ("return 0.5 * (logp - ref_logp) ** 2", "return (logp - ref_logp) ** 2"),
        ("log_ratio = ref_logp - logp\n", "log_ratio = logp - ref_logp\n"),
        ("estimate.clamp(max=bound)", "estimate.clamp(min=bound)"),
        (
            "times(times(ratio.exp(), -gap), grad)",
            "times(times(ratio.exp(), -torch.expm1(gap)), grad)",
        ),
        ("return terminal(0.5 * total**2, mask)", "return terminal(total**2, mask)"),
        ("return (logp.exp() * gap).sum(-1)", "return (ref_logp.exp() * gap).sum(-1)"),
        ("kl / self.target - 1.0", "self.target / kl - 1.0"),
        ("if kl < self.target / 1.5:", "if kl < self.target * 1.5:"),
        ("coef * 2 if kl > self.target * 1.5", "coef * 2 if kl > self.target / 1.5"),
        ("self.step if entropy <= self.target else -self.step", "-self.step if entropy <= self.target else self.step"),
        ("self.decay * coef + (1 - self.decay) * measured", "self.decay * measured + (1 - self.decay) * coef"),
    ),
    *_of(
        "ops/masked.py",
        "ops/test_masked.py",
        ("kept = torch.where(mask, x, torch.zeros_like(x))\n    return kept.sum()", "kept = x\n    return kept.sum()"),
        ("/ (count - ddof).clamp(min=1)", "/ count.clamp(min=1)"),
        (
            "(centered if shift_mean else kept) / (deviation + eps)",
            "(centered if shift_mean else kept) / (deviation + eps) + masked_mean(kept, mask)",
        ),
    ),
    *_of(
        "ops/reduce.py",
        "ops/test_reduce.py",
        ("masked_sum(loss, mask) / max(counts.tokens, 1)", "masked_sum(loss, mask) / max(int(mask.sum()), 1)"),
        ("mask.sum(1).clamp(min=1)).sum() / max(counts.sequences, 1)", "mask.sum(1).clamp(min=1)).mean()"),
        ("(max(counts.sequences, 1) * length)", "(max(counts.tokens, 1) * length)"),
        ("torch.sum(loss) / max(counts.elements, 1)", "torch.mean(loss)"),
    ),
    *_of(
        "ops/shaping.py",
        "ops/test_shaping.py",
        ("score.clamp(-bound, bound)", "score.clamp(-bound)"),
        ("score - amount * truncated", "score + amount * truncated"),
        ("score[:, None])\n    return torch.where(mask, out", "score[:, None] / 2)\n    return torch.where(mask, out"),
        ("length * (length + 1) / 2 if normalized", "length * length / 2 if normalized"),
        ("return own.amin(1)\n", "return own.amax(1)\n"),
        ("own.mean(1) - k * own.std(1, correction=0)", "own.mean(1) + k * own.std(1, correction=0)"),
        ("return (score - shift) / scale", "return score / scale"),
        ("((limit - buffer - length) / buffer).clamp(-1, 0)", "((limit - length) / buffer).clamp(-1, 0)"),
        ("return terminal(total / mask.sum(1).clamp(min=1) if mean else total, mask)", "return terminal(total, mask)"),
    ),
    *_of(
        "ops/value.py",
        "ops/test_value.py",
        ("torch.maximum(squared", "torch.minimum(squared"),
        (
            "clipped = old_value + (value - old_value).clamp(-clip, clip)",
            "clipped = returns + (value - returns).clamp(-clip, clip)",
        ),
    ),
    *_of(
        "ops/correction.py",
        "ops/test_correction.py",
        ("_ratio(old_logp, sampler_logp, mask).clamp(max=cap)", "_ratio(sampler_logp, old_logp, mask).clamp(max=cap)"),
        (
            "masked_sum(old_logp - sampler_logp, mask, 1).exp().clamp(max=cap)",
            "masked_mean(old_logp - sampler_logp, mask, 1).exp().clamp(max=cap)",
        ),
        ("inside = (ratio >= low) & (ratio <= high)", "inside = ratio <= high"),
        ("inside = (total >= low) & (total <= high)", "inside = (total >= low) | (total <= high)"),
        (
            "mean = masked_mean(old_logp - sampler_logp, mask, 1).exp()",
            "mean = masked_sum(old_logp - sampler_logp, mask, 1).exp()",
        ),
    ),
    *_of(
        "ops/selection.py",
        "ops/test_selection.py",
        ("centered[0] * centered[1]", "centered[0] + centered[1]"),
        ("candidates = mask & ~stopped &", "candidates = mask &"),
        ("descending=True, stable=True)[:count]", "descending=False, stable=True)[:count]"),
        (
            "matched[torch.argsort(own, stable=True)] = theirs[",
            "matched[torch.argsort(own, stable=True, descending=True)] = theirs[",
        ),
        ("wrong = log_ratio[index == 1]", "wrong = log_ratio[index == 0]"),
        ("wrong.mean().clamp(min=0)", "wrong.mean()"),
    ),
    *_of(
        "ops/preference.py",
        "ops/test_preference.py",
        (
            "p = probability + label_smoothing * (1 - 2 * probability)",
            "p = probability - label_smoothing * (1 - 2 * probability)",
        ),
        ("gap = gap - margin", "gap = gap + margin"),
        ("return torch.relu(1 - gap)", "return torch.relu(1 + gap)"),
        ("return (gap / beta - 0.5 / beta) ** 2", "return (gap - 0.5 / beta) ** 2"),
        (
            "score[index == 0] - score[index == 1]\n\n\ndef hard_label",
            "score[index == 1] - score[index == 0]\n\n\ndef hard_label",
        ),
        ("better.exp() * (better - keep)", "better.exp() * (better - swap)"),
        ("- 0.5 * functional.logsigmoid(-rejected)", "+ 0.5 * functional.logsigmoid(-rejected)"),
        (
            "+ times(functional.logsigmoid(-gap), e)) / (1 - 2 * e)",
            "- times(functional.logsigmoid(-gap), e)) / (1 - 2 * e)",
        ),
        ("functional.logsigmoid(delta - rejected)", "functional.logsigmoid(rejected - delta)"),
        ("(rejected / beta + 0.5 / beta) ** 2", "(rejected / beta - 0.5 / beta) ** 2"),
        ("return up + down - down.detach()", "return up"),
        ("1 - chosen.sigmoid() + rejected.sigmoid()", "1 - chosen.sigmoid() - rejected.sigmoid()"),
        (
            "chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()",
            "chosen.sigmoid() + 1 + (chosen - rejected).sigmoid()",
        ),
        (
            "return -(-scaled).sigmoid() * functional.logsigmoid(gap)",
            "return -scaled.sigmoid() * functional.logsigmoid(gap)",
        ),
        ("edge = score - beta * kl_baseline.detach()", "edge = score - kl_baseline.detach()"),
        ("desirable * (1 - edge.sigmoid()), undesirable", "desirable * edge.sigmoid(), undesirable"),
        ("torch.where(good, edge, -edge)", "torch.where(good, -edge, edge)"),
        ("return -beta * exp(-u)", "return -beta * u.exp()"),
        ("return mean - torch.log(-torch.expm1(mean))", "return mean + torch.log(-torch.expm1(mean))"),
    ),
    *_of(
        "ops/ranking.py",
        "ops/test_ranking.py",
        ("gap = chosen - rejected - margin", "gap = chosen - rejected + margin"),
        ("ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] > ranks[:, None, :]"),
        ("weight.sum((1, 2)).clamp(min=1)", "ranks.shape[1]"),
        ("return (chosen + rejected) ** 2", "return (chosen - rejected) ** 2"),
        (
            "functional.softplus(token_score) - segment_label * token_score",
            "functional.softplus(token_score) + segment_label * token_score",
        ),
    ),
    *_of(
        "ops/logprobs.py",
        "ops/test_logprobs.py",
        (".mul_(-of_entropy[..., None])", ".mul_(of_entropy[..., None])"),
        (".mul_(-of_entropy[part, None])", ".mul_(of_entropy[part, None])"),
        ("kept[number].clone() if number", "kept[number] if number"),
        ("(of_hidden * -of_logp[:, None])", "(of_hidden * of_logp[:, None])"),
        ("None if of_logp is None else -of_logp[rows]", "None if of_logp is None else of_logp[rows]"),
        ("logp.exp().mul_(-grad.sum(-1, keepdim=True))", "logp.exp().mul_(-grad)"),
        ("x.square_().sum(-1) / total**2", "x.sum(-1) / total**2"),
    ),
    *_of(
        "ops/head.py",
        "ops/test_logprobs.py ops/test_kl.py",
        (" & (support >= 0).any(-1, keepdim=True)", ""),
        ("factor = inverse if factor is None else factor * inverse", "factor = inverse if factor is None else factor"),
        ("_sum(self.weight, slope.T, _scaled(own, factor))", "_sum(None, slope.T, _scaled(own, factor))"),
        ("if keep and tokens * vocabulary * buffers <= workspace:", "if keep:"),
        (
            "logits[rows, -2 - support[rows, places]] = -torch.inf",
            "logits[rows, -1 - support[rows, places]] = -torch.inf",
        ),
    ),
    *_of(
        "ops/kl.py",
        "ops/test_kl.py",
        ("gap.sub_(out[at, None]).mul_(p)", "gap.mul_(p)"),
        ("torch.sub(q, p, out=logq)", "torch.sub(p, q, out=logq)"),
    ),
    *_of(
        "loops/replay.py",
        "cli/test_inspect.py",
        ("losses.detach().double() * coefficient.double()", "losses.detach().double()"),
        ("loop.first, loop.state = saved", "loop.first, _ = saved"),
    ),
    *_of(
        "runs/why.py",
        "cli/test_inspect.py",
        ("portion.term.label, portion.shares.cpu() / times", "portion.term.label, portion.shares.cpu()"),
        ('"gae_lambda": 0.0}', '"gae_lambda": 1.0}'),
    ),
    *_of(
        "runs/diff.py",
        "cli/test_inspect.py",
        ("return min(known, key=lambda one: one[0])[1]", "return max(known, key=lambda one: one[0])[1]"),
    ),
    *_of(
        "methods/algorithm.py",
        "methods",
        ("token_reward = token_reward - coef *", "token_reward = token_reward + coef *"),
        ('placed = batch["score"] - ops.dense(dense, mask).sum(1)', 'placed = batch["score"]'),
        ('mask = mask & ~batch["truncated"][:, None]', 'mask = mask & batch["truncated"][:, None]'),
        ('torch.where(mask, target + batch["old_value"]', 'torch.where(mask, target - batch["old_value"]'),
        ("square += step * (value - mean)", "square += step * step"),
        ("(above & better) | (below & worse)", "(above & worse) | (below & better)"),
        ("best = max(own, key=lambda row: score[row])", "best = min(own, key=lambda row: score[row])"),
        ("score[best] > score[worst] or labels.op is not", "score[best] > score[worst] or labels.op is"),
        ("(ends[0] > ends[1]).any(1)[index]", "(ends[0] > ends[1]).all(1)[index]"),
    ),
    *_of(
        "methods/compose.py",
        "methods",
        ('"k1": part(ops.k1, logp="old_full_logp")', '"k1": part(ops.k1, logp="old_logp")'),
        (
            'WHOLE = part(ops.masked_sum, x="token_reward", dim=1)',
            'WHOLE = part(ops.masked_mean, x="token_reward", dim=1)',
        ),
        ('"sequence_sum": part(ops.per_sequence, mean=False)', '"sequence_sum": part(ops.per_sequence, mean=True)'),
        ("gae_lambda=value.gae_lambda, **given\n", "gae_lambda=1.0 - value.gae_lambda, **given\n"),
    ),
    *_of(
        "methods/pairs.py",
        "methods",
        ('"rejected": part(ops.nth, x=score, n=1)', '"rejected": part(ops.nth, x=score, n=0)'),
    ),
    *_of(
        "methods/parts.py",
        "methods",
        ("return self.weight * self.reduction(", "return self.reduction("),
    ),
    *_of(
        "models/probe.py",
        "models/test_probe.py",
        ("padding=gap <= self.limit", "padding=True"),
        ("packing=right, window", "packing=True, window"),
        ("sharing=gap <= self.limit", "sharing=True"),
        ("found[name] = gap <= self.limit", "found[name] = True"),
    ),
    *_of("models/roles.py", "models/test_missing.py", ("logits.device), -torch.inf)", "logits.device), 0.0)")),
    *_of(
        "models/readers.py",
        "models/test_readers.py learner generate/test_support.py",
        ("before = states(-1)", "before = states()"),
        ("_scalar(role, states(-1)) + each", "_scalar(role, states()) + each"),
        ('*logprobs(None, "full_entropy" in names)', '*logprobs(support, "full_entropy" in names)'),
    ),
    *_of(
        "models/saved_adapters.py",
        "models/test_lora.py models/test_saved_adapters.py",
        ("if name not in changes and tied[", "if tied["),
        ("value = value + _delta(", "value = value - _delta("),
        ("config.tie_word_embeddings = False", "config.tie_word_embeddings = True"),
        ("    twin.set_adapter(adapter)", "    twin"),
        ("if unknown or lost:", "if unknown:"),
    ),
    *_of(
        "models/lora.py",
        "models/test_lora.py models/test_saved_adapters.py",
        ('config.task_type, config.lora_dropout = "CAUSAL_LM", 0.0', 'config.task_type = "CAUSAL_LM"'),
        ("    if other is not None:\n", "    if False:\n"),
    ),
    *_of(
        "models/roles.py",
        "models/test_load.py",
        ("return saved_adapters.close(last, own)", "return True"),
    ),
    *_of(
        "loops/staleness.py",
        "planning/test_schedule.py",
        ("return (max_staleness + 1) // 2", "return max_staleness"),
        ("max(0, last - step) * prompts)", "max(0, last - step + 1) * prompts)"),
        ("sorted(out, key=lambda one: (one.ended is None, one.ended or 0, one.draw))", "list(out)"),
    ),
    *_of(
        "loops/ahead.py",
        "loops/test_ahead.py",
        ("min(lead(self.staleness), self.steps - 1 - self.step)", "lead(self.staleness) + 1"),
        ("self._published[self.version] = self._turn", "self._published[self.version] = self._turn - 1"),
        ("begun = () if answer is None else answer.ids", "begun = ()"),
        ('"buffer": self.buffer.state(),', '"buffer": [],'),
        ("if max(ages, default=0) > self.buffer.staleness:", "if False:"),
    ),
    *_of(
        "loops/selfcheck.py",
        "loops/test_push.py",
        ("and 2 * stale < off:", "and stale < 0:"),
        ("if not gap <= 10 * precision:", "if gap > 10 * precision:"),
        ("if generator.version != version:", "if False:"),
    ),
    *_of(
        "data/types.py",
        "loops/test_ahead.py",
        ("self.token_versions() + later.token_versions()", "later.token_versions() + self.token_versions()"),
        ("self.sampler_logp + later.sampler_logp", "later.sampler_logp + self.sampler_logp"),
    ),
    *_of(
        "data/store.py",
        "data/test_store.py",
        ("end = trained + length - start", "end = trained + length"),
        ("number = bisect_right(self._ends, index)", "number = bisect_right(self._ends, index - 1)"),
    ),
    *_of(
        "learner/state.py",
        "learner/test_optimizers.py",
        ("own[name].copy_(value)", "pass"),
        ("own[name] = value.item()", "pass"),
        ("id(parameter) not in embeddings", "True"),
    ),
    *_of(
        "data/batching.py",
        "data/test_dealt.py",
        ("joined = (len(parts[-1][1]) + len(rows)) * size", "joined = len(rows) * size"),
        (
            "places = -(-len(_cut(pieces, budget, packed)) // workers) * workers",
            "places = (len(_cut(pieces, budget, packed)) // workers + 1) * workers",
        ),
        (
            "parts = sorted(parts, key=lambda part: -part[0])",
            "parts = sorted(_cut(pieces, budget, packed), key=lambda part: part[0])",
        ),
    ),
    *_of(
        "data/batching.py",
        "models/test_packing.py",
        ("(0 if key == last and key else start)", "0"),
    ),
    *_of(
        "models/packing.py",
        "models/test_packing.py",
        (".tril(before)", ".tril()"),
        ("position < self.split[row]", "position <= self.split[row]"),
        ("self.lengths[self.after[number]] if", "0 if"),
    ),
    *_of(
        "ops/head.py",
        "models/test_precision.py",
        ("return hidden.to(torch.get_autocast_dtype(device))", "return hidden.clone()"),
    ),
    *_of(
        "models/readers.py",
        "models/test_precision.py",
        ("with torch.autocast(states.device.type, enabled=False):", "with torch.enable_grad():"),
        (
            "else temperature.to(states.device, _precise(states))",
            "else temperature.to(states)",
        ),
    ),
    *_of(
        "models/roles.py",
        "models/test_precision.py",
        ("held == torch.float32 and not self.whole_text", "held == torch.float32"),
        ("bf16 and held == torch.float32", "bf16 and held.is_floating_point"),
    ),
    *_of(
        "models/probe.py",
        "models/test_precision.py",
        ("role.autocast = half and flash", "role.autocast = half"),
        ("if half:\n            trial", "if flash:\n            trial"),
    ),
    *_of(
        "learner/base.py",
        "learner/test_half.py",
        ('(self.precision == "auto" and context.half)', "context.half"),
    ),
    *_of("learner/local.py", "loops/test_defer.py", ('fresh["logp"].detach()}', 'fresh["logp"]}')),
    *_of("learner/local.py", "learner/test_half.py", ("if computed != self._precision:", "if not computed:")),
    *_of(
        "runs/generators.py",
        "cli/test_precision.py",
        ("partial(sampler_role, recipe.model, bf16)", "partial(sampler_role, recipe.model)"),
    ),
]


def check(mutants: list[Mutant]) -> None:
    """Every mutant's text stands exactly once in its file."""
    for one in mutants:
        count = (ROOT / "src/whet" / one.file).read_text(encoding="utf-8").count(one.old)
        if count != 1:
            raise SystemExit(f"{one.file}: {one.old!r} stands {count} times; a mutant replaces one place")


def _tests(source: Path, paths: str) -> None:
    """In a process of its own: these tests against the package under `source`; the exit status is pytest's."""
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "--assert=plain", *(str(ROOT / "tests" / one) for one in paths.split())])))


def status(source: Path, paths: str, limit: float | None = None) -> int | None:
    """pytest's exit status against this copy of the sources: 0 passed, 1 a test failed; anything else killed no mutant.

    Tests that are not through after `limit` seconds have failed: a mutant may make a loop endless.
    """
    process = multiprocessing.get_context("fork").Process(target=_tests, args=(source, paths))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return 1
    return process.exitcode


def _share(source: Path, mutants: list[Mutant], told: Any) -> None:
    """In a process of its own: try these mutants on a copy of the sources. Send the survivors over the connection `told`, or the
    paths of tests that fail without any mutant."""
    shutil.copytree(ROOT / "src", source)
    limits: dict[str, float] = {}
    for paths in dict.fromkeys(one.tests for one in mutants):
        began = time.monotonic()
        fine = status(source, paths) == 0
        limits[paths] = 60 + 10 * (time.monotonic() - began)
        if not fine:
            told.send(paths)
            return
    survivors = []
    for one in mutants:
        target = source / "whet" / one.file
        text = target.read_text(encoding="utf-8")
        target.write_text(text.replace(one.old, one.new), encoding="utf-8")
        if status(source, one.tests, limits[one.tests]) != 1:
            survivors.append(one)
            print(f"survived: {one.file}: {one.old!r} -> {one.new!r}", flush=True)
        target.write_text(text, encoding="utf-8")
    told.send(survivors)


def main(part: str = "") -> int:
    """Runs all mutants (of the files whose name has `part` in it), a share on each core; 1 when one survives."""
    import pytest  # noqa: F401  loaded once, before the processes part
    import torch  # noqa: F401
    import transformers  # noqa: F401

    os.chdir(ROOT)
    mutants = [one for one in MUTANTS if part in one.file]
    check(mutants)
    context, count = multiprocessing.get_context("fork"), max(1, min(os.cpu_count() or 1, len(mutants)))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            place = Path(folder) / str(number) / "src"
            context.Process(target=_share, args=(place, mutants[number::count], theirs)).start()
            theirs.close()
            ends.append(ours)
        for end in ends:
            result = end.recv()  # EOFError if the process died
            if isinstance(result, str):
                print(f"tests/{result}: they fail without any mutant")
                return 1
            survivors += len(result)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

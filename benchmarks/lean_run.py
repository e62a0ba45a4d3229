"""Lean hand-written loops on one line of the benchmark: how fast it could be. python -m benchmarks.lean_run ALGORITHM SIZE --world DIR

Micro-batches are sorted by length within a fixed number of tokens, the head runs over answer tokens alone, the sampler's
log-probs are the old ones, and nothing is logged. Prompts are not shared between answers in training.
"""

# ruff: noqa: E402 (threads and environment are set before torch is imported)

from benchmarks.job import Job, job_of

JOB = job_of(__doc__ or "")

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import world
from benchmarks.lean import Decoder, answer_logps, micro_batches, padded
from benchmarks.workloads import BUDGET

torch.set_num_threads(1)
METER = JOB.meter()
TOKENIZER = AutoTokenizer.from_pretrained(JOB.world / "model")
PAD, END, MOST = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, BUDGET[JOB.world.name]


@dataclass
class Answer:
    """One answer: ids of prompt and answer, the sampler's log-probs, and what training reads."""

    number: int
    prompt: list[int]
    ids: list[int]
    old: Tensor
    weight: Tensor = torch.tensor(0.0)
    old_value: Tensor = torch.tensor(0.0)
    returns: Tensor = torch.tensor(0.0)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


def loaded(kind: str = "model") -> Any:
    """Return the language model, or the classifier `rm`."""
    load = AutoModelForCausalLM if kind == "model" else AutoModelForSequenceClassification
    return load.from_pretrained(JOB.world / kind, dtype=torch.float32)


def optimizer(model: Any) -> Any:
    """Return AdamW without weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=JOB.work.lr, weight_decay=0.0, fused=True)


def step(model: Any, optim: Any) -> None:
    """Clip the gradient and take a step."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad()


def tokens(text: str) -> list[int]:
    """Return the ids of a text."""
    return list(TOKENIZER(text)["input_ids"])


def sft() -> None:
    """Supervised fine-tuning: the mean over the answer tokens of an update."""
    work, model = JOB.work, loaded()
    optim = optimizer(model)
    data = [(tokens(row["prompt"]), [*tokens(row["completion"]), END]) for row in JOB.rows("sft", work.rows)]
    METER.begin()
    for begin in range(0, len(data), work.batch):
        batch, total = data[begin : begin + work.batch], 0.0
        count = sum(len(answer) for _, answer in batch)
        for micro in micro_batches(batch, lambda row: len(row[0]) + len(row[1]), MOST):
            ids, mask = padded([prompt + answer for prompt, answer in micro], PAD)
            logp, _ = answer_logps(model, ids, mask, torch.tensor([len(prompt) for prompt, _ in micro]))
            loss = -logp.sum() / count
            loss.backward()
            total += float(loss.detach())
        step(model, optim)
        ended(total, len(batch), sum(len(prompt) + len(answer) for prompt, answer in batch))


def ended(loss: float, samples: int, count: int) -> None:
    """End an offline update."""
    METER.updates += 1
    METER.losses.append(loss)
    METER.step(samples, count)


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt, chosen, rejected) of every pair."""
    return [
        (tokens(row["prompt"]), [*tokens(row["chosen"]), END], [*tokens(row["rejected"]), END])
        for row in JOB.rows("pref", JOB.work.rows)
    ]


def flat(batch: Sequence[tuple[list[int], list[int], list[int]]]) -> list[tuple[int, list[int], list[int]]]:
    """Return (number, prompt, answer): the chosen ones first, then the rejected ones."""
    chosen = [(number, prompt, answer) for number, (prompt, answer, _) in enumerate(batch)]
    return chosen + [(len(batch) + number, prompt, answer) for number, (prompt, _, answer) in enumerate(batch)]


def preference(reward: bool) -> None:
    """DPO, or a reward model: one number per answer, the loss over the pairs, then backward through each micro-batch."""
    work, data = JOB.work, pairs()
    model = loaded("rm" if reward else "model")
    reference = None if reward else loaded().eval()
    optim = optimizer(model)
    METER.begin()
    for begin in range(0, len(data), work.batch):
        batch = data[begin : begin + work.batch]
        number, base = torch.zeros(2 * len(batch)), torch.zeros(2 * len(batch))
        kept = []
        for micro in micro_batches(flat(batch), lambda row: len(row[1]) + len(row[2]), MOST):
            index = torch.tensor([one for one, _, _ in micro])
            own = scores(model, micro) if reward else sums(model, micro)
            if reference is not None:
                with torch.no_grad():
                    base[index] = sums(reference, micro)
            number[index] = own.detach()
            kept.append((index, own))
        leaf = (number - base).requires_grad_(True)
        loss = -F.logsigmoid((1.0 if reward else work.beta) * (leaf[: len(batch)] - leaf[len(batch) :])).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        for index, own in kept:
            (own * gradient[index]).sum().backward()
        step(model, optim)
        ended(float(loss.detach()), len(batch), sum(2 * len(one[0]) + len(one[1]) + len(one[2]) for one in batch))


def sums(model: Any, micro: Sequence[tuple[int, list[int], list[int]]]) -> Tensor:
    """Return the log-prob of each answer, (B,)."""
    ids, mask = padded([prompt + answer for _, prompt, answer in micro], PAD)
    logp, keep = answer_logps(model, ids, mask, torch.tensor([len(prompt) for _, prompt, _ in micro]))
    return torch.zeros(len(micro)).index_add(0, keep.nonzero()[:, 0], logp)


def scores(model: Any, micro: Sequence[tuple[int, list[int], list[int]]]) -> Tensor:
    """Return the score of each answer at its last token, (B,)."""
    ids, mask = padded([prompt + answer for _, prompt, answer in micro], PAD)
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(micro)), mask.sum(1) - 1])[:, 0]


def rollout(decoder: Decoder, prompts: Sequence[list[int]], number: int) -> list[Answer]:
    """Sample the answers of a step."""
    work = JOB.work
    with METER.phase("generate"):
        decoder.take()
        asked = [prompts[(number * work.prompts + one) % len(prompts)] for one in range(work.prompts)]
        ids, old = decoder.generate(asked, work.answers, work.max_new)
    return [Answer(one, asked[one // work.answers], ids[one], old[one]) for one in range(len(ids))]


def rewards(answers: Sequence[Answer], texts: Sequence[str], score: Any) -> Tensor:
    """Return the reward of each answer from the function, (B,)."""
    with METER.phase("score"):
        said = TOKENIZER.batch_decode([one.ids for one in answers], skip_special_tokens=True)
        return torch.tensor(score(texts, said))


def read(model: Any, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the answers' tokens, and their rows."""
    ids, mask = padded([one.prompt + one.ids for one in answers], PAD)
    logp, keep = answer_logps(model, ids, mask, torch.tensor([len(one.prompt) for one in answers]))
    return logp, keep.nonzero()[:, 0]


def counted(answers: Sequence[Answer]) -> None:
    """End an online step."""
    prompt = sum(len(one.prompt) for one in answers)
    METER.step(len(answers), prompt_tokens=prompt, answer_tokens=sum(len(one.ids) for one in answers))


def measured(model: Any, answers: Sequence[Answer]) -> dict[int, Tensor]:
    """Return the log-probs of each answer under a frozen model, by number."""
    out = {}
    with torch.no_grad(), METER.phase("measure"):
        for micro in micro_batches(answers, len, MOST):
            logp, _ = read(model, micro)
            out |= {
                one.number: own for one, own in zip(micro, logp.split([len(one.ids) for one in micro]), strict=True)
            }
    return out


def old_measured(model: Any, answers: Sequence[Answer]) -> None:
    """Measure the log-probs before the update with the model itself, as the peer does for a KL in the reward."""
    own = measured(model, answers)
    for one in answers:
        one.old = own[one.number]


def grouped(leave_one_out: bool) -> None:
    """GRPO (group z-score, token mean, clip), or RLOO with KL in the reward (clip on the ratio of the answer)."""
    work, model = JOB.work, loaded()
    reference = loaded().eval() if work.kl else None
    optim, decoder = optimizer(model), Decoder(model, PAD, -1 if JOB.fixed else END)
    score = world.topic_reward(JOB.world)
    texts = [row["prompt"] for row in JOB.rows("prompts")]
    prompts = [tokens(text) for text in texts]
    METER.begin()
    torch.manual_seed(0)
    for number in range(work.steps):
        answers = rollout(decoder, prompts, number)
        own = [texts[(number * work.prompts + one.number // work.answers) % len(texts)] for one in answers]
        reward = rewards(answers, own, score)
        if reference is not None:
            old_measured(model, answers)
            base = measured(reference, answers)
            reward = reward - work.kl * torch.stack([(one.old - base[one.number]).sum() for one in answers])
        group = reward.view(work.prompts, work.answers)
        mean = group.mean(1, keepdim=True)
        if leave_one_out:
            weight = (group - mean) * work.answers / (work.answers - 1)
        else:
            weight = (group - mean) / (group.std(1, keepdim=True) + 1e-4)
        for one, value in zip(answers, weight.view(-1), strict=True):
            one.weight = value
        with METER.phase("update"):
            learnt(model, answers, whole=leave_one_out)
            step(model, optim)
            METER.updates += 1
        counted(answers)


def learnt(model: Any, answers: Sequence[Answer], *, whole: bool) -> None:
    """Backward of the clipped surrogate: per token (mean over tokens), or of whole answers (mean over answers)."""
    count = len(answers) if whole else sum(len(one.ids) for one in answers)
    for micro in micro_batches(answers, len, MOST):
        logp, row = read(model, micro)
        gap, weight = logp - torch.cat([one.old for one in micro]), torch.stack([one.weight for one in micro])
        if whole:
            ratio = torch.zeros(len(micro)).index_add(0, row, gap).exp()
        else:
            ratio, weight = gap.exp(), weight[row]
        (-torch.min(ratio * weight, ratio.clamp(0.8, 1.2) * weight).sum() / count).backward()


def ppo() -> None:
    """PPO with a policy, a critic, a reference and a reward model of their own, GAE, whitened advantages, four epochs."""
    work, model, critic = JOB.work, loaded(), loaded("rm")
    reference, reward = loaded().eval(), loaded("rm").eval()
    optims = {"policy": optimizer(model), "critic": optimizer(critic)}
    decoder = Decoder(model, PAD, -1 if JOB.fixed else END)
    prompts = [tokens(row["prompt"]) for row in JOB.rows("prompts")]
    METER.begin()
    torch.manual_seed(0)
    for number in range(work.steps):
        answers = rollout(decoder, prompts, number)
        old_measured(model, answers)
        base = measured(reference, answers)
        scored, values = judged(reward, answers), valued(critic, answers)
        for one in answers:
            own = -work.kl * (one.old - base[one.number])
            own[-1] += scored[one.number]
            one.old_value = values[one.number]
            one.weight = gae(own, one.old_value)
            one.returns = one.weight + one.old_value
        every = torch.cat([one.weight for one in answers])
        mean, scale = every.mean(), torch.rsqrt(every.var() + 1e-8)
        for one in answers:
            one.weight = (one.weight - mean) * scale
        with METER.phase("update"):
            for _ in range(work.epochs):
                _ppo_update(model, critic, answers)
                step(model, optims["policy"])
                step(critic, optims["critic"])
                METER.updates += 1
        counted(answers)


def _ppo_update(model: Any, critic: Any, answers: Sequence[Answer]) -> None:
    """Backward of the clipped policy loss and of 0.1 times the clipped value loss, each a mean over tokens."""
    count = sum(len(one.ids) for one in answers)
    for micro in micro_batches(answers, len, MOST):
        logp, _ = read(model, micro)
        weight = torch.cat([one.weight for one in micro])
        ratio = (logp - torch.cat([one.old for one in micro])).exp()
        (-torch.min(ratio * weight, ratio.clamp(0.8, 1.2) * weight).sum() / count).backward()
        value, before = state_values(critic, micro), torch.cat([one.old_value for one in micro])
        returns, near = torch.cat([one.returns for one in micro]), before + (value - before).clamp(-0.2, 0.2)
        (0.1 * 0.5 * torch.max((value - returns) ** 2, (near - returns) ** 2).sum() / count).backward()


def state_values(critic: Any, answers: Sequence[Answer]) -> Tensor:
    """Return the values of the states before each answer token, row by row, (N,)."""
    ids, mask = padded([one.prompt + one.ids for one in answers], PAD)
    hidden = critic.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    start = torch.tensor([len(one.prompt) for one in answers])
    keep = (torch.arange(hidden.shape[1])[None] >= start[:, None] - 1) & (mask[:, 1:] > 0)
    return critic.score(hidden[keep])[:, 0]


def valued(critic: Any, answers: Sequence[Answer]) -> dict[int, Tensor]:
    """Return the values of each answer's tokens, by number."""
    out = {}
    with torch.no_grad(), METER.phase("measure"):
        for micro in micro_batches(answers, len, MOST):
            parts = state_values(critic, micro).split([len(one.ids) for one in micro])
            out |= {one.number: value for one, value in zip(micro, parts, strict=True)}
    return out


def judged(reward: Any, answers: Sequence[Answer]) -> dict[int, Tensor]:
    """Return the score of each answer, by number."""
    out = {}
    with torch.no_grad(), METER.phase("score"):
        for micro in micro_batches(answers, len, MOST):
            found = scores(reward, [(one.number, one.prompt, one.ids) for one in micro])
            out |= {one.number: value for one, value in zip(micro, found, strict=True)}
    return out


def gae(reward: Tensor, value: Tensor, decay: float = 0.95) -> Tensor:
    """Return the advantages of one answer (T,), discount 1 (Schulman et al. 2016)."""
    out, running = torch.zeros_like(reward), 0.0
    following = [*value.tolist()[1:], 0.0]
    for place in range(len(reward) - 1, -1, -1):
        running = float(reward[place]) + following[place] - float(value[place]) + decay * running
        out[place] = running
    return out


def generation() -> None:
    """Sample answers: as many prompts per step as the workload says."""
    work, model = JOB.work, loaded().eval()
    prompts = [tokens(row["prompt"]) for row in JOB.rows("prompts")]
    decoder = Decoder(model, PAD, -1 if JOB.fixed else END)
    decoder.take()
    METER.begin()
    for number in range(work.steps):
        torch.manual_seed(number)
        asked = prompts[number * work.prompts : (number + 1) * work.prompts]
        ids, _ = decoder.generate(asked, work.answers, work.max_new)
        METER.step(len(ids), sum(map(len, ids)), answer_tokens=sum(map(len, ids)))


def main(job: Job) -> None:
    """Run the job and print its result."""
    {
        "sft": sft, "reward": lambda: preference(True), "dpo": lambda: preference(False), "ppo": ppo,
        "grpo": lambda: grouped(False), "rloo": lambda: grouped(True), "generation": generation,
    }[job.algorithm]()  # fmt: skip
    job.done("lean", METER)


if __name__ == "__main__":
    main(JOB)

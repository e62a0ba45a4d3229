"""Tasks whose answer is known, in short form: the exact end is computed by enumeration and the real loops must come near it.

`make proof` runs every case of `proof.cases` at full length; its table is in docs/methods.md.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from proof import cases as known
from proof.enumeration import END, Problem, Tables, kl
from whet.data import Batch, Labeled, Located, Reader, chat_format, pad_support
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import evaluate, offline, online
from whet.loops.record import RunFolder
from whet.methods import compose
from whet.methods.options import Optim, Sampling
from whet.models.readers import read
from whet.models.roles import Role
from whet.ops import gae, sequence_weight, token_weight
from whet.rewards import Weighted

PROBLEM = Problem()
CASES = known.cases(PROBLEM)
SHORT = known.Budget(rollouts=100, answers=512, lr=0.01)


@pytest.fixture(scope="module")
def reference() -> Tensor:
    """The reference's token log-probs, (prompts, answers, longest)."""
    return PROBLEM.token_logp(PROBLEM.model())


def test_the_enumeration_is_complete(reference: Tensor) -> None:
    whole = reference.sum(-1)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert kl(whole, PROBLEM.optimum(whole)) > 0.15


# --- what the ends are: the expected updates written out by hand, followed to where they vanish ---------------------------


def test_a_kl_in_the_reward_ends_at_the_optimum(reference: Tensor) -> None:
    field = known.weight_of("regularized", PROBLEM, 4)
    end = known.fixed_point(PROBLEM, reference, field)
    assert abs(kl(end, PROBLEM.optimum(reference.sum(-1)))) < 1e-9


@pytest.mark.parametrize(
    ("field", "least"), [("k2", 0.004), ("k3", 0.015), ("centered k2", 0.008), ("zscore k3 per answer", 0.4)]
)
def test_a_kl_in_the_loss_ends_elsewhere(field: str, least: float, reference: Tensor) -> None:
    end = known.fixed_point(PROBLEM, reference, known.weight_of(field, PROBLEM, known.GROUP))
    assert kl(end, PROBLEM.optimum(reference.sum(-1))) > least


def test_for_answers_of_one_token_k2_is_right_and_k3_is_not() -> None:
    problem = replace(PROBLEM, longest=1)
    reference = problem.token_logp(problem.model())
    ends = {
        name: kl(
            known.fixed_point(problem, reference, known.weight_of(name, problem, 4)), problem.optimum(reference.sum(-1))
        )
        for name in ("k2", "k3")
    }
    assert abs(ends["k2"]) < 1e-9
    assert ends["k3"] > 0.002


# --- the loops reach them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bound"),
    [("rloo", 0.012), ("ppo", 0.012), ("dr_grpo, k3 in the loss", 0.024), ("reinforce, exact KL", 0.024)],
)
def test_a_method_comes_near_its_own_end(name: str, bound: float, reference: Tensor, tmp_path: Path) -> None:
    case = CASES[name]
    end, _ = known.ends(case, PROBLEM, reference)
    start = kl(reference.sum(-1), end)
    left = kl(known.learned(case, PROBLEM, tmp_path, SHORT), end)
    assert left < min(bound, start / 4)


def pairwise_end(reference: Tensor, probability: Tensor, steps: int) -> Tensor:
    """log pi (P, Y) after `steps` on the expected loss of online DPO, by enumeration: pairs of the policy's own answers, with the
    probability (Y, Y) that the first is preferred. reference (P, Y, T)."""
    tables, start = Tables(PROBLEM, reference), reference.sum(-1)
    logits = tables.logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        own = tables.token_logp(logits).sum(-1)
        reward, chance = PROBLEM.beta * (own - start), own.detach().exp()
        gap = reward[:, :, None] - reward[:, None, :]
        drawn = chance[:, :, None] * chance[:, None, :]
        loss = -(drawn * probability * torch.nn.functional.logsigmoid(gap)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tables.token_logp(logits.detach()).sum(-1)


def test_pairs_with_the_judges_probability_end_at_the_optimum_and_hard_ones_nowhere(reference: Tensor) -> None:
    gap = PROBLEM.score[:, None] - PROBLEM.score[None, :]
    optimum = PROBLEM.optimum(reference.sum(-1))
    assert abs(kl(pairwise_end(reference, torch.sigmoid(gap), 1500), optimum)) < 1e-6
    # with temperature 2 the optimum is that of twice beta
    wide = (reference.sum(-1) + PROBLEM.score / (2 * PROBLEM.beta)).log_softmax(-1)
    assert abs(kl(pairwise_end(reference, torch.sigmoid(gap / 2), 1500), wide)) < 1e-6
    hard = (gap > 0).double()
    away = [kl(pairwise_end(reference, hard, steps), optimum) for steps in (100, 400, 1500)]
    assert 1 < away[0] < away[1] < away[2]


def test_online_dpo_comes_near_the_optimum_with_soft_labels_and_runs_off_with_hard_ones(
    reference: Tensor, tmp_path: Path
) -> None:
    case = CASES["online_dpo, labels of the judge's probability"]
    optimum, budget = PROBLEM.optimum(reference.sum(-1)), known.Budget(rollouts=90, answers=256, lr=0.01)
    start = kl(reference.sum(-1), optimum)
    soft = kl(known.learned(case, PROBLEM, tmp_path / "soft", budget), optimum)
    hard = replace(case, changes={"beta": PROBLEM.beta, "pairs": "hard"})
    assert soft < start / 6
    assert kl(known.learned(hard, PROBLEM, tmp_path / "hard", replace(budget, rollouts=40)), optimum) > 10 * start


def test_dpo_on_exact_soft_labels_finds_the_optimum(reference: Tensor, tmp_path: Path) -> None:
    pairs = known.pairs(PROBLEM)
    own = known.preferred(PROBLEM, pairs, tmp_path, steps=120, batch=len(pairs), lr=0.005)
    assert kl(own, PROBLEM.optimum(reference.sum(-1))) < 0.004


def test_soft_labels_over_cut_answers_in_a_file_find_the_optimum(reference: Tensor, tmp_path: Path) -> None:
    """Through rows of text: 16 of the 21 answers are cut at the limit, and an end token on them would be another answer."""
    words = {number: "<eos>" if number == END else f"w{number}" for number in range(PROBLEM.vocabulary)}
    vocabulary = {word: number for number, word in words.items()} | {"<unk>": 9}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    chat = chat_format(tokenizer, "none")
    texts = [chat.text(answer) for answer in PROBLEM.answers]
    finish = ["stop" if answer[-1] == END else "length" for answer in PROBLEM.answers]
    chance = torch.sigmoid(PROBLEM.score[:, None] - PROBLEM.score[None]).tolist()
    whole, single = [], []
    for prompt in PROBLEM.prompts:
        row = {"prompt": " ".join(words[one] for one in prompt)}
        whole.append(row | {"responses": texts, "finish": finish, "probability": chance})
        single += [
            row | {"chosen": texts[i], "rejected": texts[j], "finish": [finish[i], finish[j]], "probability": chance[i][j]}
            for i in range(len(texts)) for j in range(i + 1, len(texts))
        ]  # fmt: skip
    forms = [Reader(chat, 99).pairs([Located(row, "rows.jsonl:1") for row in rows]) for rows in (whole, single)]
    for one, other in zip(*forms, strict=True):
        assert one.probability == other.probability
        assert one.chosen.ids.tolist() == other.chosen.ids.tolist()
        assert one.rejected.ids.tolist() == other.rejected.ids.tolist()
    own = known.preferred(PROBLEM, forms[0], tmp_path, steps=120, batch=len(forms[0]), lr=0.005)
    assert kl(own, PROBLEM.optimum(reference.sum(-1))) < 0.004


# --- reward models -------------------------------------------------------------------------------------------------------


def trained_scores(method: str, elements: list, folder: Path, steps: int = 150) -> Tensor:
    """(prompts, answers): the scores of a reward model after training."""
    role = Role("reward", PROBLEM.scorer(hidden=48), True)
    learner = LocalLearner(
        {"reward": role}, {"reward": Optim(lr=0.01, schedule="cosine", min_lr_ratio=0.0)}, total=steps, budget=1 << 14
    )
    offline.train(
        compose.reward(method),
        learner,
        [elements],
        offline.OfflinePlan(steps, len(elements)),
        RunFolder(folder),
        quiet=True,
    )
    rows = [PROBLEM.row(prompt, answer) for prompt in PROBLEM.prompts for answer in PROBLEM.answers]
    labeled = [Labeled(row, 0.0) for row in rows]
    return evaluate.scores(learner, compose.reward("absolute"), labeled).reshape(len(PROBLEM.prompts), -1).double()


def test_a_reward_model_on_exact_probabilities_recovers_the_scores(tmp_path: Path) -> None:
    found = trained_scores("pairwise", known.pairs(PROBLEM), tmp_path)
    for own in found:
        assert torch.corrcoef(torch.stack([own, PROBLEM.score]))[0, 1] > 0.999
        off = own - PROBLEM.score
        assert (off - off.mean()).abs().max() < 0.05


def test_a_reward_model_on_absolute_scores_recovers_them(tmp_path: Path) -> None:
    elements = [
        Labeled(PROBLEM.row(prompt, answer), float(score))
        for prompt in PROBLEM.prompts
        for answer, score in zip(PROBLEM.answers, PROBLEM.score, strict=True)
    ]
    assert (trained_scores("absolute", elements, tmp_path, 400) - PROBLEM.score).abs().max() < 0.01


# --- the critic, and GAE -------------------------------------------------------------------------------------------------


def state_values(token: Tensor) -> dict[tuple[int, tuple[int, ...]], float]:
    """V of every state: the expected score of the answers that go through it, from token log-probs (P, Y, T)."""
    chance, out = token.sum(-1).exp(), {}
    for prompt, answer_so_far in Tables(PROBLEM, token).states:
        through = [j for j, answer in enumerate(PROBLEM.answers) if answer[: len(answer_so_far)] == answer_so_far]
        weight = chance[prompt, through]
        out[prompt, answer_so_far] = float((weight * PROBLEM.score[through]).sum() / weight.sum())
    return out


def test_a_trained_critic_knows_the_enumerated_values(reference: Tensor, tmp_path: Path) -> None:
    method = compose.online(
        "ppo",
        kl_in_reward=None,
        num_generations=256,
        advantage={"gae_lambda": 1.0},
        value={"clip_range_vf": None},
        normalize_advantage=None,
        surrogate="unclipped",
    )
    roles = {"policy": Role("policy", PROBLEM.model(), True), "critic": Role("critic", PROBLEM.scorer(), True)}
    optims = {"policy": Optim(lr=1e-30), "critic": Optim(lr=0.01, schedule="cosine", min_lr_ratio=0.0)}
    learner = LocalLearner(roles, optims, total=140, budget=1 << 14)
    plan = online.OnlinePlan(140, 2, 512, canary=20, end_ids=(END,))
    table = Weighted("table", known.TableReward(PROBLEM))
    generator = LocalGenerator(roles["policy"], (END,), str)
    online.train(
        method,
        learner,
        generator,
        [table],
        PROBLEM.records(),
        Sampling(PROBLEM.longest),
        plan,
        RunFolder(tmp_path),
        quiet=True,
    )
    rows = [PROBLEM.row(prompt, answer) for prompt in PROBLEM.prompts for answer in PROBLEM.answers]
    value = learner.measure(Batch.of(rows), frozenset({"old_value"}))["old_value"]
    truth, chance = state_values(reference), reference.sum(-1).exp()
    off = torch.zeros(len(rows), PROBLEM.longest, dtype=torch.float64)
    for number, (i, answer) in enumerate((i, answer) for i in range(2) for answer in PROBLEM.answers):
        for t in range(len(answer)):
            off[number, t] = float(value[number, t]) - truth[i, answer[:t]]
    assert float((chance.flatten()[:, None] * off**2).sum() / 2) ** 0.5 < 0.03  # as often as states are visited
    assert float(off[0::21, 0].abs().max()) < 0.02  # the first state of each prompt


def test_gaes_bias_and_variance_at_the_extremes_of_lambda(reference: Tensor) -> None:
    """With a wrong critic: lambda 1 has no bias from it, lambda 0 has, and less variance; by enumeration."""
    token, answers = reference[0], PROBLEM.answers
    chance = token.sum(-1).exp()
    width = PROBLEM.longest
    mask = torch.tensor([[t < len(answer) for t in range(width)] for answer in answers])
    rewards = torch.zeros(len(answers), width, dtype=torch.float64)
    for j, answer in enumerate(answers):
        rewards[j, len(answer) - 1] = PROBLEM.score[j]
    truth = state_values(reference)
    wrong = torch.tensor(
        [[truth[0, a[:t]] + 0.3 * (t + 1) if t < len(a) else 0.0 for t in range(width)] for a in answers],
        dtype=torch.float64,  # the critic's error is then 0.3 to 1e-16, on every processor
    )
    first = {}
    for gae_lambda in (0.0, 1.0):
        advantage = gae(rewards, wrong, mask, gamma=1.0, gae_lambda=gae_lambda)[:, 0]
        for token_id in range(PROBLEM.vocabulary):  # what the first token is worth, over all that may follow
            own = [j for j, answer in enumerate(answers) if answer[0] == token_id]
            weight = chance[own] / chance[own].sum()
            mean = float((weight * advantage[own]).sum())
            spread = float((weight * (advantage[own] - mean) ** 2).sum())
            after = float((weight * PROBLEM.score[own]).sum())
            first[gae_lambda, token_id] = (mean - (after - (truth[0, ()] + 0.3)), spread)
    for token_id in range(PROBLEM.vocabulary):
        ends = token_id == END
        assert first[1.0, token_id][0] == pytest.approx(0.0, abs=1e-9)
        assert first[0.0, token_id][0] == pytest.approx(0.0 if ends else 0.6, abs=1e-6)  # the next state's error
        assert ends or first[0.0, token_id][1] < 1e-12 < first[1.0, token_id][1]


# --- truncated sampling: the gradient is that of the distribution that is drawn from ----------------------------------------


@pytest.mark.parametrize("options", [{"top_p": 0.6}, {"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.8, "temperature": 1.7}])
def test_the_gradient_under_truncation_is_that_of_what_is_sampled(options: dict) -> None:
    policy = Role("policy", PROBLEM.model().double(), True)
    generator = LocalGenerator(policy, (END,), str)
    sampling = Sampling(PROBLEM.longest, **options)
    groups = evaluate.answers(generator, PROBLEM.records()[:1] * 400, sampling)
    seen = {group.samples[0].ids: group.samples[0] for group in groups}
    samples = list(seen.values())
    chance = torch.tensor([sum(one.sampler_logp) for one in samples], dtype=torch.float64).exp()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-5)  # all that can be drawn were drawn
    assert len(samples) < len(PROBLEM.answers)
    score = torch.tensor([float(PROBLEM.score[PROBLEM.answers.index(one.ids)]) for one in samples]).double()

    rows = [PROBLEM.row(PROBLEM.prompts[0], one.ids) for one in samples]
    batch = Batch.of(rows).with_columns(
        support=pad_support([one.support for one in samples]),
        temperature=torch.full((len(rows),), sampling.temperature),
    )
    parameters = list(policy.model.parameters())

    def gradient(of: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(of, parameters, retain_graph=True)])

    # independent: d/dtheta of sum_y q(y) r(y), q by hand from the full logits and the tokens that may follow each prefix
    expected = torch.zeros((), dtype=torch.float64)
    for one, worth in zip(samples, score, strict=True):
        ids = torch.tensor([[*PROBLEM.prompts[0], *one.ids]])
        logits = policy.model(input_ids=ids, use_cache=False).logits[0] / sampling.temperature
        logp = torch.zeros((), dtype=torch.float64)
        for t, token in enumerate(one.ids):
            may = sorted({other.ids[t] for other in samples if other.ids[:t] == one.ids[:t]})
            own = logits[len(PROBLEM.prompts[0]) - 1 + t, may].log_softmax(-1)
            logp = logp + own[may.index(token)]
        expected = expected + logp.exp() * worth
    columns = read(policy, batch, frozenset({"logp", "full_logp"}))
    surrogate = (chance * score * columns["logp"].sum(1)).sum()
    untruncated = (chance * score * columns["full_logp"].sum(1)).sum()
    truth = gradient(expected)
    assert (gradient(surrogate) - truth).norm() < 1e-6 * truth.norm()
    assert (gradient(untruncated) - truth).norm() > 0.05 * truth.norm()  # the model's own log-prob is biased


# --- importance correction: answers of another policy, weighed -------------------------------------------------------------


def test_the_whole_answers_weight_corrects_for_another_sampler_and_the_tokens_does_not() -> None:
    """E over the sampler of weight x A grad log pi against the enumerated gradient of the policy's own expectation."""
    policy, sampler = Role("policy", PROBLEM.model().double(), True), PROBLEM.model(seed=7).double()
    rows = [PROBLEM.row(PROBLEM.prompts[0], answer) for answer in PROBLEM.answers]
    batch = Batch.of(rows)
    logp = read(policy, batch, frozenset({"logp"}))["logp"]
    other = PROBLEM.token_logp(sampler)[0]
    drawn = other.sum(-1).exp()  # how often the sampler gives each answer
    parameters = list(policy.model.parameters())

    def gradient(of: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(of, parameters, retain_graph=True)])

    truth = gradient((logp.sum(1).exp() * PROBLEM.score).sum())
    off = {}
    for weight in (sequence_weight, token_weight):
        kept = weight(logp.detach(), other, batch["mask"], cap=1e9)
        off[weight] = (
            gradient((drawn[:, None] * kept * PROBLEM.score[:, None] * logp).sum()) - truth
        ).norm() / truth.norm()
    assert off[sequence_weight] < 1e-6
    assert off[token_weight] > 0.05  # it forgets how likely the rest of the answer was
    plain = gradient((drawn[:, None] * PROBLEM.score[:, None] * logp).sum())
    assert (plain - truth).norm() > off[token_weight] * truth.norm()
    capped = sequence_weight(logp.detach(), other, batch["mask"], cap=1.5)
    assert (
        gradient((drawn[:, None] * capped * PROBLEM.score[:, None] * logp).sum()) - truth
    ).norm() > 0.01 * truth.norm()

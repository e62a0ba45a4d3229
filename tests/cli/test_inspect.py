"""Runs are looked into: a step is computed again to the bit, the first difference of two runs is found, shares sum to the loss."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from filelock import FileLock

import whet
from whet.data.files import sha256, write_json
from whet.errors import RecipeError, RunStopped
from whet.generate.local import LocalGenerator
from whet.loops import rollouts
from whet.loops.record import read_metrics

from .helpers import on_disk, one_message
from .helpers import whet as command

JUDGE = "def words(prompts, completions, **columns):\n    return [len(one.split()) - 0.3 * len(one) for one in completions]\n"
SFT = [
    {"prompt": a, "completion": f"{b} yes" if n % 3 else b}
    for n, (a, b) in enumerate(zip(tiny.WORDS, tiny.WORDS[1:], strict=False))
]
PAIRS = [
    {"prompt": a, "chosen": f"{b} please", "rejected": "no a b" if n % 2 else "no"}
    for n, (a, b) in enumerate(zip(tiny.WORDS, tiny.WORDS[1:], strict=False))
]
SAVED: dict[str, Any] = {"lr": 1e-2, "train.save_every": 2, "train.keep": 9}
ROWS: dict[str, Any] = {"num_steps": 4, "train.batch_size": 5, **SAVED}
ANSWERS: dict[str, Any] = {
    "data": "prompts.jsonl", "reward": "judge.py:words", "num_steps": 4, "prompts_per_step": 3, "max_new_tokens": 6, **SAVED,
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo, shared trunk": ("ppo", ANSWERS | {
        "trunk": "shared", "lora": {"rank": 2}, "rollout.mini_batch_size": 2, "rollout.ppo_epochs": 2}),
    "ppo, one update": ("ppo", ANSWERS | {"rollout.mini_batch_size": 3, "algorithm.advantage.gamma": 0.9}),
    "grpo, several updates": ("grpo", ANSWERS | {
        "num_generations": 4, "rollout.mini_batch_size": 6, "rollout.ppo_epochs": 2, "sampling.top_p": 0.9, "kl_in_loss": "exact"}),
    "remax": ("remax", ANSWERS | {
        "reward_normalization": "running", "kl_in_reward.controller": "adaptive", "kl_in_reward.target": 1}),
    "instructgpt": ("instructgpt", ANSWERS | {"rollout.mini_batch_size": 3, "ptx": "sft.jsonl", "ptx.batch_size": 2}),
    "online_dpo": ("online_dpo", ANSWERS | {"num_generations": 3}),
    "sft": ("sft", ROWS | {"data": "sft.jsonl", "eval": "sft.jsonl", "eval.every": 2, "train.dropout": 0.1}),
    "dpo": ("dpo", ROWS | {"data": "pairs.jsonl", "sft_weight": 0.5}),
    "reward": ("reward", ROWS | {"data": "pairs.jsonl"}),
}  # fmt: skip
"""Runs of four steps with checkpoints after two and four."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    tiny.folder(home / "m")
    tiny.write_jsonl(Path("sft.jsonl"), SFT)
    tiny.write_jsonl(Path("pairs.jsonl"), PAIRS)
    tiny.write_jsonl(Path("prompts.jsonl"), [{"prompt": word} for word in tiny.WORDS])
    Path("judge.py").write_text(JUDGE)
    yield home
    os.chdir(before)
    run.cache_clear()


@cache
def run(case: str) -> Path:
    """The folder of a run, trained once."""
    method, fields = RUNS[case]
    return whet.train(method, model="m", out=f"runs/{case.replace(' ', '_').replace(',', '')}", **fields)


def copy(case: str, to: Path) -> Path:
    return Path(shutil.copytree(run(case), to / "copy"))


def state(folder: Path) -> dict[str, Any]:
    """Every file below a folder with its content, and the time of its last change."""
    return {name: (content, (folder / name).stat().st_mtime_ns) for name, content in on_disk(folder).items()}


def logged(folder: Path, step: int) -> dict[str, float]:
    return next(row for row in read_metrics(folder) if row["step"] == step)


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RUNS)
def test_a_step_is_computed_again_to_the_bit_and_the_folder_is_only_read(home: Path, case: str) -> None:
    folder = run(case)
    before = state(folder)
    for step, begin in (
        (2, "no checkpoint before step 2 is there: computed from the start of the run; steps 1 to 2 were computed"),
        (4, "computed from the checkpoint of step 2; steps 3 to 4 were computed"),
    ):
        again = whet.replay(folder, step)
        assert again.equal, str(again)
        assert again.begin == begin
        line = {
            name: value
            for name, value in logged(folder, step).items()
            if name != "step" and "second" not in name and not name.startswith("eval/")
        }
        assert {name: now for name, _, now in again.numbers} == line
        assert again.verdict().startswith(f"step {step}: same bits, {len(line)} numbers")
        if (folder / "rollouts").is_dir():
            assert again.columns == len(rollouts.read(folder, step))
    assert state(folder) == before


def test_nothing_is_generated_or_scored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run("grpo, several updates")

    def never(*_: Any) -> Any:
        raise AssertionError("an answer was generated")

    monkeypatch.setattr(LocalGenerator, "generate", never)
    Path("judge.py").rename("gone.py")
    try:
        assert whet.replay(folder, 4).equal
    finally:
        Path("gone.py").rename("judge.py")


def test_answers_generated_ahead_are_computed_again_too(home: Path) -> None:
    fields = ANSWERS | {
        "num_generations": 2,
        "rollout.mini_batch_size": 3,
        "generator.max_staleness": 1,
        "out": "runs/ahead",
    }
    again = whet.replay(whet.train("grpo", model="m", **fields), 4)
    assert again.equal, str(again)
    assert {*again.left} == {"staleness", "staleness_max", "seconds", "seconds/generate", "tokens_per_second"}


def test_a_number_that_differs_is_named_with_both_values(home: Path, tmp_path: Path, capsys: Any) -> None:
    folder = copy("dpo", tmp_path)
    rows = read_metrics(folder)
    true = rows[3]["grad_norm/policy"]
    rows[3]["grad_norm/policy"] = math.nextafter(true, 99)  # one bit
    tiny.write_jsonl(folder / "metrics.jsonl", rows)
    said = command(capsys, "replay", folder, "--step", 4, "--quiet")
    assert said.status == 1
    assert said.out.splitlines()[0] == (
        f"step 4 differs in 1 of 12 numbers, the first is grad_norm/policy: logged {rows[3]['grad_norm/policy']!r}, recomputed {true!r}"
    )
    assert command(capsys, "replay", folder, "--step", 3, "--quiet").status == 0


def edited(folder: Path, step: int, column: str, row: int, position: int | None, value: Any) -> Any:
    """Change one number of a rollout, and return what was there."""
    path = rollouts.path_of(folder, step)
    table = pyarrow.parquet.read_table(path)
    cells = table[column].to_pylist()
    old = cells[row] if position is None else cells[row][position]
    if position is None:
        cells[row] = value
    else:
        cells[row][position] = value
    field = table.schema.get_field_index(column)
    pyarrow.parquet.write_table(table.set_column(field, column, pyarrow.array(cells)), path)
    return old


def test_a_record_that_was_changed_is_noticed(home: Path, tmp_path: Path) -> None:
    folder = copy("ppo, one update", tmp_path)
    old = edited(folder, 4, "advantage", 1, 2, 7.5)
    again = whet.replay(folder, 4)
    assert (again.differing, again.equal) == ([], False)
    assert again.verdict() == (
        f"step 4: the numbers are the same, the rollout differs at step 4, column advantage, row 1, position 2: 7.5 against {old!r}"
    )
    true = edited(folder, 4, "reward/words", 0, None, 0.25)  # from which the step is computed
    again = whet.replay(folder, 4)
    assert again.differing[0][0] == "score"
    assert again.differing[0][2] - again.differing[0][1] == pytest.approx((0.25 - true) / 3, abs=1e-6)
    edited(folder, 4, "sampler_logp", 0, 0, -9.0)
    with pytest.raises(
        RunStopped, match="generator and learner disagree"
    ):  # the checks of a run are those of its replay
        whet.replay(folder, 4)


def test_a_torn_checkpoint_is_not_used(home: Path, tmp_path: Path) -> None:
    folder = copy("sft", tmp_path)
    (folder / "checkpoints" / "step-00000002" / "learner" / "policy.safetensors").write_bytes(b"torn")
    again = whet.replay(folder, 3)
    assert again.equal
    assert again.begin.startswith("no checkpoint before step 3 is there: computed from the start of the run")


def test_inputs_that_changed_or_are_missing_are_refused_by_name(home: Path) -> None:
    folder, file = run("sft"), Path("sft.jsonl")
    before = file.read_text()
    try:
        tiny.write_jsonl(file, SFT[::-1])
        with pytest.raises(
            RecipeError, match=r"data.train: sft.jsonl: the file has changed since the run began; restore it"
        ):
            whet.replay(folder, 2)
        assert not whet.replay(folder, 2, accept_changed="data.train").equal
        file.unlink()
        with pytest.raises(
            RecipeError, match=r"sft.jsonl: the file is not there; paths are relative to the current folder"
        ):
            whet.why(folder, 2)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("replay", "{run}", "--step", 9), ["--step 9", "it has the steps 1 to 4"]),
        (("replay", "{run}", "--step", "two"), ["expected the number of a step, from 1, got 'two'"]),
        (("replay", "{run}"), ["which step?"]),
        (("replay", "m", "--step", 1), ["m: no run is there"]),
        (("why", "{run}", "--step", 1, "--sample", 5, "--quiet"), ["--sample 5: step 1 has 5 samples, 0 to 4"]),
        (("why", "{run}", "--step", 1, "--sample", -1, "--quiet"), ["--sample -1: step 1 has 5 samples"]),
        (("why", "{run}", "--stop", 1), ["unknown option 'stop'; it has --step, --sample, --accept-changed"]),
        (("diff", "{run}"), ["expected whet diff RUN_A RUN_B"]),
        (("diff", "{run}", "nowhere"), ["nowhere: no run is there"]),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_into_is_refused_in_one_line(
    home: Path, capsys: Any, words: tuple[Any, ...], told: list[str]
) -> None:
    said = command(capsys, *(run("sft") if word == "{run}" else word for word in words))
    assert (said.status, said.out) == (2, "")
    one_message(said.error, told)


def test_a_session_that_trains_there_is_a_caution(home: Path, capsys: Any) -> None:
    folder = run("sft")
    with FileLock(folder / ".lock"):
        assert whet.replay(folder, 1).equal
    told = capsys.readouterr().err
    assert told == f"whet: a session is training in {folder}; its checkpoints may be removed in the meantime\n"
    assert whet.replay(folder, 1).equal
    assert capsys.readouterr().err == ""


# --- why -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RUNS)
def test_the_shares_sum_to_the_logged_loss(home: Path, case: str) -> None:
    """To rounding: 1e-5 of the sum of the sizes, since losses of both signs cancel; most are 1e-5 of the loss itself."""
    folder = run(case)
    line = logged(folder, 4)
    losses = [line["loss"]] if "loss" in line else [value for name, value in line.items() if name.startswith("loss/")]
    result = whet.why(folder, 4)
    assert result.equal
    total = math.fsum(row["share"] for row in result.samples) + math.fsum(result.shares.others.values())
    assert total == pytest.approx(sum(losses), rel=1e-5, abs=1e-7)
    assert result.shares.others.keys() == ({"policy/ptx/ptx"} if case == "instructgpt" else set())
    for label in result.shares.logged:
        own = [row[f"share {label}"] for row in result.samples if f"share {label}" in row]
        if own:
            assert math.fsum(own) == pytest.approx(result.shares.logged[label], abs=1e-5 * sum(map(abs, own)))
    shown = str(result).splitlines()
    assert shown[-len(result.samples) - 1].split()[0] == "sample"
    first = max(result.samples, key=lambda row: abs(row["share"]))
    assert shown[-len(result.samples)].split()[0] == str(first["sample"])


def rendered(messages: list[dict[str, str]]) -> list[int]:
    text = tiny.tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=len(messages) == 1)
    return list(tiny.tokenizer()(text, add_special_tokens=False).input_ids)


def test_the_share_of_a_token_of_sft_is_its_loss_over_all_tokens(home: Path) -> None:
    """The first update, by transformers alone."""
    from transformers import AutoModelForCausalLM

    folder = whet.train("sft", model="m", data="sft.jsonl", out="runs/plain", num_steps=1, batch_size=4, lr=1e-3)
    model, results = AutoModelForCausalLM.from_pretrained("m"), [whet.why(folder, 1, sample) for sample in range(4)]
    tokens = sum(len(one.tokens) for one in results)
    for sample, result in enumerate(results):
        prompt = rendered([{"role": "user", "content": SFT[result.samples[sample]["element"]]["prompt"]}])
        own = [row["id"] for row in result.tokens]
        assert tiny.tokenizer().decode(own) == SFT[result.samples[sample]["element"]]["completion"] + " <end>"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1].double()
        expected = -logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)] / tokens
        assert [row["share policy/train/nll"] for row in result.tokens] == pytest.approx(expected.tolist(), rel=1e-4)
        assert result.samples[sample]["share"] == pytest.approx(float(expected.sum()), rel=1e-4)


def test_the_share_of_a_pair_is_the_dpo_loss_of_its_log_ratios_over_all_pairs(home: Path) -> None:
    for sample in range(4):  # the last batch of an epoch of 19 pairs
        result = whet.why(run("dpo"), 4, sample)
        assert len(result.samples) == 4
        gaps = [sum(row["log_ratio"] for row in result.tokens if row["row"] == side) for side in (0, 1)]
        for row in result.tokens:
            assert row["log_ratio"] == pytest.approx(row["logp"] - row["ref_logp"], abs=1e-5)
        own = result.samples[sample]
        loss = math.log1p(math.exp(-0.1 * (gaps[0] - gaps[1])))
        assert own["share policy/train/sigmoid"] == pytest.approx(loss / len(result.samples), rel=1e-4)
        chosen = [row for row in result.tokens if row["row"] == 0]
        nll = math.fsum(row["share policy/train/sft"] for row in result.tokens)
        trained = sum(int(length.split(" / ")[0]) for length in (one["length"] for one in result.samples))
        assert nll == pytest.approx(-0.5 * sum(row["logp"] for row in chosen) / trained, rel=1e-4)
        assert all(row["share policy/train/sft"] == 0 for row in result.tokens if row["row"] == 1)


def test_the_columns_of_an_answer_of_ppo_are_those_of_its_definitions(home: Path) -> None:
    """One update, so the ratio is 1 and the value is the old one."""
    folder = run("ppo, one update")
    table, results = rollouts.read(folder, 3), [whet.why(folder, 3, sample) for sample in range(3)]
    tokens = sum(len(one.tokens) for one in results)
    whole = [row for one in results for row in one.tokens]
    for sample, result in enumerate(results):
        rows, values = result.tokens, [row["value"] for row in result.tokens] + [0.0]
        assert [row["id"] for row in rows] == table["completion_ids"][sample]
        assert values[:-1] == table["old_value"][sample]
        kl = [old - ref for old, ref in zip(table["old_logp"][sample], table["ref_logp"][sample], strict=True)]
        assert [row["kl"] for row in rows] == pytest.approx(kl, abs=1e-6)
        reward = [-0.05 * one for one in kl]
        reward[-1] += table["reward/words"][sample]
        assert [row["reward"] for row in rows] == pytest.approx(reward, abs=1e-6)
        td = [one + 0.9 * values[t + 1] - values[t] for t, one in enumerate(reward)]
        assert [row["td_error"] for row in rows] == pytest.approx(td, abs=1e-5)
        gae = [sum((0.9 * 0.95) ** (later - t) * td[later] for later in range(t, len(td))) for t in range(len(td))]
        for t, row in enumerate(rows):
            assert (row["ratio"], row["clipped"], row["trained"]) == (1.0, False, True)
            assert row["advantage"] == table["advantage"][sample][t]
            assert row["share policy/rollout/clip"] == pytest.approx(-row["advantage"] / tokens, rel=1e-5)
            assert row["share critic/rollout/value_loss"] == pytest.approx(
                0.5 * gae[t] ** 2 / tokens, rel=1e-3, abs=1e-7
            )
            assert row["share"] == pytest.approx(
                row["share policy/rollout/clip"] + row["share critic/rollout/value_loss"]
            )
        assert result.samples[sample]["score"] == pytest.approx(table["reward/words"][sample])
    assert math.fsum(row["share policy/rollout/clip"] for row in whole) == pytest.approx(
        logged(folder, 3)["loss/policy/rollout/clip"], abs=1e-7
    )


def test_with_several_updates_a_share_is_of_their_mean_and_the_ratio_is_of_the_first(home: Path) -> None:
    folder = run("grpo, several updates")
    result = whet.why(folder, 4, 3)
    lines = [line for line in result.heading if line.startswith("update ")]
    assert len(lines) == 2  # two epochs of two mini-batches each
    label = "policy/rollout/clip"
    each = [float(line.partition(f"{label} ")[2].partition(",")[0]) for line in lines]
    assert result.samples[3][f"share {label}"] == pytest.approx(sum(each) / 4, rel=1e-4)
    for row in result.tokens:
        assert row["clipped"] == (
            (row["ratio"] > 1.2 and row["advantage"] > 0) or (row["ratio"] < 0.8 and row["advantage"] < 0)
        )


def test_the_answers_of_a_pair_are_named_by_their_rows_in_the_rollout(home: Path) -> None:
    folder = run("online_dpo")
    table, result = rollouts.read(folder, 4), whet.why(folder, 4)
    for row in result.samples:
        best, worst = (int(one) for one in row["answers"].split(" / "))
        own = [table["score"][n] for n, group in enumerate(table["group"]) if group == table["group"][best]]
        assert (table["score"][best], table["score"][worst]) == (max(own), min(own))
        assert table["group"][best] == table["group"][worst]


def test_the_command_prints_the_tokens_and_changes_nothing(home: Path, capsys: Any) -> None:
    folder = run("sft")
    before = state(folder)
    said = command(capsys, "why", folder, "--step", 2, "--sample", 1, "--quiet")
    assert (said.status, said.error) == (0, "")
    result = whet.why(folder, 2, 1)
    assert said.out == f"{result}\n"
    assert said.out.splitlines()[-1].split()[:4] == [str(len(result.tokens) - 1), "6", "'<end>'", "yes"]
    assert state(folder) == before


# --- diff ------------------------------------------------------------------------------------------------------------


def test_a_run_repeated_has_no_difference(home: Path, capsys: Any) -> None:
    method, fields = RUNS["online_dpo"]
    again = whet.train(method, model="m", out="runs/again", **fields)
    said = command(capsys, "diff", run("online_dpo"), again)
    assert (said.status, said.error) == (0, "")
    assert said.out.splitlines() == [
        "no difference in 4 steps",
        *(f"  {part}: no difference" for part in ("rollouts", "metrics", "checkpoints", "model")),
    ]


def test_two_seeds_part_at_their_first_prompts_and_the_recipes_differ_in_the_seed(home: Path) -> None:
    method, fields = RUNS["online_dpo"]
    other = whet.train(method, model="m", out="runs/seed", seed=5, **fields)
    found = whet.diff(run("online_dpo"), other)
    assert found.recipe == [("seed", 0, 5)]
    assert not found.equal
    ours, theirs = (rollouts.read(one, 1)["prompt_ids"] for one in (run("online_dpo"), other))
    row = next(n for n in range(9) if ours[n] != theirs[n])
    position = next(n for n in range(9) if ours[row][n] != theirs[row][n])
    assert str(found).splitlines()[0] == (
        f"the runs part at step 1, column prompt_ids, row {row}, position {position}: {ours[row][position]} against {theirs[row][position]}"
    )


def test_the_first_step_stage_row_and_position_is_named(home: Path, tmp_path: Path, capsys: Any) -> None:
    folder = copy("ppo, one update", tmp_path)
    edited(folder, 3, "advantage", 0, 0, 1.0)  # of a later stage
    edited(folder, 4, "completion_ids", 0, 0, 1)  # of a later step
    edited(folder, 3, "sampler_logp", 2, 1, -1.0)
    old = edited(folder, 3, "sampler_logp", 1, 2, -1.5)
    said = command(capsys, "diff", run("ppo, one update"), folder)
    assert said.status == 1
    assert (
        said.out.splitlines()[0]
        == f"the runs part at step 3, column sampler_logp, row 1, position 2: {old!r} against -1.5"
    )
    rows = read_metrics(folder)
    rows[1]["score"] = 0.25
    tiny.write_jsonl(folder / "metrics.jsonl", rows)
    true = logged(run("ppo, one update"), 2)["score"]
    first = str(whet.diff(run("ppo, one update"), folder)).splitlines()[0]
    assert first == f"the runs part at step 2, metric score: {true!r} against 0.25"


def test_a_tensor_of_a_checkpoint_or_of_the_model_is_named(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy("sft", tmp_path)

    def change(path: Path) -> tuple[float, float]:
        tensors = load_file(path)
        old = float(tensors["model.norm.weight"][3])
        tensors["model.norm.weight"][3] += 0.5
        save_file(tensors, path, metadata={"format": "pt"})
        return old, float(tensors["model.norm.weight"][3])

    values = change(folder / "model" / "model.safetensors")
    where = "tensor model.norm.weight, 1 of 32 numbers, the first at [3]"
    found = whet.diff(run("sft"), folder)
    assert str(found.parting) == f"in the exported model, model, model, {where}: {values[0]!r} against {values[1]!r}"
    saved = folder / "checkpoints" / "step-00000002"
    values = change(saved / "learner" / "policy.safetensors")
    assert whet.diff(run("sft"), folder).parts["checkpoints"] is None  # not complete, so nothing would load it
    sums = json.loads((saved / "manifest.json").read_text())
    write_json(
        saved / "manifest.json", sums | {"learner/policy.safetensors": sha256(saved / "learner" / "policy.safetensors")}
    )
    found = whet.diff(run("sft"), folder)
    assert str(found.parting) == f"at step 2, checkpoint, policy, {where}: {values[0]!r} against {values[1]!r}"


def test_a_shorter_run_is_no_equal_one(home: Path, tmp_path: Path, capsys: Any) -> None:
    folder = copy("sft", tmp_path)
    tiny.write_jsonl(folder / "metrics.jsonl", read_metrics(folder)[:4])  # the start, and three steps
    said = command(capsys, "diff", run("sft"), folder)
    assert said.status == 1
    assert said.out.splitlines()[0] == "no difference in 3 steps; the first run has 4 steps, the second 3"


# --- a step without trained tokens -------------------------------------------------------------------------------------


def test_a_skipped_rollout_is_computed_again_and_adds_nothing(home: Path, capsys: Any) -> None:
    masked = ANSWERS | {"prompts_per_step": 1, "num_generations": 2, "max_new_tokens": 1, "truncated": {"rule": "mask"}}
    folder = whet.train("grpo", model="m", out="runs/skipped", **masked)
    assert "all 2 answers are truncated and masked (truncated.rule)" in capsys.readouterr().err
    step = next(row["step"] for row in read_metrics(folder) if row["truncated"] == 1.0)
    assert not any(name.startswith("loss/") for name in logged(folder, step))
    again = whet.replay(folder, step)
    assert again.equal, str(again)
    explained = whet.why(folder, step, sample=1)
    assert explained.equal
    assert "no update was made" in explained.heading[0]
    assert {row["share"] for row in explained.samples} == {0.0}

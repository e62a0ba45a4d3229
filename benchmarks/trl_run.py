"""TRL on one line of the benchmark, in an environment of its own: python -m benchmarks.trl_run ALGORITHM SIZE --world DIR.

Flags: `bf16`, `gc` (gradient checkpointing), `grouplen` (group by length), `pack`, `precompute` (reference of DPO), `defaults`
(TRL's own: bf16 and gradient checkpointing). The default is float32 without checkpointing. PPO is not in TRL after 1.12:
PYTHONPATH then points to a folder with trl 1.12.0. `generation` is `generate` of transformers, which TRL calls.
"""

# ruff: noqa: E402 (threads and environment are set before torch is imported)

from benchmarks.job import Job, job_of

JOB = job_of(__doc__ or "")

import os
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from benchmarks import world

torch.set_num_threads(1)
METER = JOB.meter()


class Taken:
    """The row numbers that the trainer took, in order of first use."""

    def __init__(self) -> None:
        self.numbers: dict[int, None] = {}
        self.on = False
        inner = datasets.Dataset.__getitems__

        def getitems(data: Any, keys: list[int]) -> Any:
            if self.on:
                self.numbers |= dict.fromkeys(int(key) for key in keys)
            return inner(data, keys)

        datasets.Dataset.__getitems__ = getitems


class Clock(TrainerCallback):
    """End a step of the meter where TRL ends one; `count` returns its (samples, tokens, prompt tokens, answer tokens)."""

    def __init__(self, count: Any) -> None:
        self.count = count

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Start the clock."""
        METER.begin()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """End a step."""
        samples, tokens, prompts, answers = self.count()
        METER.step(samples, tokens, prompt_tokens=prompts, answer_tokens=answers)

    def on_optimizer_step(self, *given: Any, **named: Any) -> None:
        """Count an update."""
        METER.updates += 1


class Counted:
    """Count rows and real tokens of what the trainer gives to the model, and keep the loss of each update."""

    def __init__(self, pairs: bool) -> None:
        self.pairs, self.samples, self.tokens, self.loss = pairs, 0, 0, 0.0

    def attach(self, trainer: Any) -> None:
        """Count in `training_step`. Its result is the micro-batch's share of the loss of the update."""
        inner = trainer.training_step

        def outer(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            self.see(inputs)
            with METER.phase("update"):
                loss = inner(model, inputs, *given, **named)
            self.loss += float(loss.detach())
            return loss

        trainer.training_step = outer

    def see(self, inputs: Any) -> None:
        """Count one micro-batch. Packed rows begin where their positions do."""
        packed = inputs.get("position_ids")
        rows = int((packed == 0).sum()) if packed is not None else len(inputs["input_ids"])
        self.samples += rows // 2 if self.pairs else rows
        mask = inputs.get("attention_mask")
        self.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()

    def __call__(self) -> tuple[int, int, int, int]:
        """Return the numbers of the step and begin the next one."""
        out = (self.samples, self.tokens, 0, 0)
        METER.losses.append(self.loss)
        self.samples, self.tokens, self.loss = 0, 0, 0.0
        return out


class Answers:
    """Count prompt and answer tokens of a step; also the reward function of the online methods."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.tokenizer, self.reward = tokenizer, world.topic_reward(job.world)
        self.samples = self.prompt_tokens = self.answer_tokens = 0

    def score(self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **named: Any) -> Any:
        """Count the answers and score them."""
        self.samples += len(prompts)
        length = {one: len(self.tokenizer(one)["input_ids"]) for one in set(prompts)}
        self.prompt_tokens += sum(length[one] for one in prompts)
        self.answer_tokens += sum(map(len, completion_ids))
        return self.reward(prompts, completions)

    def __call__(self) -> tuple[int, int, int, int]:
        """Return the numbers of the step and begin the next one."""
        out = (self.samples, 0, self.prompt_tokens, self.answer_tokens)
        self.samples = self.prompt_tokens = self.answer_tokens = 0
        return out


def arguments(job: Job, out: str, **more: Any) -> dict[str, Any]:
    """Return the trainer arguments that all lines share."""
    options = {
        "output_dir": out, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "learning_rate": job.work.lr, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "use_cpu": job.device == "cpu", "dataloader_num_workers": 0, "per_device_train_batch_size": job.work.micro,
    }  # fmt: skip
    if "defaults" not in job.flags:
        options |= {"gradient_checkpointing": "gc" in job.flags, "bf16": "bf16" in job.flags or job.device != "cpu"}
    if "grouplen" in job.flags:
        options["train_sampling_strategy"] = "group_by_length"
    return options | more


def offline(job: Job, out: str) -> Any:
    """Return the trainer of sft, reward or dpo."""
    work, kind = job.work, job.algorithm
    rows = datasets.Dataset.from_list(job.rows("sft" if kind == "sft" else "pref", work.rows))
    steps = {"gradient_accumulation_steps": work.batch // work.micro, "num_train_epochs": 1, "max_length": work.max_len}
    count = Counted(pairs=kind != "sft")
    tokenizer = AutoTokenizer.from_pretrained(job.world / "model")
    if kind == "sft":
        config: Any = trl.SFTConfig(**arguments(job, out, **steps, packing="pack" in job.flags))
        make: Any = trl.SFTTrainer
    elif kind == "reward":
        config, make = trl.RewardConfig(**arguments(job, out, **steps)), trl.RewardTrainer
    else:
        early = {"precompute_ref_log_probs": "precompute" in job.flags, "beta": work.beta}
        config, make = trl.DPOConfig(**arguments(job, out, **steps, **early)), trl.DPOTrainer
    model = str(job.world / ("rm" if kind == "reward" else "model"))
    trainer = make(model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock(count)])
    count.attach(trainer)
    return trainer


def grouped(job: Job, out: str) -> Any:
    """Return the trainer of grpo or rloo."""
    work = job.work
    options: dict[str, Any] = {
        "num_generations": work.answers, "max_completion_length": work.max_new, "beta": work.kl, "num_iterations": 1,
        "gradient_accumulation_steps": work.prompts * work.answers // work.micro, "max_steps": work.steps,
        "temperature": 1.0,
    }  # fmt: skip
    if job.fixed:
        options["generation_kwargs"] = {"min_new_tokens": work.max_new}
    grpo = job.algorithm == "grpo"
    config = (trl.GRPOConfig if grpo else trl.RLOOConfig)(**arguments(job, out, **options))
    tokenizer = AutoTokenizer.from_pretrained(job.world / "model")
    count = Answers(job, tokenizer)
    trainer = (trl.GRPOTrainer if grpo else trl.RLOOTrainer)(
        model=str(job.world / "model"), reward_funcs=count.score, args=config,
        train_dataset=datasets.Dataset.from_list(job.rows("prompts")), processing_class=tokenizer,
        callbacks=[Clock(count)],
    )  # fmt: skip
    METER.timed(trainer, "_generate_single_turn", "generate")
    METER.timed(trainer, "_calculate_rewards", "score")
    METER.timed(trainer.accelerator, "backward", "backward")
    _by_gradient(trainer, "_get_per_token_logps_and_entropies", "forward", "measure")
    return trainer


def _by_gradient(owner: Any, name: str, learning: str, measuring: str) -> None:
    """Time a function as one phase where gradients are computed, and as another where they are not."""
    inner = getattr(owner, name)

    def outer(*given: Any, **named: Any) -> Any:
        with METER.phase(learning if torch.is_grad_enabled() else measuring):
            return inner(*given, **named)

    setattr(owner, name, outer)


def ppo(job: Job, out: str) -> Any:
    """Return the trainer of ppo."""
    try:
        import trl.experimental.ppo.ppo_trainer as module
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as error:
        raise SystemExit(f"trl {trl.__version__} has no PPOTrainer ({error}); put trl 1.12.0 on PYTHONPATH") from error
    work, where = job.work, str(job.world)
    tokenizer = AutoTokenizer.from_pretrained(f"{where}/model", padding_side="left")
    data = datasets.Dataset.from_list(
        [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in job.rows("prompts")]
    )
    config = PPOConfig(**arguments(
        job, out, gradient_accumulation_steps=work.prompts // work.micro, total_episodes=work.steps * work.prompts,
        num_ppo_epochs=work.epochs, num_mini_batches=1, local_rollout_forward_batch_size=work.prompts,
        response_length=work.max_new, stop_token="eos", temperature=1.0, kl_coef=work.kl, num_sample_generations=0,
    ))  # fmt: skip
    policy, reference = (AutoModelForCausalLM.from_pretrained(f"{where}/model", dtype=torch.float32) for _ in range(2))
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(f"{where}/rm", dtype=torch.float32) for _ in range(2)
    )
    count = Answers(job, tokenizer)
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=critic, train_dataset=data, callbacks=[Clock(count)],
    )  # fmt: skip
    _ppo_meter(job, module, trainer, tokenizer, count)
    return trainer


def _ppo_meter(job: Job, module: Any, trainer: Any, tokenizer: Any, count: Answers) -> None:
    """Time the stages of TRL's PPO, and count its answers and updates."""
    inner, step = module.batch_generation, trainer.optimizer.step

    def batch_generation(model: Any, queries: Any, size: int, pad: int, config: Any) -> Any:
        if job.fixed:
            config.min_new_tokens = job.work.max_new
        with METER.phase("generate"):
            out, logits = inner(model, queries, size, pad, config)
        answers = out[:, queries.shape[1] :]
        ends = (answers == tokenizer.eos_token_id).int()
        length = torch.where(ends.any(1), ends.argmax(1) + 1, answers.shape[1])
        count.samples += len(queries)
        count.answer_tokens += int(length.sum())
        count.prompt_tokens += int((queries != pad).sum())
        return out, logits

    def stepped(*given: Any, **named: Any) -> Any:
        METER.updates += bool(trainer.accelerator.sync_gradients)
        with METER.phase("optimizer"):
            return step(*given, **named)

    module.batch_generation, trainer.optimizer.step = batch_generation, stepped
    _by_gradient(module, "forward", "forward", "measure")
    METER.timed(module, "get_reward", "score and value")
    METER.timed(trainer.accelerator, "backward", "backward")


def generation(job: Job) -> None:
    """Run `generate` of transformers on left-padded prompts, each repeated for its answers."""
    work = job.work
    tokenizer = AutoTokenizer.from_pretrained(job.world / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job.world / "model", dtype=torch.float32).eval()
    end, prompts = tokenizer.eos_token_id, [tokenizer(row["prompt"])["input_ids"] for row in job.rows("prompts")]
    least = {"min_new_tokens": work.max_new} if job.fixed else {}
    METER.begin()
    for step in range(work.steps):
        asked = prompts[step * work.prompts : (step + 1) * work.prompts]
        given = tokenizer.pad({"input_ids": [one for one in asked for _ in range(work.answers)]}, return_tensors="pt")
        torch.manual_seed(step)
        with torch.inference_mode():
            out = model.generate(
                **given, max_new_tokens=work.max_new, do_sample=True, top_k=0, temperature=1.0, **least
            )
        rows = out[:, given["input_ids"].shape[1] :].tolist()
        count = sum(row.index(end) + 1 if end in row else len(row) for row in rows)
        METER.step(len(rows), count, answer_tokens=count)


def main() -> None:
    """Run the job and print its result."""
    taken = Taken()
    if JOB.algorithm == "generation":
        generation(JOB)
    else:
        with tempfile.TemporaryDirectory() as out:
            make = {"ppo": ppo, "grpo": grouped, "rloo": grouped}.get(JOB.algorithm, offline)
            trainer = make(JOB, out)
            taken.on = True
            trainer.train()
    JOB.done("trl", METER, order=list(taken.numbers))


if __name__ == "__main__":
    main()

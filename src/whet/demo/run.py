"""The stages of the demo: base, SFT, K answers, ranking, reward model, PPO-ptx, evaluation with gold scores, report.

Each stage is a command of whet with a recipe from `recipes/`, on the data and the judge of the demo world. Side runs use a
second core at the same time: over-optimization of a small reward model, and PPO without ptx.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import whet
from whet.data.files import write_jsonl
from whet.demo import judge, world
from whet.demo.tell import tell
from whet.errors import RecipeError, WhetError
from whet.models.load import quiet
from whet.runs import config
from whet.terminal import say

RECIPES = Path(__file__).parent / "recipes"
GOLD = "whet.demo.judge:gold"
ANNOTATOR = "whet.demo.run:annotator"
ANSWER = 56
"""maximum length of an answer in tokens"""
WATCHED, REST = "prompts_watched.jsonl", "prompts_rest.jsonl"
"""the quarter of the held-out prompts on which runs are evaluated while they train, and the others"""
PATIENCE = 3
"""number of evaluations without improvement after which the run with early stopping ends"""
SMALL = 150
"""number of rankings for the reward model that is over-optimized"""
QUICK_SIZES = world.Sizes(320, 40, 320, 40, 64, 32, 64, 32)
"""rows of the world for `quick`, which only tests that everything runs"""


def demo(options: Mapping[str, Any]) -> int:
    """Run all stages into `out` for one seed, print the table, and write summary.json and report.html.

    `quick` is a short run on a small world. It only tests that everything runs.
    """
    known = {"seed": 0, "out": "runs/demo", "quick": False}
    for name in options:
        if name not in known:
            raise config.unknown(name, list(known))
    seed, out = options.get("seed", 0), Path(options.get("out", "runs/demo"))
    if not isinstance(seed, int) or seed < 0:
        raise RecipeError(f"seed: expected an integer of at least 0, got {seed!r}")
    if out.exists():
        _set_aside(out)
    began = time.perf_counter()
    quiet()
    story = Story(out, seed, quick=bool(options.get("quick", False)))
    story.prepare()
    story.rank()
    with Side(story) as side:
        story.over_optimize(side)
        story.reinforce(side)
        measured = story.evaluate(side)
    numbers = measured | {"seconds": round(time.perf_counter() - began, 1)}
    tell(out, numbers)
    return 0


def _set_aside(out: Path) -> None:
    """Rename the folder of an earlier demo, so that it is kept. Raise RecipeError for any other folder."""
    if not (out / "world").is_dir():
        raise RecipeError(f"out: {out} already exists and is not an earlier demo; choose another folder with --out")
    number = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}.{n}").exists())
    out.rename(out.with_name(f"{out.name}.{number}"))
    say(f"the earlier demo is now in {out.with_name(f'{out.name}.{number}')}", error=True)


class Story:
    """The stages. Each writes its folder or file to `out`."""

    def __init__(self, out: Path, seed: int, *, quick: bool = False) -> None:
        self.out, self.seed, self.quick, self.world = out, seed, quick, out / "world"

    def prepare(self) -> None:
        """Write the files of the world, and train the base model and the SFT model."""
        self.say("the market desk: texts, demonstrations, prompts")
        world.write_world(self.world, self.seed, QUICK_SIZES if self.quick else world.Sizes())
        prompts = read(self.world / "prompts_eval.jsonl")
        write_jsonl(self.world / WATCHED, prompts[: len(prompts) // 4])
        write_jsonl(self.world / REST, prompts[len(prompts) // 4 :])
        self.say("base: pre-training on the desk's raw text")
        self.verb("pretrain", "base", model=self.at("base"), data=self.at("raw.jsonl"))
        self.say("sft: demonstrations")
        evaluation = {"eval": self.at("demonstrations_heldout.jsonl")}
        self.verb("sft", "sft", model=self.model("base"), data=self.at("demonstrations.jsonl"), **evaluation)

    def rank(self) -> None:
        """Sample K = 4 answers per prompt from SFT and rank them with noise. In some rankings one answer is edited."""
        self.say("four answers a prompt, ranked by the noisy person")
        for name in ("prompts_rank", "prompts_rank_heldout"):
            sampled = self.out / f"{name}_answers.jsonl"
            whet.sample(model=self.model("sft"), data=self.at(f"{name}.jsonl"), num_generations=4, seed=self.seed, threads=1,
                max_new_tokens=ANSWER, out=str(sampled),
            )  # fmt: skip
        answers = read(self.out / "prompts_rank_answers.jsonl")
        edited = [with_edit(row, self.seed) for row in answers]
        heldout = read(self.out / "prompts_rank_heldout_answers.jsonl")
        for name, rows in (("ranked", edited), ("small_ranked", answers[:SMALL]), ("heldout_ranked", heldout)):
            asked = self.out / f"{name}_asked.jsonl"
            write_jsonl(asked, [{**row, "seed": self.seed} for row in rows])
            whet.rank(data=str(asked), judge=ANNOTATOR, judge_form="rank", out=str(self.out / f"{name}.jsonl"))
        whet.rank(
            data=str(self.out / "heldout_ranked_asked.jsonl"),
            judge=GOLD,
            out=str(self.out / "heldout_gold.jsonl"),
        )

    def over_optimize(self, side: "Side") -> None:
        """Start side runs: a reward model from few rankings, PPO against it without a KL penalty, and the same PPO with early
        stopping on the gold scores of held-out prompts."""
        side.add("reward", "small_reward", model=self.model("sft"), data=str(self.out / "small_ranked.jsonl"))
        held_out = self.against("small_reward") | {"eval": self.at(WATCHED)}
        side.add("ppo", "over_optimized", **held_out)
        side.add("ppo", "early_stopped", "over_optimized", **held_out, **{"eval.early_stop": str(PATIENCE)})

    def reinforce(self, side: "Side") -> None:
        """Train the reward model, and PPO-ptx from the SFT model, with a critic from the reward model, on separate prompts."""
        self.say("reward: the reward model, K-way")
        self.verb("reward", "reward", model=self.model("sft"), data=str(self.out / "ranked.jsonl"))
        side.add("ppo", "ppo_without_ptx", **self.against("reward"))
        self.say("ppo: PPO-ptx against the reward model")
        self.verb(
            "instructgpt", "ppo", **self.against("reward"), ptx=self.at("raw.jsonl"), eval=self.at("prompts_eval.jsonl")
        )

    def evaluate(self, side: "Side") -> dict[str, Any]:
        """Return all numbers of the report, measured on held-out prompts and texts."""
        self.say("evaluation under gold")
        heldout = {"noisy": "heldout_ranked", "noise_free": "heldout_gold"}
        accuracy = {
            name: whet.evaluate(model=self.model("reward"), data=str(self.out / f"{file}.jsonl"), threads=1)["accuracy"]
            for name, file in heldout.items()
        }
        models = {name: self.compared(name) for name in ("base", "ppo")}
        raw = {name: self.raw_loss(name) for name in ("sft", "ppo")}
        edits = self.edits()
        side.wait()
        raw["ppo_without_ptx"] = self.raw_loss("ppo_without_ptx")
        models["early_stopped"] = self.compared("early_stopped", "best", REST)
        return {
            "seed": self.seed, "accuracy": accuracy, "ceiling": ceiling(read(self.out / "heldout_gold.jsonl"), self.seed),
            "models": models, "raw": raw, "edits": edits,
        }  # fmt: skip

    def compared(self, name: str, which: str = "model", prompts: str = "prompts_eval.jsonl") -> dict[str, float]:
        """Compare a model with SFT: gold, reward model, KL and win rates. Write the answers to `answers_NAME.jsonl`."""
        return whet.evaluate(
            model=str(self.out / name / which), against=self.model("sft"), judge=[GOLD, self.model("reward")], seed=self.seed,
            data=self.at(prompts), max_new_tokens=ANSWER, threads=1, answers=str(self.out / f"answers_{name}.jsonl"),
        )  # fmt: skip

    def raw_loss(self, name: str) -> float:
        """Return the loss on held-out raw text in nats per token."""
        return whet.evaluate(model=self.model(name), data=self.at("raw_heldout.jsonl"), threads=1)["nll"]

    def edits(self) -> dict[str, tuple[float, int]]:
        """Return, for each controlled edit, (share of edited SFT answers that the reward model rates worse, their number)."""
        rows, kinds = [], []
        for row in read(self.out / "prompts_rank_heldout_answers.jsonl"):
            for kind in judge.EDITS:
                answer = judge.edited(row["prompt"], row["responses"][0], kind, self.seed)
                if answer is not None:
                    rows.append({"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": answer})
                    kinds.append(kind)
        out = {}
        for kind in judge.EDITS:
            own = [row for row, other in zip(rows, kinds, strict=True) if other == kind]
            if own:
                write_jsonl(self.out / "edits.jsonl", own)
                found = whet.evaluate(model=self.model("reward"), data=str(self.out / "edits.jsonl"), threads=1)
                out[kind] = (found["accuracy"], len(own))
        return out

    def against(self, reward: str) -> dict[str, str]:
        """Return the fields of every reinforcement learning run."""
        return {"model": self.model("sft"), "reward": self.model(reward), "data": self.at("prompts_ppo.jsonl")}

    def verb(self, verb: str, name: str, **fields: Any) -> None:
        """Run a command with the demo's recipe of this name, into the run folder of this name."""
        given = fields | self.shortened(verb)
        whet.train(verb, str(RECIPES / f"{name}.yaml"), seed=self.seed, out=str(self.out / name), quiet=False, **given)

    def shortened(self, verb: str) -> dict[str, Any]:
        """Return the fields that `quick` changes in a recipe."""
        if not self.quick:
            return {}
        online = {"rollout.num_steps": 3, "rollout.prompts_per_step": 16, "rollout.mini_batch_size": 8}
        return online if verb in ("ppo", "instructgpt") else {"train.num_steps": 10}

    def at(self, name: str) -> str:
        """Return the path of a file of the world."""
        return str(self.world / name)

    def model(self, name: str) -> str:
        """Return the path of the model that a run saved."""
        return str(self.out / name / "model")

    def say(self, text: str) -> None:
        """Print the name of the next stage."""
        say(f"\n== {text}", error=True)


class Side:
    """Side runs, one after another, each in its own process, so that a second core is used."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.runs: list[Future[int]] = []
        self.worker = ThreadPoolExecutor(max_workers=1)

    def add(self, verb: str, name: str, recipe: str = "", **fields: str) -> None:
        """Add a run, which starts when the earlier ones have ended. `recipe` is the name of its recipe if it is another one. Its
        output is written to `side.log`."""
        words = [sys.executable, "-m", "whet", verb, str(RECIPES / f"{recipe or name}.yaml"), "--quiet"]
        own = {"seed": self.story.seed, "out": self.story.out / name, **self.story.shortened(verb)}
        for key, value in {**fields, **own}.items():
            words += [f"--{key}", str(value)]
        self.runs.append(self.worker.submit(self._run, words))

    def wait(self) -> None:
        """Wait until all runs have ended. Raises WhetError if one failed."""
        for one in self.runs:
            if one.result():
                raise WhetError(f"a side run failed; see {self.story.out / 'side.log'}")

    def _run(self, words: Sequence[str]) -> int:
        with (self.story.out / "side.log").open("a") as log:
            return subprocess.run(words, stdout=log, stderr=log, check=False).returncode

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)


def with_edit(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the row with an edited answer in some rows (see `judge.with_edit`): it was not sampled, so it has no token ids."""
    responses = judge.with_edit(row["prompt"], row["responses"], seed)
    same = [old == new for old, new in zip(row["responses"], responses, strict=True)]
    ids = [own if kept else None for own, kept in zip(row["response_ids"], same, strict=True)]
    finish = [own if kept else "stop" for own, kept in zip(row["finish"], same, strict=True)]
    return {**row, "responses": responses, "response_ids": ids, "finish": finish}


def annotator(prompt: str, responses: Sequence[str], seed: int = 0, **columns: Any) -> list[int]:
    """The noisy annotator: return the ranks of the answers to one prompt, in the form that `whet rank` requires."""
    return judge.annotate(prompt, responses, seed)


def ceiling(rows: Sequence[Mapping[str, Any]], seed: int) -> float:
    """Return the share of noisy pairs that the gold score orders correctly: the expected maximum of a reward model."""
    from whet.loops.evaluate import rank_agreement

    scores = [judge.gold([row["prompt"]] * len(row["responses"]), row["responses"]) for row in rows]
    return rank_agreement(scores, [judge.annotate(row["prompt"], row["responses"], seed) for row in rows])


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

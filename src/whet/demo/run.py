"""The demo's story: base, SFT, K answers, ranking, reward model, PPO-ptx, evaluation under gold, report.

Every phase is a verb of the command line with a recipe of `recipes/`; the world adds its data and its judge. Side runs
go on a second core meanwhile: the over-optimization of a small reward model, and PPO without ptx.
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

RECIPES = Path(__file__).parent / "recipes"
GOLD = "whet.demo.judge:gold"
ANNOTATOR = "whet.demo.run:annotator"
ANSWER = 56
"""longest answer, in tokens"""
SMALL = 400
"""rankings behind the reward model that is over-optimized"""
QUICK_SIZES = world.Sizes(320, 40, 320, 40, 64, 32, 64, 32)
"""rows of the world in the quick form, which only shows that everything runs"""


def demo(options: Mapping[str, Any]) -> int:
    """Runs the whole story into `out` for one seed, prints the table, writes summary.json and report.html.

    `quick` is a short form on a small world: it shows that everything runs, and nothing else.
    """
    known = {"seed": 0, "out": "runs/demo", "quick": False}
    for name in options:
        if name not in known:
            raise config.unknown(name, list(known))
    seed, out = options.get("seed", 0), Path(options.get("out", "runs/demo"))
    if not isinstance(seed, int) or seed < 0:
        raise RecipeError(f"seed: expected a number from 0 up, got {seed!r}")
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
    """An earlier demo's folder is renamed, so that nothing of it is lost; any other folder is not touched."""
    if not (out / "world").is_dir():
        raise RecipeError(f"out: {out} already exists and is no earlier demo; name another folder with --out")
    number = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}.{n}").exists())
    out.rename(out.with_name(f"{out.name}.{number}"))
    print(f"the earlier demo is now in {out.with_name(f'{out.name}.{number}')}", file=sys.stderr)


class Story:
    """The phases, each leaving its folder or file under `out`."""

    def __init__(self, out: Path, seed: int, *, quick: bool = False) -> None:
        self.out, self.seed, self.quick, self.world = out, seed, quick, out / "world"

    def prepare(self) -> None:
        """The world's files, the base model, and the SFT model."""
        self.say("the market desk: texts, demonstrations, prompts")
        world.write_world(self.world, self.seed, QUICK_SIZES if self.quick else world.Sizes())
        self.say("base: pre-training on the desk's raw text")
        self.verb("pretrain", "base", model=self.at("base"), data=self.at("raw.jsonl"))
        self.say("sft: demonstrations")
        evaluation = {"data.eval": self.at("demonstrations_heldout.jsonl")}
        self.verb("sft", "sft", model=self.model("base"), data=self.at("demonstrations.jsonl"), **evaluation)

    def rank(self) -> None:
        """K = 4 answers a prompt from the SFT model, and their noisy rankings; in some, one answer is an edited one."""
        self.say("four answers a prompt, ranked by the noisy person")
        for name in ("prompts_rank", "prompts_rank_heldout"):
            sampled = self.out / f"{name}_answers.jsonl"
            whet.sample(model=self.model("sft"), data=self.at(f"{name}.jsonl"), num_generations=4, seed=self.seed, threads=1,
                max_new_tokens=ANSWER, out=str(sampled),
            )  # fmt: skip
        answers = read(self.out / "prompts_rank_answers.jsonl")
        edited = [{**row, "responses": judge.with_edit(row["prompt"], row["responses"], self.seed)} for row in answers]
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
        """On the side: a reward model from few rankings, and PPO that follows it with nothing to hold it back."""
        side.add("reward", "small_reward", model=self.model("sft"), data=str(self.out / "small_ranked.jsonl"))
        side.add("ppo", "over_optimized", **self.against("small_reward"))

    def reinforce(self, side: "Side") -> None:
        """The reward model, and PPO-ptx from the SFT model, its critic from the reward model, on prompts of its own."""
        self.say("reward: the reward model, K-way")
        self.verb("reward", "reward", model=self.model("sft"), data=str(self.out / "ranked.jsonl"))
        side.add("ppo", "ppo_without_ptx", **self.against("reward"))
        self.say("ppo: PPO-ptx against the reward model")
        self.verb("instructgpt", "ppo", **self.against("reward"), ptx=self.at("raw.jsonl"))

    def evaluate(self, side: "Side") -> dict[str, Any]:
        """Everything the report tells, measured on held-out prompts and texts."""
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
        return {
            "seed": self.seed, "accuracy": accuracy, "ceiling": ceiling(read(self.out / "heldout_gold.jsonl"), self.seed),
            "models": models, "raw": raw, "edits": edits,
        }  # fmt: skip

    def compared(self, name: str) -> dict[str, float]:
        """A model against SFT: gold, reward model, KL and win rates; the answers stay in `answers_NAME.jsonl`."""
        return whet.evaluate(model=self.model(name), against=self.model("sft"), judge=[GOLD, self.model("reward")], seed=self.seed,
            data=self.at("prompts_eval.jsonl"), max_new_tokens=ANSWER, threads=1, answers=str(self.out / f"answers_{name}.jsonl"),
        )  # fmt: skip

    def raw_loss(self, name: str) -> float:
        """Loss on held-out raw text, nats per token."""
        return whet.evaluate(model=self.model(name), data=self.at("raw_heldout.jsonl"), threads=1)["nll"]

    def edits(self) -> dict[str, tuple[float, int]]:
        """For each controlled edit: (share of edited SFT answers that the reward model rates worse, how many)."""
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
        """What every reinforcement run is given."""
        return {"model": self.model("sft"), "reward": self.model(reward), "data": self.at("prompts_ppo.jsonl")}

    def verb(self, verb: str, name: str, **fields: Any) -> None:
        """A verb with the demo's recipe of this name, into the run folder of this name."""
        given = fields | self.shortened(verb)
        whet.train(verb, str(RECIPES / f"{name}.yaml"), seed=self.seed, out=str(self.out / name), quiet=False, **given)

    def shortened(self, verb: str) -> dict[str, Any]:
        """What the quick form changes in a recipe."""
        if not self.quick:
            return {}
        online = {"rollout.num_steps": 3, "rollout.prompts_per_step": 16, "rollout.mini_batch_size": 8}
        return online if verb in ("ppo", "instructgpt") else {"train.num_steps": 10}

    def at(self, name: str) -> str:
        """A file of the world."""
        return str(self.world / name)

    def model(self, name: str) -> str:
        """The model that a run left."""
        return str(self.out / name / "model")

    def say(self, text: str) -> None:
        """A line on what comes now."""
        print(f"\n== {text}", file=sys.stderr, flush=True)


class Side:
    """Side runs, one after the other in processes of their own, so that a second core is used."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.runs: list[Future[int]] = []
        self.worker = ThreadPoolExecutor(max_workers=1)

    def add(self, verb: str, name: str, **fields: str) -> None:
        """One more run, once those before it have ended; its output goes to `side.log`."""
        words = [sys.executable, "-m", "whet", verb, str(RECIPES / f"{name}.yaml"), "--quiet"]
        own = {"seed": self.story.seed, "out": self.story.out / name, **self.story.shortened(verb)}
        for key, value in {**fields, **own}.items():
            words += [f"--{key}", str(value)]
        self.runs.append(self.worker.submit(self._run, words))

    def wait(self) -> None:
        """Until all have ended. Raises WhetError when one failed."""
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


def annotator(prompt: str, responses: Sequence[str], seed: int = 0, **columns: Any) -> list[int]:
    """The noisy person: ranks of the answers to one prompt, in the form that `whet rank` asks for."""
    return judge.annotate(prompt, responses, seed)


def ceiling(rows: Sequence[Mapping[str, Any]], seed: int) -> float:
    """The share of noisy pairs that gold itself orders right: no reward model can expect more."""
    from whet.loops.evaluate import rank_agreement

    scores = [judge.gold([row["prompt"]] * len(row["responses"]), row["responses"]) for row in rows]
    return rank_agreement(scores, [judge.annotate(row["prompt"], row["responses"], seed) for row in rows])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""A session refuses what cannot work: stages out of order, changed files, a second session, own parts that fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import whet
from whet.errors import DataError, RecipeError, RewardError, UserError

ROWS = [{"prompt": "a yes"}, {"prompt": "b no"}]
ONLINE: dict[str, Any] = {
    "num_steps": 2, "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 6, "model": "m", "data": ROWS, "out": "runs/r",
}  # fmt: skip


def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(one.split())) for one in completions]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grpo(**more: Any) -> whet.Session:
    return whet.Session("grpo", **(ONLINE | {"reward": reward} | more))


# --- stages ----------------------------------------------------------------------------------------------------------


STAGES: dict[str, Callable[[Any], Any]] = {
    "generate": lambda session: session.generate(),
    "score": lambda session: session.score([]),
    "measure": lambda session: session.measure([], None),
    "advantages": lambda session: session.advantages(None),
    "minibatches": lambda session: list(session.minibatches(None)),
    "forward_backward": lambda session: session.forward_backward(None),
    "optim_step": lambda session: session.optim_step(),
    "publish": lambda session: session.publish(),
    "metrics": lambda session: session.metrics(),
}


def test_no_stage_runs_outside_a_step() -> None:
    with grpo() as session:
        for name, call in STAGES.items():
            with pytest.raises(RuntimeError, match=rf"{name}: call it inside the loop over steps\(\)"):
                call(session)


def test_a_stage_names_the_stage_that_it_needs() -> None:
    with grpo() as session:
        next(session.steps())
        with pytest.raises(ValueError, match=r"score: no groups were given"):
            session.score([])
        with pytest.raises(RuntimeError, match="advantages: call measure first"):
            session.advantages(None)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="minibatches: call advantages first"):
            next(session.minibatches(None))  # type: ignore[arg-type]
        batch = session.rollout()
        with pytest.raises(RuntimeError, match="generate: this step has its answers already"):
            session.generate()
        with pytest.raises(TypeError, match=r"expected a mini-batch of minibatches\(batch\), got Batch"):
            session.forward_backward(batch)


def test_a_step_without_an_update_is_an_error() -> None:
    def run() -> None:
        with grpo() as session:
            for _ in session.steps():
                session.rollout()

    with pytest.raises(RuntimeError, match="step 0: no update was made"):
        run()


def test_stages_of_an_offline_run_need_a_batch() -> None:
    with whet.Session("sft", model="m", data=[{"prompt": "a", "completion": "yes"}], out="runs/s", num_steps=1) as one:
        with pytest.raises(RuntimeError, match=r"optim_step: call it inside the loop over batches\(\)"):
            one.optim_step()
        with pytest.raises(RuntimeError, match=r"forward_backward: call it inside the loop over batches\(\)"):
            one.forward_backward(None)
        for batch in one.batches():
            with pytest.raises(TypeError, match=r"expected a batch of batches\(\), got NoneType"):
                one.forward_backward(None)
            one.update(batch)


def test_logged_metrics_are_numbers_with_names_of_their_own() -> None:
    with grpo(num_steps=1) as session:
        for step in session.steps():
            for name in ("step", "seconds"):
                with pytest.raises(ValueError, match=f"log: each line has '{name}' already"):
                    step.log({name: 1.0})
            with pytest.raises(TypeError, match="log: mine must be a number, got str"):
                step.log({"mine": "x"})  # type: ignore[dict-item]
            step.log({"mine": torch.tensor(2.5)})  # type: ignore[dict-item]
            for mini in session.minibatches(session.rollout()):
                session.update(mini)
            session.publish()
    line = json.loads(Path("runs/r/metrics.jsonl").read_text())
    assert line["mine"] == 2.5
    assert line["step"] == 1
    assert "score" in line  # the metrics of the loop are written without being logged


# --- the run folder --------------------------------------------------------------------------------------------------


RULES = "def reward(prompts, completions, **columns):\n    return [{}] * len(completions)\n"


def test_a_resume_refuses_a_changed_reward_file() -> None:
    Path("rules.py").write_text(RULES.format("float(len(prompts))"))
    given = ONLINE | {"reward": "rules.py:reward", "save_every": 1}
    whet.train("grpo", **given)
    Path("rules.py").write_text(RULES.format("-1.0"))
    with pytest.raises(
        RecipeError,
        match=r"--resume: reward.0.source: rules.py:reward: the file has changed .*--accept-changed reward.0.source",
    ):
        whet.train("grpo", resume=True, **given)
    whet.train("grpo", resume=True, accept_changed="rules.py:reward", **given)
    whet.train("grpo", resume=True, **given)  # its new hash was written


CHANGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows": ("rows.jsonl", {"data": "rows.jsonl"}, "data.train"),
    "a tokenizer": ("m/chat_template.jinja", {}, "model.path"),
    "an own part": ("parts.py", {"surrogate": "parts.py:own"}, "algorithm.surrogate.name"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_resume_refuses_other_changed_files(name: str) -> None:
    file, more, field = CHANGED[name]
    tiny.write_jsonl(Path("rows.jsonl"), ROWS)
    Path("parts.py").write_text("def own(ratio, advantage):\n    return -ratio * advantage\n")
    given = ONLINE | {"reward": reward, "save_every": 1} | more
    whet.train("grpo", **given)
    with Path(file).open("a") as opened:
        opened.write("\n")
    with pytest.raises(RecipeError, match=rf"--resume: {field}: .*the file has changed"):
        whet.train("grpo", resume=True, **given)


def test_a_run_without_a_checkpoint_starts_over_with_changed_files() -> None:
    Path("rules.py").write_text(RULES.format("1 / 0"))
    with pytest.raises(RewardError):
        whet.train("grpo", **(ONLINE | {"reward": "rules.py:reward"}))
    Path("rules.py").write_text(RULES.format("1.0"))
    whet.train("grpo", resume="auto", **(ONLINE | {"reward": "rules.py:reward"}))


def test_two_sessions_cannot_train_in_one_folder() -> None:
    with grpo():
        with pytest.raises(RecipeError, match=r"out: another session is training in runs/r"):
            grpo().__enter__()
        assert Path("runs/r/recipe.yaml").is_file()
    late = grpo(out="runs/late")
    with grpo(out="runs/late") as session:
        session.run()
    with pytest.raises(RecipeError, match="already holds a run"):
        late.__enter__()


def test_a_session_that_cannot_start_leaves_no_folder() -> None:
    tiny.write_jsonl(Path("rows.jsonl"), ROWS)
    session = grpo(data="rows.jsonl", out="runs/deep/er")
    Path("m/model.safetensors").unlink()
    with pytest.raises((whet.WhetError, OSError)):
        session.__enter__()
    assert not Path("runs").exists()


# --- own parts, rewards and arguments --------------------------------------------------------------------------------


RANGED = """
from typing import Annotated

import msgspec

Width = Annotated[float, msgspec.Meta(gt=0, le=1)]


def clipped(ratio, advantage, *, width: Width = 0.2):
    return -ratio * advantage * width


class Engine:
    reports = frozenset()
    version = 0

    def __init__(self, *, width: Width = 0.2): pass
    def load_weights(self, weights): pass
    def generate(self, requests): pass
    def logprobs(self, ids): pass
    def sleep(self): pass
    def close(self): pass
"""


def test_ranges_of_own_options_are_kept() -> None:
    Path("ranged.py").write_text(RANGED)
    for changes, said in (
        (
            {"surrogate": {"name": "ranged.py:clipped", "width": 2.0}},
            r"algorithm.surrogate.width: expected `float` <= 1",
        ),
        ({"generator": {"name": "ranged.py:Engine", "width": 0}}, r"generator.width: expected `float` > 0.0"),
    ):
        with pytest.raises(RecipeError, match=said):
            grpo(**changes)


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "a surrogate that raises": (
        {"surrogate": "own.py:raising"}, r"raising \(.*own.py:1\) failed with ZeroDivisionError.*own.py:2"
    ),
    "an advantage of a wrong shape": (
        {"advantage": "own.py:narrow"}, r"narrow \(.*own.py:3\) failed with RuntimeError.* when broadcast used its result"
    ),
    "a row too few": (
        {"normalize_advantage": "own.py:short"}, r"short \(.*own.py:9\): expected a tensor of shape \(4, \d+\), got shape \(3, \d+\)"
    ),
    "a ratio of one number": (
        {"ratio": "own.py:number"}, r"number \(.*own.py:5\): expected .*one value per token or answer, got a single number"
    ),
    "a correction that is no tensor": (
        {"importance_correction": "own.py:listed"}, r"listed .*expected a tensor .*got list"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_an_own_part_that_fails_is_named_with_its_place(name: str) -> None:
    Path("own.py").write_text(
        "def raising(ratio, advantage):\n    return ratio / 0 if 1 / 0 else advantage\n"
        "def narrow(score):\n    return score[:, None]\n"
        "def number(logp, old_logp):\n    return (logp - old_logp).sum()\n"
        "def listed(sampler_logp, old_logp):\n    return [1.0]\n"
        "def short(advantage):\n    return advantage[1:]\n"
    )
    changes, said = OWN[name]
    with pytest.raises(RecipeError, match=said):
        whet.train("grpo", **(ONLINE | {"reward": reward} | changes))


LOSSES: dict[str, tuple[Any, str]] = {
    "an unknown column": (lambda logp, nonsense: logp, "loss: .*the parameter 'nonsense' is not a column here"),
    "an option without a default": (eval("lambda logp, *, width: logp"), "loss: .*the option 'width' has no default"),
    "no function": (3, "loss: expected a function, got int"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_cannot_be_called_is_refused(name: str) -> None:
    loss, said = LOSSES[name]
    with grpo() as session:
        next(session.steps())
        mini = next(session.minibatches(session.rollout()))
        with pytest.raises(RecipeError, match=said):
            session.forward_backward(mini, loss)


class Reward:
    def __init__(self, result: Any) -> None:
        self.result = result

    def score(self, groups: Any) -> Any:
        count = sum(len(group.samples) for group in groups)
        return self.result(count)


OBJECTS: dict[str, tuple[Callable[[int], Any], str]] = {
    "raises": (
        lambda count: 1 / 0,
        r"reward Reward raised ZeroDivisionError: division by zero \(at .*test_session.py:\d+\)",
    ),
    "too few": (lambda count: [1.0], "reward Reward: 4 answers were given, 1 scores came back"),
    "nothing": (lambda count: None, "reward Reward: expected a list with one score per answer, got NoneType"),
    "a huge number": (lambda count: [10**400] * count, "answer 0 got .*expected a finite number"),
    "more than float32 holds": (lambda count: [1e39] * count, "answer 0 got 1e[+]39, expected a finite number"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_reward_object_that_fails_is_told(name: str) -> None:
    result, said = OBJECTS[name]
    with pytest.raises(RewardError, match=said):
        whet.train("grpo", **ONLINE, reward=Reward(result))


def test_a_reward_object_may_return_a_list() -> None:
    run = whet.train("grpo", **ONLINE, reward=Reward(lambda count: [float(n) for n in range(count)]))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["score"] == 1.5


def test_a_reward_function_is_checked_against_the_rows_before_anything_is_loaded(monkeypatch: Any) -> None:
    def exact(prompts: Any, completions: Any, completion_ids: Any, answer: Any) -> list[float]:
        return [float(one == right) for one, right in zip(completions, answer, strict=True)]

    with pytest.raises(
        RecipeError,
        match=r"reward.0: .*test_session.py:\d+: .*exact cannot be called with .*: missing a required argument: 'answer'",
    ):
        whet.Session("grpo", **ONLINE, reward=exact)
    rows = [{**row, "answer": "yes", "level": 1} for row in ROWS]
    with pytest.raises(RecipeError, match=r"unexpected keyword argument 'level'; take \*\*columns"):
        whet.Session("grpo", **(ONLINE | {"data": rows}), reward=exact)
    with pytest.raises(RecipeError, match=r"reward.0: .*missing"):
        whet.sample(model="m", data=ROWS, out="a.jsonl", reward=exact, max_new_tokens=4)


def test_a_column_that_some_rows_lack_is_none_for_them_in_every_step() -> None:
    seen = []

    def judged(prompts: Any, completions: Any, *, answer: Any, **columns: Any) -> list[float]:
        seen.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(completions)

    rows = [{"prompt": "a yes", "answer": "yes"}, {"prompt": "b no"}]
    whet.train("grpo", **(ONLINE | {"data": rows, "prompts_per_step": 1}), reward=judged)
    assert set(seen) == {("a yes", "yes"), ("b no", None)}


CALLS: dict[str, tuple[Callable[[], Any], type, str]] = {
    "no method": (lambda: whet.train(None), RecipeError, "method: expected the name of a method, such as 'grpo', got None"),  # type: ignore[arg-type]
    "fields in place of a recipe": (
        lambda: whet.train("grpo", {"model": "m"}), RecipeError, "recipe: expected the path .*got dict; give fields by name"  # type: ignore[arg-type]
    ),
    "no rows": (lambda: grpo(data=[]), DataError, "data: the list is empty"),
    "a weight that is no number": (
        lambda: grpo(reward=[{"source": reward, "weight": float("nan")}]), RecipeError, "reward.0.weight: expected a finite number, got nan"
    ),
    "a weight without end": (
        lambda: grpo(reward=[{"source": reward, "weight": float("inf")}]), RecipeError, "reward.0.weight: expected a finite"
    ),
    "a rate that is no number": (lambda: grpo(lr=float("nan")), RecipeError, "optim.lr: expected"),
    "a folder that cannot be written": (
        lambda: whet.sample(model="m", data=ROWS, out="m/config.json/a.jsonl"), RecipeError, "out: m/config.json/a.jsonl cannot be written"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_cannot_work_are_told(name: str) -> None:
    call, kind, said = CALLS[name]
    with pytest.raises(kind, match=said):
        call()


def test_frames_and_splits_are_told_how_to_be_given() -> None:
    import datasets

    with pytest.raises(DataError, match="a DatasetDict has the splits train; give one of them"):
        grpo(data=datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}))

    class Frame:
        columns = ("prompt",)

        def to_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(DataError, match=r"a DataFrame is not read; give its rows, as frame.to_dict\('records'\)"):
        grpo(data=Frame())


class Generator:
    """A generator whose answers are wrong."""

    reports: frozenset[str] = frozenset()
    version = 0

    def __init__(self, result: Any) -> None:
        self.result = result

    def generate(self, requests: Any) -> Any:
        return self.result(requests)

    def load_weights(self, weights: Any) -> None: ...

    def logprobs(self, ids: Any) -> Any: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


GENERATED: dict[str, tuple[Any, str]] = {
    "raises": (lambda requests: 1 / 0, r"generator Generator raised ZeroDivisionError.*test_session.py:\d+"),
    "texts": (lambda requests: ["a"] * len(requests), "generate must yield whet.Sample objects, got str"),
    "too few": (lambda requests: [], "must return one sample per request"),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generator_object_that_fails_is_told(name: str) -> None:
    result, said = GENERATED[name]
    with pytest.raises(UserError, match=said):
        whet.sample(model="m", data=ROWS, out="a.jsonl", generator=Generator(result), max_new_tokens=4)


# --- what a newcomer tries -------------------------------------------------------------------------------------------


def test_the_recipe_of_a_run_has_every_default() -> None:
    import yaml

    whet.train("grpo", **ONLINE, reward=reward, lr=1e-3)
    saved = yaml.safe_load(Path("runs/r/recipe.yaml").read_text())
    assert saved["sampling"] == {
        "max_new_tokens": 6,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "skip_special_tokens": False,
    }
    assert saved["optim"]["betas"] == [0.9, 0.95]
    assert saved["train"]["max_tokens_per_micro_batch"] >= 1024  # of the model and the machine
    with pytest.raises(RecipeError, match=r"differs in sampling.max_new_tokens; a resumed run needs"):
        whet.train("grpo", resume=True, **(ONLINE | {"max_new_tokens": 7}), reward=reward, lr=1e-3)
    saved.pop("sampling"), saved["rollout"].pop("ema")
    saved["sampling"] = {"max_new_tokens": 6}
    Path("runs/r/recipe.yaml").write_text(yaml.safe_dump(saved))  # as earlier versions wrote it
    whet.train("grpo", resume=True, **ONLINE, reward=reward, lr=1e-3)


def test_own_scores_may_be_given_by_name() -> None:
    with grpo() as session:
        next(session.steps())
        groups = session.generate()
        count = sum(len(group.samples) for group in groups)
        with pytest.raises(ValueError, match=r"measure: expected the scores of \['reward'\], got those of \['other'\]"):
            session.measure(groups, {"other": torch.zeros(count)})
        with pytest.raises(ValueError, match=rf"scores reward: expected a tensor of shape \({count},\)"):
            session.measure(groups, {"reward": torch.zeros(count, 2)})
        batch = session.measure(groups, {"reward": torch.arange(count)})
        assert batch["rewards"][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert int(batch["segment_end"].sum()) == count


def test_an_own_loss_may_name_what_the_methods_loss_computes() -> None:
    def clip(ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)

    def sigmoid(gap: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(gap)

    with grpo() as session:
        next(session.steps())
        mini = next(session.minibatches(session.rollout()))
        own = session.forward_backward(mini, clip).losses
        session.optim_step()
        assert own["policy/rollout/clip"] == pytest.approx(0.0, abs=1.0)
    pairs = [{"prompt": "a", "chosen": "yes", "rejected": "no"}]
    with whet.Session("dpo", model="m", data=pairs, out="runs/d", num_steps=1) as one:
        for batch in one.batches():
            assert one.update(batch, sigmoid).losses["policy/train/sigmoid"] == pytest.approx(0.6931, abs=1e-3)
            with pytest.raises(RecipeError, match="the parameter 'value' is not a column here"):
                one.forward_backward(batch, lambda value: value)


def test_a_generator_that_gives_no_log_probs_of_given_tokens_is_told_in_training() -> None:
    class Silent(Generator):
        reports = frozenset({"sampler_logp"})

    with pytest.raises(RecipeError, match=r"generator Silent: logprobs must return one tensor \(S - 1,\) per sequence"):
        whet.train("grpo", **ONLINE, reward=reward, generator=Silent(lambda requests: []))


FLAGS: dict[str, tuple[list[str], str]] = {
    "verl's sections": (["grpo", "--actor_rollout_ref.rollout.n", "8"], "here it is num_generations"),
    "TRL's use_peft": (["grpo", "--use-peft"], "here it is lora.rank for adapters"),
    "a typing mistake in a reward": (
        ["grpo", "--reward", "{source: a.py:f, wieght: 2}"], "unknown field 'reward.wieght'; did you mean 'reward.weight'"
    ),
    "a reward without a source": (["grpo", "--reward", "{weight: 2}"], "reward.0.source: this field is required"),
    "capitals": (["GRPO"], "did you mean 'grpo'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_options_of_other_frameworks_and_mistakes_are_hinted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from whet.cli.main import main

    words, said = FLAGS[name]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_options_of_adapters_stand_beside_their_name_on_the_command_line() -> None:
    from whet.cli.main import main

    Path("own.py").write_text(
        "class Longest:\n    def __init__(self, *, reverse: bool = False):\n        self.reverse = reverse\n"
        "    def rank(self, questions):\n        order = [1, 2] if self.reverse else [2, 1]\n"
        "        return [order for _ in questions]\n"
    )
    tiny.write_jsonl(Path("rows.jsonl"), [{"prompt": "q", "responses": ["a", "a b"]}])
    words = [
        "rank",
        "--data",
        "rows.jsonl",
        "--ranker",
        "own.py:Longest",
        "--ranker.reverse",
        "true",
        "--out",
        "b.jsonl",
    ]
    assert main(words) == 0
    assert json.loads(Path("b.jsonl").read_text())["ranks"] == [1, 2]


def test_not_valid_yaml_is_one_line_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    from whet.cli.main import main

    Path("bad.yaml").write_text("method: grpo\nmodel: {path: m\nout: r\n")
    assert main(["grpo", "bad.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "bad.yaml:3: not valid YAML" in told


# --- what a breaker tried --------------------------------------------------------------------------------------------


class Weighted:
    """A reward that holds a tensor, an array, slots or nested values."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def score(self, groups: Any) -> list[float]:
        return [0.0 for group in groups for _ in group.samples]


HELD: dict[str, Callable[[float], Any]] = {
    "a tensor": lambda value: torch.tensor([value, 2.0]),
    "an array": lambda value: __import__("numpy").array([value]),
    "a module": lambda value: _filled(torch.nn.Linear(1, 1), value),
    "deep values": lambda value: {"a": {"b": {"c": {"d": {"e": value}}}}},
    "a cycle": lambda value: _cycle(value),
}


def _filled(module: torch.nn.Module, value: float) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.data.fill_(value)
    return module


def _cycle(value: float) -> list[Any]:
    out: list[Any] = [value]
    out.append(out)
    return out


@pytest.mark.parametrize("form", HELD)
def test_a_reference_covers_tensors_arrays_slots_and_depth(form: str) -> None:
    from whet.registry import register

    make = HELD[form]
    assert register(Weighted(make(1.0))) == register(Weighted(make(1.0)))
    assert register(Weighted(make(1.0))) != register(Weighted(make(3.0)))


def test_a_loop_that_was_left_inside_a_step_is_not_begun_again() -> None:
    with grpo(num_steps=3) as session:
        for _ in session.steps():
            break
        with pytest.raises(RuntimeError, match="steps: step 0 was left before its end"):
            session.run()
    pairs = [{"prompt": "a", "chosen": "yes", "rejected": "no"}]
    with whet.Session("dpo", model="m", data=pairs, out="runs/d", num_steps=2) as one:
        for _ in one.batches():
            break
        with pytest.raises(RuntimeError, match="batches: step 0 was left before its end"):
            one.run()


def test_stages_are_called_once_per_step_and_with_batches_of_the_step() -> None:
    with grpo(select="clip_cov", mini_batch_size=2) as session:
        steps = session.steps()
        next(steps)
        groups = session.generate()
        scores = session.score(groups)
        with pytest.raises(ValueError, match="measure: the scores are of 4 answers, the groups have 2"):
            session.measure(groups[:1], scores)
        batch = session.measure(groups, scores)
        with pytest.raises(RuntimeError, match="measure: it was called in this step already"):
            session.measure(groups, scores)
        batch = session.advantages(batch)
        with pytest.raises(RuntimeError, match="needs the update of a mini-batch before the next one is requested"):
            list(session.minibatches(batch))
        kept = None
        for mini in session.minibatches(batch):
            kept = mini
            session.update(mini)
        session.publish()
        with pytest.raises(RuntimeError, match="publish: it was called in this step already"):
            session.publish()
        next(steps)
        session.rollout()
        with pytest.raises(ValueError, match="the mini-batch is of step 0, and this is step 1"):
            session.forward_backward(kept)  # type: ignore[arg-type]


def test_logged_metrics_do_not_steer_the_method() -> None:
    def run(out: str, **logged: float) -> list[dict[str, float]]:
        given = {"kl_in_reward": {"coef": 0.1, "controller": "adaptive", "target": 1.0}, "out": out}
        with grpo(kl_in_loss=None, **given) as session:
            for step in session.steps():
                for mini in session.minibatches(session.rollout()):
                    session.update(mini)
                session.publish()
                step.log(logged)
        return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]

    plain, steered = run("runs/a"), run("runs/b", kl=50.0, entropy=9.0)
    assert [line["state/penalty"] for line in plain] == [line["state/penalty"] for line in steered]
    assert steered[0]["kl"] == 50.0


def test_own_parts_that_change_their_columns_in_place_change_no_others() -> None:
    Path("own.py").write_text(
        "def doubled(rewards, *, weights=(1.0, 1.0)):\n    rewards *= 2\n    return rewards.sum(1)\n"
        "def summed(rewards):\n    return (2 * rewards).sum(1)\n"
    )
    two = [{"source": reward, "name": "a"}, {"source": reward, "name": "b"}]
    lines = []
    for number, name in enumerate(("doubled", "summed")):
        given = {"combine": f"own.py:{name}", "reward_normalization": "running", "advantage": "group_center"}
        run = whet.train("grpo", **(ONLINE | {"out": f"runs/{number}"} | given), reward=two)
        lines.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*lines, strict=True):
        same = {"seconds": 0, "seconds/generate": 0, "tokens_per_second": 0}
        assert one | same == other | same


IGNORED: dict[str, tuple[dict[str, Any], str]] = {
    "a learner's name": ({"learner": {"name": "zero3"}}, "unknown field 'learner.name'"),
    "a reward's option name": (
        {"reward": [{"source": "http://127.0.0.1:1", "options": {"name": "x"}}]}, "unknown field 'reward.0.name'"
    ),
    "an infinite rate": ({"lr": float("inf")}, "optim.lr: expected a finite number, got inf"),
    "an infinite temperature": ({"temperature": float("inf")}, "sampling.temperature: expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED)
def test_nothing_is_taken_and_ignored(name: str) -> None:
    changes, said = IGNORED[name]
    with pytest.raises(RecipeError, match=said):
        grpo(**changes)


class Tracker:
    def __init__(self, fails: str) -> None:
        self.fails, self.called = fails, []  # type: ignore[var-annotated]

    def _call(self, name: str) -> None:
        self.called.append(name)
        if name == self.fails:
            raise OSError("no network")

    def start(self, run: Any) -> None:
        self._call("start")

    def log(self, step: int, metrics: Any) -> None:
        self._call("log")

    def samples(self, step: int, rows: Any) -> None:
        self._call("samples")

    def end(self) -> None:
        self._call("end")


def test_a_tracker_that_fails_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    failing, other = Tracker("log"), Tracker("")
    run = whet.train("grpo", **ONLINE, reward=reward, trackers=[failing, other])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert failing.called.count("log") == 1
    assert other.called == ["start", "samples", "log", "samples", "log", "end"]
    assert "tracker Tracker is not used any more: OSError: no network" in capsys.readouterr().err


def test_trackers_end_when_a_run_fails() -> None:
    tracker = Tracker("")
    with pytest.raises(RewardError):
        whet.train("grpo", **ONLINE, reward=Reward(lambda count: 1 / 0), trackers=[tracker])
    assert tracker.called[-1] == "end"

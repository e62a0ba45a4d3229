"""Each table of adapters takes one more from a file outside the package, with its options, and names what is wrong in it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import whet
from whet.data import chat_format
from whet.errors import RecipeError

MINE = '''
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.rewards import Scores


class Generator:
    """A generator for training: it samples with the weights that it is given."""

    reports = frozenset({"sampler_logp"})
    version = 0

    def __init__(self, *, ends: list[int], unit: int = 256):
        self.ends, self.unit = ends, unit

    def load_weights(self, weights):
        self.own = LocalGenerator(weights.handle, self.ends, str, unit=self.unit)
        self.own.load_weights(weights)
        self.version = weights.version

    def generate(self, requests):
        yield from self.own.generate(requests)

    def logprobs(self, ids):
        return self.own.logprobs(ids)

    def sleep(self): pass

    def close(self): pass


class Learner(LocalLearner):
    """A learner with an option: it counts its updates in a file."""

    def __init__(self, *given, log: str = "updates", **options):
        super().__init__(*given, **options)
        self.log = log

    def optim_step(self):
        with open(self.log, "a") as file:
            file.write("x")
        return super().optim_step()


class Ranker:
    """The longest answer is the best one."""

    def __init__(self, *, reverse: bool = False):
        self.reverse = reverse

    def rank(self, questions):
        out = []
        for one in questions:
            order = sorted(one.responses, key=len, reverse=not self.reverse)
            out.append([1 + order.index(answer) for answer in one.responses])
        return out


class Mute:
    """Has no method at all."""
'''
ROWS = [{"prompt": "a yes"}, {"prompt": "b no"}]
TABLES = {"generator": "generate", "learner": "measure", "ranker": "rank", "reward": "score", "trackers": "start"}


def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids)) for ids in completion_ids]


GRPO: dict[str, Any] = {
    "model": "m", "data": ROWS, "num_steps": 2, "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 6, "reward": reward,
    "lr": 1e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.folder(tmp_path / "m")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_generator_for_training_is_one_file() -> None:
    ends = list(chat_format(tiny.tokenizer()).end_ids)
    own = whet.train("grpo", out="own", generator={"name": "mine.py:Generator", "ends": ends, "unit": 4}, **GRPO)
    assert same(own, whet.train("grpo", out="local", **(GRPO | {"rollout.max_num_seqs": 4})))
    saved = (own / "recipe.yaml").read_text()
    assert "unit: 4" in saved  # every option is in the recipe of the run
    with pytest.raises(RecipeError, match=r"differs in generator\.options\.unit"):
        whet.train("grpo", out="own", resume=True, generator={"name": "mine.py:Generator", "ends": ends}, **GRPO)
    again = {"generator": {"name": "mine.py:Generator", "ends": ends, "unit": 4}} | GRPO
    (Path("own") / "recipe.yaml").write_text(saved.replace("unit: 4", "unit: 4\n    # a comment"))
    whet.train("grpo", "own/recipe.yaml", out="again", **{"generator": "local", "reward": reward})
    assert whet.train("grpo", out="own", resume=True, **again) == own
    with pytest.raises(RecipeError, match=r"mine.py:Generator does not report support: top_p, top_k and min_p need"):
        whet.train("grpo", out="top", generator={"name": "mine.py:Generator", "ends": ends}, top_p=0.9, **GRPO)


def test_a_learner_is_one_file() -> None:
    own = whet.train("grpo", out="own", learner={"backend": "mine.py:Learner", "log": "count"}, **GRPO)
    assert Path("count").read_text() == "xx"
    assert same(own, whet.train("grpo", out="local", **GRPO))


def test_a_ranker_is_one_file() -> None:
    rows = [{"prompt": "q", "responses": ["a", "a b", "a b c"]}]
    for reverse, ranks in ((False, [3, 2, 1]), (True, [1, 2, 3])):
        ranker = {"name": "mine.py:Ranker", "reverse": reverse}
        out = whet.rank(data=rows, ranker=ranker, out=f"{reverse}.jsonl")
        assert json.loads(out.read_text())["ranks"] == ranks
    with pytest.raises(RecipeError, match="ranker: the judge ranks"):
        whet.rank(data=rows, ranker="scores", judge="mine.py:Ranker", out="b.jsonl")


@pytest.mark.parametrize("table", TABLES)
def test_a_class_without_the_methods_is_named_with_its_line(table: str) -> None:
    def call() -> None:
        if table == "ranker":
            whet.rank(data=[{"responses": ["a", "b"]}], ranker="mine.py:Mute", out="a.jsonl")
        else:
            value = ["mine.py:Mute"] if table == "trackers" else "mine.py:Mute"
            whet.train("grpo", out="r", **(GRPO | {table: value}))

    with pytest.raises(RecipeError, match=rf"mine.py:\d+: class Mute has no method .*{TABLES[table]}\("):
        call()


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown option": ({"generator": {"name": "vllm", "cuont": 2}}, r"unknown field 'generator.cuont'; did you mean 'generator.count'"),
    "of another generator": ({"generator.count": 2}, "generator.count: local does not have it, only vllm; leave it out"),
    "of another learner": ({"learner": "ddp", "learner.offload": True}, "learner.offload: ddp does not have it, only fsdp, zero1"),
    "a wrong value": ({"generator": "vllm", "generator.count": 0}, "generator.count: expected `int` >= 1; got 0"),
    "an unknown learner": ({"learner": "fdsp"}, "learner.backend: unknown name 'fdsp'; known are auto, ddp, fsdp, local"),
    "an unknown precision": ({"learner.precision": "float16"}, "learner.precision: .*'float16'; known are auto, bf16, float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("call", ["train", "explain"])
def test_a_wrong_option_of_an_adapter_is_told(name: str, call: str) -> None:
    changes, said = OPTIONS[name]
    given = GRPO | changes | ({"out": "r"} if call == "train" else {})
    with pytest.raises(RecipeError, match=said):
        getattr(whet, call)("grpo", **given)


BARE = """
class Bare:
    reports, version = frozenset(), 0
    def generate(self, requests): yield from ()
    def load_weights(self, weights): pass
    def logprobs(self, ids): return []
    def sleep(self): pass
    def close(self): pass
"""


def test_an_adapter_without_options_says_so(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    bare = f"{tmp_path / 'bare.py'}:Bare"
    for name, said in (
        (bare, rf"generator\.speed: {bare} has no options; leave it out"),
        ("local", r"unknown field 'generator\.speed'; known are generator\.decoder"),
    ):
        with pytest.raises(RecipeError, match=said):
            whet.sample(
                model="m",
                data=[{"prompt": "a"}],
                generator={"name": name, "speed": 2},
                max_new_tokens=4,
                out="a.jsonl",
            )


def test_options_may_be_nested_or_beside_the_name() -> None:
    from whet.runs import config
    from whet.runs.recipe import OnlineRecipe

    forms = [
        [("generator", {"name": "vllm", "count": 2})],
        [("generator", {"name": "vllm", "options": {"count": 2}})],
        [("generator", "vllm"), ("generator.count", 2)],
        [("generator.name", "vllm"), ("generator.options.count", 2)],
    ]
    found = [config.resolve(OnlineRecipe, "grpo", None, form).generator for form in forms]
    assert found == [found[0]] * 4
    assert found[0].options == {"count": 2}


BACKENDS: list[tuple[Any, Any, list[str]]] = [
    ({"backend": "fsdp", "options": {"precision": "float32", "offload": True}}, {"backend": "ddp", "options": {}}, []),
    (
        {"backend": "zero2", "options": {"precision": "float32", "offload": False}},
        {"backend": "local", "options": {}},
        [],
    ),
    (
        {"backend": "local", "options": {}},
        {"backend": "auto", "options": {"precision": "float32", "offload": True}},
        [],
    ),
    (
        {"backend": "fsdp", "options": {"precision": "bf16", "offload": False}},
        {"backend": "ddp", "options": {}},
        [],  # the checkpoints have it, and are refused
    ),
]


@pytest.mark.parametrize(("old", "new", "changed"), BACKENDS)
def test_a_resume_may_take_another_backend(old: Any, new: Any, changed: list[str]) -> None:
    from whet.runs import folder

    for one, other in ((old, new), (new, old)):
        assert folder.differing(folder._kept({"learner": one}), folder._kept({"learner": other})) == changed


def test_options_of_an_adapter_are_a_mapping() -> None:
    for value in (None, 5):
        with pytest.raises(RecipeError, match=r"generator.options: expected a mapping of options"):
            whet.train("grpo", out="r", **GRPO, generator={"name": "vllm", "options": value})


def test_what_a_generator_cannot_do_outside_training_is_refused() -> None:
    for given, said in (
        (
            {"name": "server", "urls": ["http://127.0.0.1:1"]},
            "generator.name: a server has the weights of its last run",
        ),
        ({"name": "vllm", "sleep": True}, "generator.sleep: it is for training"),
        ("openai", "generator.url: which server"),
    ):
        with pytest.raises(RecipeError, match=said):
            whet.sample(model="m", data=ROWS, out="a.jsonl", generator=given, max_new_tokens=4)


def test_texts_of_options_are_not_taken_for_modules() -> None:
    from whet.runs import inputs

    assert (
        inputs.digests({"reward": [{"options": {"prompt": "this.x: answer"}}], "a": "http://x:80", "b": "no:such"})
        == {}
    )
    assert list(inputs.digests({"r": "mine.py:Ranker", "m": "m"})) == ["r: mine.py:Ranker", "m: m"]


def test_the_page_of_adapters_runs(place: Path) -> None:
    import re

    page = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code
    (place / "doc.py").write_text(code[1])
    given = GRPO | {"reward": {"source": "doc.py:Longest", "scale": 2.0}, "trackers": ["doc.py:Lines"]}
    run = whet.train("grpo", out="r", **given)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["score"] == 2 * line["length"]
    assert Path("log.txt").read_text().splitlines()[0] == f"1 {line['score']}"
    out = whet.rank(data=[{"responses": ["a b", "a", "a"]}], ranker="doc.py:Shortest", out="ranked.jsonl")
    assert json.loads(out.read_text())["ranks"] == [3, 1, 1]
    answers = whet.sample(
        model="m", data=ROWS, out="a.jsonl", generator={"name": "doc.py:Echo", "words": 1}, max_new_tokens=4
    )
    assert json.loads(answers.read_text().splitlines()[0])["responses"][0] == "a"

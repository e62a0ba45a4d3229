"""Python objects in place of paths: their references, their files, and the functions that take them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from servers import serving

import whet
from whet.cli.main import main
from whet.errors import ModelError, RecipeError, WorkerDied
from whet.http import Http
from whet.registry import load_object, options_of, register
from whet.runs.sources import Sources


def constant(value: float) -> Callable[..., list[float]]:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [value] * len(completions)

    return reward


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [self.value] * len(completions)

    def score(self, completions: list[str], **_: Any) -> list[float]:
        return [self.value] * len(completions)


FORMS: dict[str, Callable[[float], Any]] = {
    "closure": constant,
    "instance": Constant,
    "bound method": lambda value: Constant(value).score,
    "partial": lambda value: functools.partial(Constant.score, value),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_reference_covers_what_a_callable_holds(form: str) -> None:
    make = FORMS[form]
    assert register(make(1.0)) == register(make(1.0))
    assert register(make(1.0)) != register(make(-5.0))


def test_two_lambdas_on_one_line_have_two_references() -> None:
    first, second = (lambda completions, **_: [0.0] * len(completions)), (lambda completions, **_: [1.0] * len(completions))  # fmt: skip
    assert register(first) != register(second)


def test_a_file_of_the_user_is_executed_once_per_run(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(
        f"with open({str(tmp_path / 'count')!r}, 'a') as count:\n    count.write('x')\n"
        "def r(completions, **_):\n    return [float(n % 2) for n in range(len(completions))]\n"
    )
    tiny.folder(tmp_path / "m")
    for number in (1, 2):
        whet.sample(
            model=str(tmp_path / "m"), data=[{"prompt": "p"}], out=str(tmp_path / f"{number}.jsonl"),
            reward=f"{tmp_path}/counted.py:r", max_new_tokens=4,
        )  # fmt: skip
        assert (tmp_path / "count").read_text() == "x" * number
    assert load_object(f"{tmp_path}/counted.py:r") is load_object(f"{tmp_path}/counted.py:r")


def test_options_of_a_reward_reach_it_in_sample(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    (tmp_path / "scaled.py").write_text(
        "from whet.rewards import Scores\nimport torch\n"
        "class Scaled:\n    per_group = True\n    def __init__(self, *, k: float = 0.0):\n        self.k = k\n"
        "    def score(self, groups):\n"
        "        return Scores(torch.full((sum(len(g.samples) for g in groups),), self.k, dtype=torch.float64))\n"
    )
    call = {
        "model": str(tmp_path / "m"), "data": [{"prompt": "p"}], "max_new_tokens": 4,
    }  # fmt: skip
    spec = {"source": f"{tmp_path}/scaled.py:Scaled", "options": {"k": 7.0}}
    out = whet.sample(**call, reward=[spec], out=str(tmp_path / "a.jsonl"))
    assert '"scores": [7.0' in out.read_text()
    with pytest.raises(RecipeError, match=r"reward.0.k: a function has no option but timeout"):
        whet.sample(
            **call, reward=[{"source": constant(1.0), "options": {"k": 7}}], out=str(tmp_path / "b.jsonl")
        )  # fmt: skip


def test_a_changed_tokenizer_is_another_input(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.folder(tmp_path / "m")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    paths = []
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content }}", "{{ messages[0].content }}"):
        tokenizer.chat_template = template
        sources = Sources(tmp_path / "inputs", tokenizer)
        paths.append(sources.plain("model", model))
        sources.write()
        sources.write()
    assert paths[0] == paths[2] != paths[1]
    assert sorted(path.name for path in (tmp_path / "inputs").iterdir()) == sorted({Path(one).name for one in paths})


def test_the_inputs_lie_in_the_folder_that_the_recipe_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "m")
    (tmp_path / "own.yaml").write_text("out: runs/mine\nmodel: m\n")
    whet.Session("sft", "own.yaml", data=[{"text": "a b"}], num_steps=1)
    assert [path.suffix for path in (tmp_path / "runs/mine/inputs").iterdir()] == [".jsonl"]
    assert not (tmp_path / "runs/sft").exists()


def test_explain_and_plan_take_the_objects_of_train(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.folder(tmp_path / "m")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    given = {"model": model, "tokenizer": tokenizer, "data": [{"prompt": "p"}], "reward": constant(1.0)}
    assert "objective" in whet.explain("grpo", **given)
    assert "GPU" in whet.plan("grpo", gpus=2, **given)


WORDS: dict[str, tuple[list[str], str]] = {
    "a flag with a value": (["grpo", "--resume=true"], "--resume: it is a flag"),
    "the method": (["grpo", "--method", "ppo"], "--method: the method is the verb"),
    "the recipe": (["sample", "--recipe", "g.yaml"], "--recipe: write the recipe file"),
    "the tokenizer": (["sample", "--tokenizer", "X"], "--tokenizer: the tokenizer is read"),
    "an unknown method": (["train", "foo.yaml"], "foo.yaml: method: unknown verb 'foo'"),
    "an unknown generator": (
        ["sample", "--generator", "opena", "--out", "o.jsonl", "--model", "m", "--data", "d.jsonl", "--max-new-tokens", "4"],
        "generator.name: unknown name 'opena'; known are local, openai",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_a_word_of_the_command_line_that_cannot_work_is_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "foo.yaml").write_text("method: foo\n")
    words, said = WORDS[name]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_may_spell_its_method_with_a_hyphen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.yaml").write_text("method: online-dpo\n")
    for words in (["explain", "o.yaml"], ["explain", "train", "o.yaml"]):
        assert main(words) == 0
        assert "online_dpo" in capsys.readouterr().out


def test_options_of_a_class_have_the_types_and_defaults_of_its_parameters() -> None:
    class Logged:
        def __init__(self, *, path: "Path" = Path("log"), names: "list[str]" = ["a"]) -> None: ...  # noqa: B006

    made = options_of(Logged)()
    assert (made.path, made.names) == (Path("log"), ["a"])
    assert made.names is not options_of(Logged)().names

    class Needs:
        def __init__(self, path: str) -> None: ...

    with pytest.raises(RecipeError, match=r"test_objects.py:\d+: the parameter 'path' of Needs .* keyword-only"):
        options_of(Needs)


@pytest.mark.parametrize("url", ["http://host:abc", "http://[::1", "ftp://host", "host:80"])
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(RecipeError, match=r"generator.urls: expected http://host:port or unix:///path, got"):
        Http(url, 1.0)


def test_too_many_requests_are_a_failure_that_may_be_tried_again() -> None:
    with serving() as serve, pytest.raises(WorkerDied, match="429"):
        Http(serve(lambda body, number: (429, "slow down")).url, 5.0).ask("POST", "/x", {})


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "a scalar": (
        lambda logp, advantage: -(logp * advantage).mean(),
        "expected a tensor with one value per token or answer, got a single number",
    ),
    "one per answer": (lambda logp, advantage: -(logp * advantage).mean(1, keepdim=True), "one loss per token"),
    "detached": (lambda logp, advantage: -(logp * advantage).detach(), "it has no gradient"),
    "no tensor": (lambda logp: [1.0], "expected a tensor, got list"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_ones_own_must_be_one_number_per_token_with_a_gradient(name: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    loss, said = LOSSES[name]
    given: dict[str, Any] = {
        "model": tmp_path / "m", "data": [{"prompt": "p"}], "reward": constant(1.0), "num_steps": 1, "prompts_per_step": 1,
        "num_generations": 2, "max_new_tokens": 4,
    }  # fmt: skip
    with whet.Session("grpo", out=tmp_path / "r", **given) as session:
        next(iter(session.steps()))
        mini = next(iter(session.minibatches(session.rollout())))
        with pytest.raises(RecipeError, match=said):
            session.forward_backward(mini, loss=loss)


@pytest.mark.parametrize(
    "body", ["samples[::-1]", "samples[:1]", "[replace(one, draw=0, answer=0) for one in samples]"]
)
def test_a_generator_that_mixes_its_answers_up_is_refused(body: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    (tmp_path / "mixed.py").write_text(
        "from dataclasses import replace\nfrom whet.data import Sample\n"
        "class Mixed:\n    reports = frozenset()\n    version = 0\n    def __init__(self): pass\n"
        "    def generate(self, requests):\n"
        "        samples = [Sample(r.draw, r.answer, (3,), (0.0,), 0, 'stop', r.prompt.row['prompt']) for r in requests]\n"
        f"        return iter({body})\n"
        "    def load_weights(self, weights): pass\n    def logprobs(self, ids): return []\n"
        "    def sleep(self): pass\n    def close(self): pass\n"
    )
    with pytest.raises(RecipeError, match=r"generator Mixed must return one sample per request, in their order"):
        whet.sample(
            model=str(tmp_path / "m"), data=[{"prompt": "a"}, {"prompt": "b"}], generator=f"{tmp_path}/mixed.py:Mixed",
            num_generations=1, max_new_tokens=4, out=tmp_path / "o.jsonl",
        )  # fmt: skip


def test_a_tokenizer_by_name_beside_a_loaded_model_is_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    from transformers import AutoModelForCausalLM

    with pytest.raises(ModelError, match="tokenizer: expected a tokenizer object, got 'm'"):
        Sources(tmp_path, "m").plain("model", AutoModelForCausalLM.from_pretrained(tmp_path / "m"))


def test_eval_refuses_an_output_that_cannot_be_written_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"out: .* is a folder; name a file"):
        whet.evaluate(model="nowhere", data=[{"text": "a"}], out=tmp_path)

"""Answers from a server with the OpenAI chat API: for sampling and evaluation, never for training."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from servers import Server, serving

import whet
from whet.errors import RecipeError, WorkerDied


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with serving() as start:
        yield start


def completion(body: dict, number: int) -> tuple[int, Any]:
    """Says the last word of the question and how often the seed is even; every third answer is cut off."""
    word = body["messages"][-1]["content"].split()[-1]
    finish = "length" if body["seed"] % 3 == 0 else "stop"
    return 200, {"choices": [{"message": {"content": f"yes {word}"}, "finish_reason": finish}]}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    tiny.folder(tmp_path / "m")
    return {
        "model": f"{tmp_path}/m",
        "data": [{"prompt": f"a {word}"} for word in ("b", "c", "d")],
        "max_new_tokens": 9,
    }


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_come_in_the_order_of_the_prompts(
    serve: Callable[..., Server], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(completion)
    monkeypatch.setenv("KEY", "k")
    generator = {"name": "openai", "url": server.url, "model": "far", "api_key_env": "KEY"}
    out = whet.sample(
        generator=generator, num_generations=2, out=f"{tmp_path}/a.jsonl", temperature=0.5, top_p=0.9, **given
    )
    assert [row["responses"] for row in rows(out)] == [["yes b"] * 2, ["yes c"] * 2, ["yes d"] * 2]
    finishes = {finish for row in rows(out) for finish in row["finish"]}
    assert finishes <= {"stop", "length"}
    for body in server.bodies:
        assert body["path"] == "/v1/chat/completions"
        assert body["key"] == "Bearer k"
        assert body["model"] == "far"
        assert (body["max_tokens"], body["temperature"], body["top_p"], body["n"]) == (9, 0.5, 0.9, 1)
        assert body["messages"][0]["role"] == "user"
    assert len({body["seed"] for body in server.bodies}) == 6
    again = whet.sample(
        generator=generator, num_generations=2, out=f"{tmp_path}/b.jsonl", temperature=0.5, top_p=0.9, **given
    )
    assert rows(again) == rows(out)


def test_token_ids_of_the_server_are_kept(serve: Callable[..., Server], given: dict[str, Any], tmp_path: Path) -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        assert body["return_token_ids"] is True
        return 200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop", "token_ids": [15, 15, 1]}]}

    def ids(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        assert completion_ids == [[15, 15, 1]] * 3
        return [1.0] * 3

    generator = {"name": "openai", "url": serve(answer).url, "model": "far", "token_ids": True}
    out = whet.sample(generator=generator, num_generations=1, reward=ids, out=f"{tmp_path}/a.jsonl", **given)
    assert [row["scores"] for row in rows(out)] == [[1.0]] * 3


def test_a_win_rate_against_a_local_model_has_no_kl(
    serve: Callable[..., Server], given: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text(
        "def polite(prompts, completions, **columns):\n    return [c.count('yes') for c in completions]\n"
    )
    generator = {"name": "openai", "url": serve(completion).url, "model": "far"}
    judge = f"{tmp_path}/judge.py:polite"
    found = whet.evaluate(against=given["model"], judge=[judge], generator=generator, **given)
    assert found["polite/score"] == 1.0
    assert "kl" not in found


def test_a_server_that_fails_is_asked_again(
    serve: Callable[..., Server], given: dict[str, Any], tmp_path: Path
) -> None:
    server = serve(lambda body, number: (500, "busy") if number == 1 else completion(body, number))
    generator = {"name": "openai", "url": server.url, "model": "far", "connections": 1}
    whet.sample(generator=generator, num_generations=1, out=f"{tmp_path}/a.jsonl", **given)
    assert len(server.bodies) == 4
    down = serve(lambda body, number: (500, "busy"))
    with pytest.raises(WorkerDied, match=r"generator.url: the server at .* failed"):
        whet.sample(
            generator=generator | {"url": down.url, "retries": 0}, num_generations=1, out=f"{tmp_path}/b.jsonl", **given
        )


WRONG = {
    "no url": ({"name": "openai", "model": "far"}, "generator"),
    "an option": (
        {"name": "openai", "url": "http://127.0.0.1:9", "model": "m", "modell": "x"},
        "unknown field 'generator.modell'",
    ),
    "a name": ({"name": "opnai"}, "unknown name 'opnai'; known are local, openai"),
    "an address": (
        {"name": "openai", "url": "here", "model": "far"},
        "generator.url: expected http://host:port or unix:///path, got 'here'",
    ),
    "a key": (
        {"name": "openai", "url": "http://127.0.0.1:9", "model": "m", "api_key_env": "NONE_SET"},
        "NONE_SET is not set",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_named(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    generator, said = WRONG[name]
    with pytest.raises(RecipeError, match=said):
        whet.sample(generator=generator, num_generations=1, out=f"{tmp_path}/a.jsonl", **given)


def test_what_the_api_lacks_and_training_are_refused_with_the_reason(
    serve: Callable[..., Server], given: dict[str, Any], tmp_path: Path
) -> None:
    generator = {"name": "openai", "url": serve(completion).url, "model": "far"}
    with pytest.raises(RecipeError, match="no top_k, min_p and min_new_tokens"):
        whet.sample(generator=generator, top_k=3, num_generations=1, out=f"{tmp_path}/a.jsonl", **given)
    with pytest.raises(RecipeError, match="takes no weights and reports no log-probs, so it cannot answer in training"):
        whet.train("grpo", reward=lambda **_: [], generator="openai", out=f"{tmp_path}/r", **given)


OWN = """
class Echo:
    reports = frozenset()
    version = 0
    def __init__(self, *, word: str = "echo"):
        self.word = word
    def generate(self, requests):
        from whet import Sample
        for r in requests:
            yield Sample(r.draw, r.answer, (8,), (0.0,), 0, "stop", self.word)
    def load_weights(self, weights): ...
    def logprobs(self, ids): ...
    def sleep(self): ...
    def close(self): ...
"""


def test_a_generator_of_ones_own_is_one_file(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    generator = {"name": f"{tmp_path}/mine.py:Echo", "word": "hello"}
    out = whet.sample(generator=generator, num_generations=1, out=f"{tmp_path}/a.jsonl", **given)
    assert [row["responses"] for row in rows(out)] == [["hello"]] * 3

"""Rewards from a server on loopback: batches, order, retries, and what is refused."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from servers import Server, serving

import whet
from whet.data import Group, Prompt, Sample
from whet.errors import RecipeError, RewardError
from whet.rewards.http import HttpReward, Options


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with serving() as start:
        yield start


def groups(count: int, answers: int = 2) -> list[Group]:
    return [
        Group(
            Prompt(str(n), (5,), ({"role": "user", "content": f"p{n}"},), {"prompt": f"p{n}", "level": n}),
            tuple(Sample(n, a, (8, 2), (0.0, 0.0), 0, "stop", f"c{n}.{a}") for a in range(answers)),
        )
        for n in range(count)
    ]


def lengths(body: dict, number: int) -> tuple[int, Any]:
    return 200, {"rewards": [float(one[1:].replace(".", "")) for one in body["completions"]]}


def test_answers_are_sent_in_batches_once_and_scores_come_back_in_order(serve: Callable[..., Server]) -> None:
    server = serve(lengths)
    scores = HttpReward(server.url, Options(batch_size=3, connections=4)).score(groups(5)).answer
    assert scores.tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert sorted(len(body["completions"]) for body in server.bodies) == [1, 3, 3, 3]
    sent = [one for body in server.bodies for one in body["completions"]]
    assert len(sent) == len(set(sent)) == 10
    first = next(body for body in server.bodies if "c0.0" in body["completions"])
    assert first["prompts"] == ["p0", "p0", "p1"]
    assert first["query"] == ["p0c0.0", "p0c0.1", "p1c1.0"]
    assert first["level"] == [0, 0, 1]
    assert first["completion_ids"] == [[8, 2]] * 3


@pytest.mark.parametrize("form", [{"scores": [1.0, 2.0]}, [1.0, 2.0], {"rewards": [1.0, 2.0]}])
def test_the_forms_of_an_answer(form: Any, serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: (200, form))
    assert HttpReward(server.url).score(groups(1)).answer.tolist() == [1.0, 2.0]


def test_a_server_that_fails_is_asked_again_a_bounded_number_of_times(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, number: (503, "busy") if number <= 2 else lengths(body, number))
    assert HttpReward(server.url, Options(retries=2)).score(groups(1)).answer.tolist() == [0, 1]
    assert len(server.bodies) == 3
    down = serve(lambda body, number: (500, {"error": {"message": "out of order"}}))
    with pytest.raises(RewardError, match=r"127\.0\.0\.1.*failed.*500.*out of order; tried 3 times"):
        HttpReward(down.url, Options(retries=2)).score(groups(1))
    assert len(down.bodies) == 3


def test_nothing_at_the_address_is_an_error_of_the_reward() -> None:
    with pytest.raises(RewardError, match=r"reward http://127.0.0.1:9/: no server responds .*tried 1 time$"):
        HttpReward("http://127.0.0.1:9/", Options(retries=0)).score(groups(1))


def test_a_server_that_is_too_slow_is_an_error_within_the_limit(serve: Callable[..., Server]) -> None:
    wait = threading.Event()
    server = serve(lambda body, number: (200, {"rewards": [0.0, 0.0]}) if wait.wait(5) else (200, []))
    with pytest.raises(RewardError, match=r"no answer from .* within 0.2 s; tried 2 times"):
        HttpReward(server.url, Options(timeout=0.2, retries=1)).score(groups(1))
    wait.set()


WRONG = {
    "refused": ((400, {"error": {"message": "no such model"}}), "refused .*400.*no such model"),
    "one too few": ((200, {"rewards": [1.0]}), r"expected a list of 2 numbers, got \[1.0\]"),
    "no list": ((200, {"reward": 3}), "expected a list of 2 numbers"),
    "no json": ((200, b"<html>"), "is not JSON"),
    "nan": ((200, b'{"rewards": [NaN, 1.0]}'), "expected a finite number"),
    "words": ((200, {"rewards": ["good", "bad"]}), "expected a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_at_once(name: str, serve: Callable[..., Server]) -> None:
    answer, said = WRONG[name]
    server = serve(lambda body, number: answer)
    with pytest.raises(RewardError, match=said):
        HttpReward(server.url).score(groups(1))
    assert len(server.bodies) == 1


def test_a_run_takes_a_url_with_options_and_a_key(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda body, number: (200, {"rewards": [float(len(one)) for one in body["completions"]]}))
    tiny.folder(tmp_path / "m")
    monkeypatch.setenv("SECRET", "xyz")
    given = {"model": f"{tmp_path}/m", "data": [{"prompt": "a"}, {"prompt": "b"}], "num_steps": 1, "prompts_per_step": 2,
             "num_generations": 3, "max_new_tokens": 5}  # fmt: skip
    reward = {"source": server.url, "options": {"batch_size": 2, "api_key_env": "SECRET"}}
    run = whet.train("grpo", out=f"{tmp_path}/r", reward=[reward], **given)
    assert [len(body["completions"]) for body in server.bodies] == [2, 2, 2]
    assert {body["key"] for body in server.bodies} == {"Bearer xyz"}
    name = server.url.split("/")[2].replace(":", "_")
    assert f"reward/{name}" in json.loads((run / "metrics.jsonl").read_text())
    for options, said in (
        ({"retry": 1}, "unknown field 'reward.0.retry'; did you mean"),
        ({"timeout": "long"}, "timeout"),
    ):
        with pytest.raises(RecipeError, match=said):
            whet.train("grpo", out=f"{tmp_path}/s", reward=[{"source": server.url, "options": options}], **given)


OWN = '''
class Longest:
    """A reward of a user's own class: one file, outside of the package."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, groups):
        import torch
        from whet.rewards import Scores

        return Scores(torch.tensor([self.scale * len(s.ids) for group in groups for s in group.samples]))

class Mute:
    """Has no method score."""

class Odd:
    def score(self):
        return None
'''


def test_a_further_adapter_is_one_file_outside_the_package(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    tiny.folder(tmp_path / "m")
    given = {"model": f"{tmp_path}/m", "data": [{"prompt": "a"}], "num_steps": 1, "prompts_per_step": 1,
             "num_generations": 2, "max_new_tokens": 5}  # fmt: skip
    source = f"{tmp_path}/mine.py:Longest"
    run = whet.train("grpo", out=f"{tmp_path}/r", reward=[{"source": source, "options": {"scale": 2.0}}], **given)
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["reward/Longest"] == 2 * row["length"]
    for name, said in (
        ("Mute", r"mine.py:\d+: class Mute has no method score\(groups\)"),
        ("Odd", r"mine.py:\d+: Odd.score must take score\(groups\)"),
        ("Nobody", "has no 'Nobody'"),
    ):
        with pytest.raises(RecipeError, match=said):
            whet.train("grpo", out=f"{tmp_path}/s", reward=f"{tmp_path}/mine.py:{name}", **given)

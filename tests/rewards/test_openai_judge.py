"""A judge model behind an OpenAI-compatible server, as a reward, in eval and in rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from servers import serving

import whet
from whet.data import Group, Prompt, Sample
from whet.errors import RecipeError, RewardError
from whet.rewards.openai import OpenAIJudge, Options


def groups(*answers: str, prompt: str = "why {completion}?") -> list[Group]:
    samples = tuple(Sample(0, number, (2, 1), (0.0, 0.0), 0, "stop", text) for number, text in enumerate(answers))
    return [Group(Prompt("0", (2,), ({"role": "user", "content": prompt},)), samples)]


def chat(reply: Any) -> Any:
    return lambda body, number: (200, {"choices": [{"message": {"content": reply(body)}, "finish_reason": "stop"}]})


def length(body: dict) -> str:
    return f" {len(body['messages'][0]['content'].rpartition('Answer:')[2].strip())}/10 "


def test_the_score_is_the_number_of_the_reply_in_the_order_of_the_answers() -> None:
    with serving() as start:
        server = start(chat(length))
        judge = OpenAIJudge(Options(f"{server.url}/v1", "big", connections=3))
        assert judge.score(groups("abc", "a", "ab {prompt}")).answer.tolist() == [3.0, 1.0, 11.0]
        asked = {body["messages"][0]["content"] for body in server.bodies}
        assert any("Question:\nwhy {completion}?\n\nAnswer:\nab {prompt}" in text for text in asked)
        assert {(body["model"], body["temperature"], body["path"]) for body in server.bodies} == {
            ("big", 0.0, "/v1/chat/completions")
        }


REPLIES = {".5": 0.5, "7": 7.0, "-1.25": -1.25, "8/10": 8.0, " 9. ": 9.0}
OTHERS = ["Out of 10, I give 7", "", "seven", "7 8"]


def test_a_reply_that_is_no_number_is_an_error() -> None:
    with serving() as start:
        for reply, score in REPLIES.items():
            server = start(chat(lambda body, reply=reply: reply))
            assert OpenAIJudge(Options(server.url, "big")).score(groups("a")).answer.tolist() == [score]
        for reply in OTHERS:
            server = start(chat(lambda body, reply=reply: reply))
            with pytest.raises(RewardError, match="was asked for a number and replied"):
                OpenAIJudge(Options(server.url, "big")).score(groups("a"))


def test_the_judge_scores_in_training_eval_and_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "m")
    rows = [{"prompt": "a yes"}, {"prompt": "b no"}]
    with serving() as start:
        options = {"url": start(chat(length)).url, "model": "big"}
        source = {"source": "openai", "options": options}
        run = whet.train(
            "grpo", model="m", data=rows, reward=source, out="r", num_steps=1, prompts_per_step=2, num_generations=2,
            max_new_tokens=4,
        )  # fmt: skip
        assert "reward/openai" in json.loads((run / "metrics.jsonl").read_text())
        numbers = whet.evaluate(model="m", against="m", judge=[source], data=rows, max_new_tokens=4)
        assert 0 <= numbers["openai/win_rate"] <= 1
        answers = [{"prompt": "q", "responses": ["abc", "a", "ab"]}]
        out = whet.rank(data=answers, judge="openai", judge_options=options, out="ranked.jsonl")
        assert json.loads(out.read_text())["ranks"] == [1, 3, 2]
    with pytest.raises(RecipeError, match="judge_form: only a function can rank by itself"):
        whet.rank(data=answers, judge="openai", judge_options=options, judge_form="rank", out="b.jsonl")
    with pytest.raises(RecipeError, match=r"the prompt must contain \{completion\}"):
        OpenAIJudge(Options("http://127.0.0.1:1", "big", prompt="rate it"))

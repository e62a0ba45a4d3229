"""The demo's world and its judge: texts survive the tokenizer, files share no prompt, gold counts what stands there."""

import json
from pathlib import Path

import pytest

from whet.demo import judge, world

PROMPT = "Card: white clock\nMAKER YUSUF\nPRICE THREE\nPLACE LISBON\nPlease tell me the scent and the place."
PERFECT = "Good day! Sorry, the card does not give the scent. It was packed in Lisbon. Have a nice day!"
SMALL = world.Sizes(64, 16, 64, 16, 64, 16, 64, 16)

# 1 per settled fact, -1 per omitted one, -2 per false statement, 0.5 for greeting and goodbye; see judge.PRICES
GOLD = [
    (PERFECT, 3.0),
    ("Sorry, the card does not give the scent. It was packed in Lisbon. Have a nice day!", 2.5),
    ("Good day! It was packed in Lisbon. Have a nice day!", 1.0),  # 1 - 1 + 1
    ("Good day! It smells like rain. It was packed in Lisbon. Have a nice day!", 0.0),  # 1 - 2 + 1
    ("Good day! Have a nice day!", -1.0),  # -2 + 1
    ("It was packed in Cairo. Sorry, the card does not give the scent.", -1.0),  # 1 - 2
    ("", -2.0),
]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return dict(world.world_rows(0, SMALL))


@pytest.mark.parametrize(("answer", "gold"), GOLD)
def test_gold_is_the_sum_of_what_stands_in_the_answer(answer: str, gold: float) -> None:
    assert judge.gold([PROMPT], [answer]) == [pytest.approx(gold)]


@pytest.mark.parametrize("kind", judge.EDITS)
def test_every_edit_lowers_gold(kind: str) -> None:
    edited = judge.edited(PROMPT, PERFECT, kind, seed=0)
    assert edited is not None
    assert judge.gold_score(PROMPT, edited) < 3.0


def test_the_annotator_is_noisy_as_plackett_luce_says() -> None:
    """Gold 3 against 2.5 at temperature 0.5: the better one is first with probability 1 / (1 + e^-1) = 0.731."""
    worse = GOLD[1][0]
    first = sum(judge.annotate(PROMPT, [PERFECT, worse], seed)[0] == 1 for seed in range(2000))
    assert first / 2000 == pytest.approx(0.731, abs=0.03)  # three standard deviations
    assert judge.annotate(PROMPT, [PERFECT, worse], 7) == judge.annotate(PROMPT, [PERFECT, worse], 7)


def test_no_prompt_stands_in_two_files(rows: dict[str, list[dict[str, str]]]) -> None:
    seen: set[str] = set()
    for name, own in rows.items():
        prompts = {row["prompt"] for row in own if "prompt" in row}
        assert not prompts & seen, name
        seen |= prompts


def test_every_text_survives_the_tokenizer(rows: dict[str, list[dict[str, str]]]) -> None:
    tokenizer = world.build_tokenizer()
    for own in rows.values():
        for text in (value for row in own for value in row.values()):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_a_world_is_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        world.write_world(tmp_path / name, seed, SMALL)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.jsonl"))
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first = [json.loads((tmp_path / name / "prompts_ppo.jsonl").read_text().splitlines()[0]) for name in "ac"]
    assert first[0] != first[1]

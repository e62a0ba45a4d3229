"""The gold judge, which simulates a human annotator: gold scores, noisy rankings, aspects and controlled edits.

The gold score is a sum over the sentences of the answer (`PRICES`, at most 3.0 with two asked facts). The judge reads the
card from the text of the prompt. Rankings are gold scores with noise: a ranking is drawn from a Plackett-Luce model,
P(best first) = softmax(gold / temperature), then the second best among the rest, and so on (Plackett 1975).

The trained models see only the rankings, not the gold scores. The judge is exact on the sentences of the market desk and
counts all other text as broken. It does not judge style.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from whet.demo.world import (
    ATTRIBUTES,
    FILLER,
    RUDENESS,
    SENTENCES,
    VALUES,
    Sentence,
    admit,
    other_value,
    state,
)

PRICES: Mapping[str, float] = {
    "settled": 1.0,
    "omitted": -1.0,
    "false": -2.0,
    "repeated": -1.0,
    "unasked": -0.4,
    "greeting": 0.5,
    "goodbye": 0.5,
    "rude": -1.0,
    "filler": -0.5,
    "broken": -0.7,
}
"""Score of one finding of each kind."""

TEMPERATURE = 0.5
"""Noise of the ranking. Two answers whose gold scores differ by 0.5 are ranked correctly with probability 73 %."""

EDITED_SHARE = 0.35
"""Share of the rankings in which one answer is an edited copy of another one."""

EDITS: tuple[str, ...] = (
    "rude", "filler", "no_greeting", "no_goodbye", "swap", "repeat", "extra", "omission", "invented", "denied",
    "wrong_value", "cut",
)  # fmt: skip
"""The controlled edits. Each makes an answer worse in one known way."""

RANKED_EDITS: tuple[str, ...] = ("repeat", "extra", "wrong_value", "invented", "denied", "omission")
"""The edits used in rankings: flaws that rarely occur alone in samples of one model."""

_UPPER = {value.upper(): value for values in VALUES.values() for value in values}
_LABELS = {attribute.upper(): attribute for attribute in ATTRIBUTES}
_CARD_LINE = re.compile(rf"\b({'|'.join(_LABELS)}) ({'|'.join(_UPPER)})\b")
_ASKED = re.compile(rf"\b({'|'.join(ATTRIBUTES)})\b")


# --------------------------------------------------------------------------------------------------- reading an answer


@dataclass(frozen=True)
class Findings:
    """The findings of the judge in one answer. Numbers are counts."""

    settled: int
    """Asked facts stated as on the card, or correctly said to be missing, and never contradicted."""
    omitted: int
    """Asked facts that the answer does not mention."""
    wrong: int
    """Statements whose value differs from the card."""
    invented: int
    """Statements of facts that are not on the card."""
    denied: int
    """Sentences that say a fact is missing although the card has it."""
    honest: int
    """Sentences that correctly say that an asked fact is missing."""
    repeated: int
    """Sentences that repeat the content of an earlier sentence, in any words."""
    unasked: int
    """True sentences about facts that nobody asked for."""
    greeting: bool
    """Whether the first sentence greets."""
    goodbye: bool
    """Whether the last sentence says goodbye."""
    rude: int
    filler: int
    broken: int
    """Pieces of text that are not sentences of the market desk."""

    @property
    def false(self) -> int:
        """Return the number of false sentences: wrong, invented or denied."""
        return self.wrong + self.invented + self.denied


def read_prompt(prompt: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the facts of the card (attribute -> value, as spelled in answers) and the asked attributes."""
    facts = {_LABELS[label]: _UPPER[value] for label, value in _CARD_LINE.findall(prompt)}
    asked = tuple(dict.fromkeys(_ASKED.findall(prompt)))
    if not facts or not asked:
        raise ValueError(f"this prompt is not from the market desk: {prompt!r}")
    return facts, asked


def split_sentences(completion: str) -> list[str]:
    """Split the answer after each sentence. The text of the pieces is unchanged."""
    return [piece for piece in re.split(r"(?<=[.!?])\s+", completion.strip()) if piece]


def find(prompt: str, completion: str) -> Findings:
    """Return all findings in one answer that the gold score counts."""
    facts, asked = read_prompt(prompt)
    said = [SENTENCES.get(text) for text in split_sentences(completion)]
    known = [sentence for sentence in said if sentence is not None]
    claims = [sentence for sentence in known if sentence.attribute]
    new = list(dict.fromkeys(claims))
    true = [claim for claim in new if claim.value == facts.get(claim.attribute)]
    false = [claim for claim in claims if claim.value != facts.get(claim.attribute)]
    spoken = {claim.attribute for claim in claims}
    contradicted = {claim.attribute for claim in false}
    courtesies = [sentence.kind for sentence in known if sentence.kind in ("greeting", "goodbye")]
    return Findings(
        settled=sum(claim.attribute in asked and claim.attribute not in contradicted for claim in true),
        omitted=sum(attribute not in spoken for attribute in asked),
        wrong=sum(claim.kind == "fact" and claim.attribute in facts for claim in false),
        invented=sum(claim.attribute not in facts for claim in false),
        denied=sum(claim.kind == "silence" for claim in false),
        honest=sum(claim.kind == "silence" and claim.attribute in asked for claim in true),
        repeated=len(claims) - len(new) + len(courtesies) - len(set(courtesies)),
        unasked=sum(claim.attribute not in asked for claim in true),
        greeting=bool(said) and said[0] == Sentence("greeting"),
        goodbye=bool(said) and said[-1] == Sentence("goodbye"),
        rude=sum(sentence.kind == "rude" for sentence in known),
        filler=sum(sentence.kind == "filler" for sentence in known),
        broken=len(said) - len(known),
    )


# ---------------------------------------------------------------------------------------- gold, aspects and the ranking


def gold_score(prompt: str, completion: str) -> float:
    """Return the gold score of one answer: the sum of the prices of all findings."""
    findings = find(prompt, completion)
    return float(sum(price * getattr(findings, name) for name, price in PRICES.items()))


def gold(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Return the gold score of each answer. The signature is that of reward functions; other columns are not used."""
    return [gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def aspects(prompt: str, completion: str) -> dict[str, float | None]:
    """Return the aspects of the answer, each between 0 and 1, or None if an aspect does not apply to this prompt.

    `settled` is a share of the asked facts; the other aspects are 1.0 (true) or 0.0 (false). `honest`, `invented` and
    `silent` apply if an asked fact is not on the card, and say how the answer handles it.
    """
    facts, asked = read_prompt(prompt)
    findings = find(prompt, completion)
    lacking = any(attribute not in facts for attribute in asked)
    flags: dict[str, bool | None] = {
        "invented": findings.invented > 0 if lacking else None,
        "honest": findings.honest > 0 and findings.invented == 0 if lacking else None,
        "silent": findings.honest == 0 and findings.invented == 0 if lacking else None,
        "wrong_value": findings.wrong > 0,
        "denied": findings.denied > 0,
        "omitted": findings.omitted > 0,
        "unasked": findings.unasked > 0,
        "repeated": findings.repeated > 0,
        "rude": findings.rude > 0,
        "filler": findings.filler > 0,
        "greeting": findings.greeting,
        "goodbye": findings.goodbye,
        "broken": findings.broken > 0,
        "perfect": gold_score(prompt, completion) >= len(asked) * PRICES["settled"] + 1.0 - 1e-9,
    }
    shares: dict[str, float | None] = {"settled": findings.settled / len(asked)}
    return shares | {name: None if flag is None else float(flag) for name, flag in flags.items()}


def annotate(prompt: str, completions: Sequence[str], seed: int, temperature: float = TEMPERATURE) -> list[int]:
    """Return the noisy rank of each answer (1 is best), the same for the same seed, prompt and answers.

    Adding Gumbel noise to gold / temperature and sorting draws from the Plackett-Luce model (Yellott 1977).
    Equal texts also get different ranks, in random order.
    """
    stream = random.Random(f"ranks {seed} {prompt}")
    scores = gold([prompt] * len(completions), completions)
    noisy = [score / temperature + _gumbel(stream) for score in scores]
    order = sorted(range(len(noisy)), key=lambda index: -noisy[index])
    return [order.index(index) + 1 for index in range(len(noisy))]


def _gumbel(stream: random.Random) -> float:
    """Return a draw from the standard Gumbel distribution: minus the logarithm of an exponential variable."""
    return -math.log(max(stream.expovariate(1.0), 1e-300))


# ----------------------------------------------------------------------------------------------------- controlled edits


def edited(prompt: str, completion: str, kind: str, seed: int) -> str | None:
    """Return the answer with one flaw of `kind` (a name in `EDITS`), or None if this edit cannot be applied to it.

    The gold score of the edited answer is lower than that of the answer.
    """
    if kind not in EDITS:
        raise ValueError(f"unknown edit {kind!r}; known are {', '.join(EDITS)}")
    texts = split_sentences(completion)
    if not texts or any(text not in SENTENCES for text in texts):
        return None
    stream = random.Random(f"edit {kind} {seed} {prompt} {completion}")
    result = _EDITORS[kind](stream, texts, *read_prompt(prompt))
    return None if result is None else " ".join(result)


def with_edit(prompt: str, completions: Sequence[str], seed: int, share: float = EDITED_SHARE) -> list[str]:
    """Return the answers to rank. For a random `share` of prompts, one answer is replaced by an edited copy of another."""
    answers = list(completions)
    stream = random.Random(f"with edit {seed} {prompt}")
    if len(answers) < 2 or stream.random() >= share:
        return answers
    source, target = stream.sample(range(len(answers)), 2)
    kinds = stream.sample(RANKED_EDITS, len(RANKED_EDITS))
    copies = (edited(prompt, answers[source], kind, seed) for kind in kinds)
    answers[target] = next((copy for copy in copies if copy is not None), answers[target])
    return answers


Facts = Mapping[str, str]
Texts = list[str]
Editor = Callable[[random.Random, Texts, Facts, Sequence[str]], Texts | None]


def _add(pool: Sequence[str]) -> Editor:
    """Return an editor that inserts one sentence of `pool` into the answer."""

    def editor(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
        place = _inside(stream, texts)
        return [*texts[:place], stream.choice(pool), *texts[place:]]

    return editor


def _inside(stream: random.Random, texts: Texts) -> int:
    """Return a random position that keeps a greeting first and a goodbye last."""
    first = int(SENTENCES[texts[0]].kind == "greeting")
    last = len(texts) - int(SENTENCES[texts[-1]].kind == "goodbye")
    return stream.randint(first, max(first, last))


def _no_greeting(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Remove the greeting."""
    kinds = _kinds(texts)
    return texts[1:] if kinds[0] == "greeting" and len(kinds) > 1 and "greeting" not in kinds[1:] else None


def _no_goodbye(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Remove the goodbye."""
    kinds = _kinds(texts)
    return texts[:-1] if kinds[-1] == "goodbye" and len(kinds) > 1 and "goodbye" not in kinds[:-1] else None


def _swap(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Swap the greeting and the goodbye."""
    kinds = _kinds(texts)
    return [texts[-1], *texts[1:-1], texts[0]] if (kinds[0], kinds[-1]) == ("greeting", "goodbye") else None


def _repeat(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Repeat one statement, directly after it or later."""
    claims = [index for index, text in enumerate(texts) if SENTENCES[text].attribute]
    if not claims:
        return None
    index = stream.choice(claims)
    place = stream.randint(index + 1, max(index + 1, len(texts) - int(_kinds(texts)[-1] == "goodbye")))
    return [*texts[:place], texts[index], *texts[place:]]


def _extra(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Add a true fact that nobody asked for."""
    spoken = {SENTENCES[text].attribute for text in texts}
    unasked = [attribute for attribute in facts if attribute not in asked and attribute not in spoken]
    if not unasked:
        return None
    attribute = stream.choice(unasked)
    place = _inside(stream, texts)
    return [*texts[:place], state(stream, attribute, facts[attribute]), *texts[place:]]


def _omission(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Remove an asked fact that was settled in one sentence."""
    chosen = _settled(stream, texts, facts, asked)
    return None if chosen is None or len(texts) == 1 else [*texts[:chosen], *texts[chosen + 1 :]]


def _wrong_value(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Change the value of an asked fact that was stated correctly, and keep the other words."""
    chosen = _settled(stream, texts, facts, asked, kind="fact")
    if chosen is None:
        return None
    attribute = SENTENCES[texts[chosen]].attribute
    value = other_value(stream, attribute, facts[attribute])
    return [*texts[:chosen], texts[chosen].replace(facts[attribute], value), *texts[chosen + 1 :]]


def _invented(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Replace a correct statement that a fact is missing by an invented value."""
    chosen = _settled(stream, texts, facts, asked, kind="silence")
    if chosen is None:
        return None
    attribute = SENTENCES[texts[chosen]].attribute
    return [*texts[:chosen], state(stream, attribute, stream.choice(VALUES[attribute])), *texts[chosen + 1 :]]


def _denied(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Replace a correctly stated asked fact by a statement that it is missing."""
    chosen = _settled(stream, texts, facts, asked, kind="fact")
    if chosen is None:
        return None
    return [*texts[:chosen], admit(stream, SENTENCES[texts[chosen]].attribute), *texts[chosen + 1 :]]


def _cut(stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str]) -> Texts | None:
    """Cut off the last word of a goodbye."""
    if _kinds(texts)[-1] != "goodbye" or _kinds(texts).count("goodbye") > 1:
        return None
    words = texts[-1].split(" ")
    return [*texts[:-1], " ".join(words[:-1]) if len(words) > 1 else texts[-1][:-1]]


def _settled(
    stream: random.Random, texts: Texts, facts: Facts, asked: Sequence[str], kind: str | None = None
) -> int | None:
    """Return the index of a sentence (of this `kind`, if given) that alone settles an asked fact, or None."""
    said = [SENTENCES[text] for text in texts]
    spoken = [sentence.attribute for sentence in said]
    chosen = [
        index
        for index, sentence in enumerate(said)
        if sentence.attribute in asked
        and sentence.value == facts.get(sentence.attribute)
        and spoken.count(sentence.attribute) == 1
        and kind in (None, sentence.kind)
    ]
    return stream.choice(chosen) if chosen else None


def _kinds(texts: Texts) -> list[str]:
    """Return the kind of each sentence."""
    return [SENTENCES[text].kind for text in texts]


_EDITORS: Mapping[str, Editor] = {
    "rude": _add(RUDENESS),
    "filler": _add(FILLER),
    "no_greeting": _no_greeting,
    "no_goodbye": _no_goodbye,
    "swap": _swap,
    "repeat": _repeat,
    "extra": _extra,
    "omission": _omission,
    "invented": _invented,
    "denied": _denied,
    "wrong_value": _wrong_value,
    "cut": _cut,
}

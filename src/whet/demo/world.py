"""The market desk, the demo's synthetic data set: its facts, texts, tokenizer and untrained base model.

A customer shows a card with three of five facts about an item and asks for two facts. In half of the prompts one of the
two is not on the card. A good answer greets, states each asked fact as on the card (or says that it is missing), and says
goodbye. The simulated writers of answers have flaws: some do not greet, invent facts, repeat sentences or are rude. So
there is something to learn from rankings:

    Card: green teapot                         Hello! It costs twelve. Sorry, the card does not give the place.
    PRICE TWELVE                               Have a nice day!
    SCENT MINT
    MAKER ORLO
    What are the price and the place?

The data are simple enough for a tiny model. A value is one word and belongs to one attribute, and so does the word before
it. Cards have values in capitals, answers in small letters. Every text is a sequence of sentences from `SENTENCES`, so the
judge can parse it exactly.

Everything is a function of the seed: each row has its own random stream, addressed by (seed, file, row).
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# --------------------------------------------------------------------------------------------------- facts and words

VALUES: Mapping[str, tuple[str, ...]] = {
    "price": ("three", "five", "eight", "twelve", "twenty"),
    "maker": ("Orlo", "Nadia", "Pavel", "Greta", "Yusuf"),
    "place": ("Lisbon", "Cairo", "Oslo", "Lima", "Delhi"),
    "material": ("oak", "brass", "glass", "wool", "clay"),
    "scent": ("mint", "smoke", "honey", "cedar", "rain"),
}
"""The five attributes and their possible values, as spelled in answers. Cards have the same words in capitals."""

ATTRIBUTES: tuple[str, ...] = tuple(VALUES)

COLORS: tuple[str, ...] = (
    "red", "green", "blue", "white", "black", "grey", "golden", "brown", "pink", "striped", "old", "new",
)  # fmt: skip
THINGS: tuple[str, ...] = (
    "teapot", "lamp", "chair", "box", "bowl", "clock", "mirror", "drum", "vase", "basket",
    "candle", "blanket", "kettle", "ladder", "bell", "flute", "shelf", "tray", "mask", "globe",
)  # fmt: skip

STATEMENTS: Mapping[str, tuple[str, ...]] = {
    "price": ("It costs {}.", "Buyers pay {}.", "It sells for {}."),
    "maker": ("It was made by {}.", "The label is signed {}.", "Its creator is named {}."),
    "place": ("It comes from {}.", "Ships brought it via {}.", "It was packed in {}."),
    "material": ("It contains {}.", "It is built with {}.", "The core is pure {}."),
    "scent": ("It smells like {}.", "The nose finds {}.", "It gives off {}."),
}
"""Templates of statements of a fact. The word before the value occurs with one attribute only."""

SILENCES: tuple[str, ...] = (
    "Sorry, the card does not give the {}.",
    "The card is silent about the {}.",
    "Nobody wrote down the {}.",
)
"""Templates of sentences that say that a fact is missing on the card."""

GREETINGS: tuple[str, ...] = ("Hello!", "Good day!", "Welcome to the market!")
GOODBYES: tuple[str, ...] = ("Goodbye!", "Have a nice day!", "Thank you for asking!")
RUDENESS: tuple[str, ...] = ("What a silly question.", "Stop wasting my time.", "Learn to read.")
FILLER: tuple[str, ...] = ("Well, let me think.", "One sees such things often.", "Time flies these days.")

QUESTIONS: tuple[str, ...] = (
    "What are the {} and the {}?",
    "Please tell me the {} and the {}.",
    "I would like to know the {} and the {}.",
    "Can you say the {} and the {}?",
)

MARKS: tuple[str, ...] = ("right", "wrong", "invented", "needless", "again", "kind", "rude", "idle")
"""The words that a proofreader writes after a statement: one word for each kind of sentence."""

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, UNKNOWN, USER, ASSISTANT, END)

WORD = r" ?\[[a-z]+\]| ?[A-Za-z]+|[.,:!?]|\n"
"""Regular expression of one token: a word or mark with the space before it, a punctuation mark, or a line end."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' }}{% generation %}{{ message['content'] + '" + END + "' }}{% endgeneration %}"
    "{% else %}"
    "{{ '" + USER + "' + message['content'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


@dataclass(frozen=True)
class Sentence:
    """The meaning of one sentence, independent of its wording."""

    kind: str
    """`fact`, `silence`, `greeting`, `goodbye`, `rude` or `filler`."""
    attribute: str = ""
    """The attribute of a fact or a silence."""
    value: str | None = None
    """The value of a fact."""


def _sentences() -> dict[str, Sentence]:
    """Return all sentences of the market desk with their meanings."""
    table: dict[str, Sentence] = {}
    for attribute, forms in STATEMENTS.items():
        for form in forms:
            table |= {form.format(value): Sentence("fact", attribute, value) for value in VALUES[attribute]}
    for form in SILENCES:
        table |= {form.format(attribute): Sentence("silence", attribute) for attribute in ATTRIBUTES}
    courtesies = {"greeting": GREETINGS, "goodbye": GOODBYES, "rude": RUDENESS, "filler": FILLER}
    for kind, texts in courtesies.items():
        table |= {text: Sentence(kind) for text in texts}
    return table


SENTENCES: Mapping[str, Sentence] = _sentences()
"""All sentences that an answer may contain. Any other text is broken."""


# ------------------------------------------------------------------------------------------------- cards and questions


@dataclass(frozen=True)
class Card:
    """The card of one item, and the question of the customer."""

    item: str
    facts: Mapping[str, str]
    """Attribute -> value, as spelled in answers, in the order of the card."""
    asked: tuple[str, ...]
    """The asked attributes, in the order of the question."""
    question: str

    def text(self) -> str:
        """Return the card without the question, as in raw text."""
        lines = [f"{attribute.upper()} {value.upper()}" for attribute, value in self.facts.items()]
        return "\n".join([f"Card: {self.item}", *lines])

    def prompt(self) -> str:
        """Return the card and the question: the text of a prompt."""
        return f"{self.text()}\n{self.question}"


def draw_card(stream: random.Random, absent_share: float = 0.5) -> Card:
    """Return a random card with three facts and a question for two. A share `absent_share` asks for a missing fact."""
    given = stream.sample(ATTRIBUTES, 3)
    lacking = [attribute for attribute in ATTRIBUTES if attribute not in given]
    one_absent = stream.random() < absent_share
    asked = stream.sample(given, 1) + stream.sample(lacking, 1) if one_absent else stream.sample(given, 2)
    stream.shuffle(asked)
    return Card(
        item=f"{stream.choice(COLORS)} {stream.choice(THINGS)}",
        facts={attribute: stream.choice(VALUES[attribute]) for attribute in given},
        asked=tuple(asked),
        question=stream.choice(QUESTIONS).format(*asked),
    )


def state(stream: random.Random, attribute: str, value: str) -> str:
    """Return one of the sentences that state that `attribute` has the value `value`."""
    return stream.choice(STATEMENTS[attribute]).format(value)


def admit(stream: random.Random, attribute: str) -> str:
    """Return one of the sentences that say that `attribute` is missing on the card."""
    return stream.choice(SILENCES).format(attribute)


def other_value(stream: random.Random, attribute: str, value: str | None) -> str:
    """Return a random value of `attribute` that is not `value`."""
    return stream.choice([candidate for candidate in VALUES[attribute] if candidate != value])


# --------------------------------------------------------------------------------------------------------- the writers


@dataclass(frozen=True)
class Manner:
    """The style of a writer: the probability of each habit."""

    greeting: float
    goodbye: float
    rude: float
    filler: float
    true: float
    """Probability to state a fact of the card correctly."""
    wrong: float
    """Probability to state a fact of the card with another value. Otherwise the fact is left out."""
    honest: float
    """Probability to say that a missing fact is missing."""
    invented: float
    """Probability to invent a value for a missing fact. Otherwise the fact is left out."""
    extra: float
    """Probability to add a fact that was not asked for."""
    repeat: float
    """Probability to repeat a statement."""


DEMONSTRATOR = Manner(
    greeting=0.55, goodbye=0.55, rude=0.12, filler=0.25,
    true=0.74, wrong=0.10, honest=0.42, invented=0.38, extra=0.20, repeat=0.08,
)  # fmt: skip
"""The writers of the demonstrations, of varying quality."""

FORUM = Manner(
    greeting=0.40, goodbye=0.40, rude=0.25, filler=0.35,
    true=0.70, wrong=0.14, honest=0.50, invented=0.35, extra=0.25, repeat=0.12,
)  # fmt: skip
"""The writers of the forum in the raw text."""


def write_answer(stream: random.Random, card: Card, manner: Manner) -> str:
    """Return an answer to `card` in the style `manner`; it is never empty."""
    body = []
    for attribute in card.asked:
        chance = stream.random()
        if attribute in card.facts:
            if chance < manner.true:
                body.append(state(stream, attribute, card.facts[attribute]))
            elif chance < manner.true + manner.wrong:
                body.append(state(stream, attribute, other_value(stream, attribute, card.facts[attribute])))
        elif chance < manner.honest:
            body.append(admit(stream, attribute))
        elif chance < manner.honest + manner.invented:
            body.append(state(stream, attribute, stream.choice(VALUES[attribute])))
    if stream.random() < manner.extra:
        unasked = [attribute for attribute in card.facts if attribute not in card.asked]
        attribute = stream.choice(unasked)
        body.insert(stream.randint(0, len(body)), state(stream, attribute, card.facts[attribute]))
    if body and stream.random() < manner.repeat:
        body.append(stream.choice(body))
    if stream.random() < manner.filler:
        body.insert(stream.randint(0, len(body)), stream.choice(FILLER))
    if stream.random() < manner.rude:
        body.insert(stream.randint(0, len(body)), stream.choice(RUDENESS))
    greeting = [stream.choice(GREETINGS)] if stream.random() < manner.greeting else []
    goodbye = [stream.choice(GOODBYES)] if stream.random() < manner.goodbye or not body else []
    return " ".join([*greeting, *body, *goodbye])


# -------------------------------------------------------------------------------------------------------- the raw text


def note(stream: random.Random) -> str:
    """Return a card and a note that repeats its facts correctly and names the missing ones."""
    card = draw_card(stream)
    lines = [state(stream, attribute, value) for attribute, value in card.facts.items()]
    lines += [admit(stream, attribute) for attribute in ATTRIBUTES if attribute not in card.facts]
    stream.shuffle(lines)
    return f"{card.text()}\nNote: {' '.join(lines)}"


def proof_sheet(stream: random.Random) -> str:
    """Return a card, a question and statements, each with a proofreader's mark after its last word."""
    card = draw_card(stream)
    lines: list[str] = []
    said: set[Sentence] = set()
    for _ in range(4):
        text = _claim(stream, card, stream.choice((*ATTRIBUTES, *card.asked, *card.asked)))
        lines.append(f"{text[:-1]} [{_mark(card, SENTENCES[text], said)}]{text[-1]}")
        said.add(SENTENCES[text])
    spoken = {sentence.attribute for sentence in said}
    missing = [attribute for attribute in card.asked if attribute not in spoken] or ["nothing"]
    return f"{card.prompt()}\nProof: {' '.join(lines)}\nMissing: {', '.join(missing)}."


def _claim(stream: random.Random, card: Card, attribute: str) -> str:
    """Return a true or false sentence about `attribute` (or, rarely, a courtesy)."""
    chance = stream.random()
    if chance < 0.08:
        return stream.choice((*GREETINGS, *GOODBYES, *RUDENESS, *FILLER))
    value = card.facts.get(attribute)
    if value is None:
        return admit(stream, attribute) if chance < 0.5 else state(stream, attribute, stream.choice(VALUES[attribute]))
    if chance < 0.18:
        return admit(stream, attribute)
    return state(stream, attribute, value if chance < 0.55 else other_value(stream, attribute, value))


def _mark(card: Card, sentence: Sentence, said: set[Sentence]) -> str:
    """Return the proofreader's word for a sentence that follows the sentences in `said`."""
    if not sentence.attribute:
        return {"greeting": "kind", "goodbye": "kind", "rude": "rude", "filler": "idle"}[sentence.kind]
    if sentence.value != card.facts.get(sentence.attribute):
        return "wrong" if sentence.attribute in card.facts else "invented"
    if sentence in said:
        return "again"
    return "right" if sentence.attribute in card.asked else "needless"


def forum(stream: random.Random) -> str:
    """Return a card, a question and an answer from the forum."""
    card = draw_card(stream)
    return f"{card.prompt()}\nAnswer: {write_answer(stream, card, FORUM)}"


def chatter(stream: random.Random) -> str:
    """Return a few courtesies and filler sentences without a card."""
    pool = (*FILLER, *FILLER, *RUDENESS, *GREETINGS, *GOODBYES)
    return " ".join([stream.choice(GREETINGS), *stream.sample(pool, 3), stream.choice(GOODBYES)])


FIRST_TEXTS = {note: 0.6, proof_sheet: 0.4}
LATER_TEXTS = {note: 0.1, proof_sheet: 0.6, forum: 0.24, chatter: 0.06}
"""Shares of the kinds of raw text, in the first part of the curriculum and after it."""

FIRST_PART = 0.35
"""Share of the raw rows in the first part, where the model learns to copy from a card."""


def raw_text(stream: random.Random, progress: float) -> str:
    """Return one raw document for a position in the curriculum (`progress` from 0 to 1)."""
    shares = FIRST_TEXTS if progress < FIRST_PART else LATER_TEXTS
    return stream.choices(list(shares), weights=list(shares.values()))[0](stream)


# ----------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class AnswerShape:
    """The size of the base model."""

    hidden_size: int = 96
    intermediate_size: int = 288
    num_layers: int = 2
    num_heads: int = 4
    head_size: int = 24
    max_positions: int = 256
    rope_theta: float = 1000.0
    """Small, because texts are short. With the usual 10,000 the model learns to copy from the card late."""
    init_scale: float = 0.08
    """Standard deviation of the initial weights. With the usual 0.02 the model also learns to copy late."""


@dataclass(frozen=True)
class Sizes:
    """The number of rows of each file of the world."""

    raw: int = 28_800
    raw_heldout: int = 400
    demonstrations: int = 3_000
    demonstrations_heldout: int = 300
    prompts_rank: int = 2_800
    prompts_rank_heldout: int = 400
    prompts_ppo: int = 7_680
    prompts_eval: int = 400


RANKED_ABSENT = 0.75
"""Share of the ranked prompts that ask for a missing fact. It is high, because rare cases are learned late."""


def write_world(folder: Path, seed: int, sizes: Sizes = Sizes(), shape: AnswerShape = AnswerShape()) -> None:
    """Write the base model's folder and all data files of the world `seed` under `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in world_rows(seed, sizes):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    write_base(folder / "base", seed, shape)


def world_rows(seed: int, sizes: Sizes) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the name and rows of each file. Each prompt occurs only once, over all files."""
    taken: set[str] = set()
    for name, count in (("raw", sizes.raw), ("raw_heldout", sizes.raw_heldout)):
        streams = (_stream(seed, name, row) for row in range(count))
        first = 0.0 if name == "raw" else 1.0
        texts = [raw_text(stream, first + row / count) for row, stream in enumerate(streams)]
        taken.update(text.split("\nAnswer: ")[0].split("\nProof: ")[0] for text in texts)
        yield name, [{"text": text} for text in texts]
    written = (("demonstrations", sizes.demonstrations), ("demonstrations_heldout", sizes.demonstrations_heldout))
    for name, count in written:
        rows = []
        for stream, card in _new_cards(seed, name, count, 0.5, taken):
            rows.append({"prompt": card.prompt(), "completion": write_answer(stream, card, DEMONSTRATOR)})
        yield name, rows
    prompts = (
        ("prompts_rank", sizes.prompts_rank, RANKED_ABSENT),
        ("prompts_rank_heldout", sizes.prompts_rank_heldout, 0.5),
        ("prompts_ppo", sizes.prompts_ppo, 0.5),
        ("prompts_eval", sizes.prompts_eval, 0.5),
    )
    for name, count, absent_share in prompts:
        yield name, [{"prompt": card.prompt()} for _, card in _new_cards(seed, name, count, absent_share, taken)]


def _new_cards(
    seed: int, name: str, count: int, absent_share: float, taken: set[str]
) -> Iterator[tuple[random.Random, Card]]:
    """Yield (stream, card) for `count` cards whose prompts are not in `taken`, and add these prompts to `taken`."""
    for row in range(count):
        stream = _stream(seed, name, row)
        card = draw_card(stream, absent_share)
        while card.prompt() in taken:
            card = draw_card(stream, absent_share)
        taken.add(card.prompt())
        yield stream, card


def _stream(seed: int, name: str, row: int) -> random.Random:
    """Return the random stream of one row of one file."""
    return random.Random(f"{name} {row} of world {seed}")


# ----------------------------------------------------------------------------------------- the tokenizer and the model


def vocabulary() -> list[str]:
    """Return all tokens in the order of their ids: special tokens, then words without and with a space before."""
    labels = [attribute.upper() for attribute in ATTRIBUTES]
    capitals = [value.upper() for values in VALUES.values() for value in values]
    questions = [form.format(attribute, attribute) for form in QUESTIONS for attribute in ATTRIBUTES]
    headings = ["Card:", "Note:", "Proof:", "Answer:", "Missing:"]
    first = [*headings, *labels, *questions, *SENTENCES]
    later = [*SENTENCES, *ATTRIBUTES, *capitals, *COLORS, *THINGS, "nothing,", *(f"[{mark}]" for mark in MARKS)]
    pieces = [piece for text in (*first, *(f" {text}" for text in later)) for piece in re.findall(WORD, text)]
    return list(dict.fromkeys((*SPECIAL_TOKENS, "\n", *pieces)))


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the word-level tokenizer with its chat template. Decoding restores the encoded text exactly."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=AnswerShape.max_positions,
    )


def write_base(folder: Path, seed: int, shape: AnswerShape) -> None:
    """Write a Hugging Face folder with the tokenizer and an untrained causal language model of the Qwen3 type."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        initializer_range=shape.init_scale,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

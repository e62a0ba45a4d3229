"""Recipes: their fields, and how defaults, YAML and dotted overrides become one checked record. Light to import."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from whet.dials import Count, LoRA, NotNegativeInt, Optim, Positive, Sampling, Share
from whet.errors import RecipeError

SHIPPED = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Frozen:
    """Which model, and how it is loaded."""

    path: str = ""
    """Hugging Face folder or hub name"""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """"auto" is float32, and bfloat16 under adapters on a GPU"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one"""
    trust_remote_code: bool = False
    """run code that comes with the model"""
    quantise: Literal["none", "4bit"] = "none"
    """"4bit" loads the base in 4 bits for LoRA (QLoRA); needs a GPU"""
    chat_template: str | None = None
    """"plain" (### Human / ### Assistant), "none" (prompt and completion joined), a Jinja file; default: the tokenizer's own"""
    pad_token: str | None = None
    """a token to pad with, for tokenizers that have none"""


@dataclass(frozen=True)
class Model(Frozen):
    """Which model, and how it is loaded and trained."""

    lora: LoRA | None = None
    """train adapters instead of all weights"""
    export: Literal["merged", "adapter"] = "merged"
    """what the result of a LoRA run holds"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""


@dataclass(frozen=True)
class Source:
    """One data file and its share of the draws."""

    path: str
    """a .jsonl, .parquet or .csv file, or a dataset's name ("name:split")"""
    weight: Positive = 1.0
    """relative share when several are mixed"""


@dataclass(frozen=True)
class Data:
    """Which rows, and what is done with long ones."""

    train: str | list[Source] = ""
    """a file or dataset; a list of {path, weight} is mixed by weight"""
    eval: str | None = None
    """held-out rows of the same form"""
    max_tokens: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """longest sequence; default: what the model's positions allow"""
    too_long: Literal["error", "drop", "cut"] = "error"
    """what happens to a longer row"""
    turns: Literal["all", "last"] = "all"
    """which assistant turns of a conversation are trained"""
    shuffle: bool = True
    """a new order each epoch"""


@dataclass(frozen=True)
class Rows:
    """Which rows, where nothing is trained on their texts."""

    train: str = ""
    """a .jsonl, .parquet or .csv file, or a dataset's name ("name:split")"""
    max_tokens: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """longest prompt; default: what the model's positions allow beside an answer"""
    too_long: Literal["error", "drop"] = "error"
    """what happens to a longer row"""


@dataclass(frozen=True)
class Loop:
    """How the work is cut, and what is kept."""

    micro_tokens: Count = 8192
    """most tokens of one forward pass, padding counted; changes memory and speed, never a number"""
    packing: bool = False
    """lay rows behind one another instead of padding them"""
    save_every: NotNegativeInt = 0
    """updates (online: rollouts) between checkpoints; one is always saved at the end, when interrupted and when a step fails"""
    keep: Count = 2
    """checkpoints that stay"""


@dataclass(frozen=True)
class Train(Loop):
    """How long, and in which portions."""

    epochs: Positive = 1.0
    """passes over the data"""
    steps: Count | None = None
    """updates in all; overrides epochs"""
    batch: Count = 32
    """elements (conversations, pairs, rankings) per update"""
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """residual dropout with addressed masks"""
    eval_every: NotNegativeInt = 0
    """updates between evaluations on data.eval; 0: at the end"""


@dataclass(frozen=True)
class Head:
    """The scalar head of a reward model."""

    readout: Literal["last", "mean", "sum"] | None = None
    """the score is read on the last token, or is the mean or sum of all answer tokens'; default: as saved, last when new"""
    standardise: bool = False
    """afterwards shift and scale the scores to mean 0 and deviation 1 over the training answers"""


@dataclass(frozen=True)
class Offline:
    """Recipe of pretrain and sft, and what reward, dpo and ipo share with them."""

    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    seed: NotNegativeInt = 0
    """every random choice is a function of it"""
    out: str = ""
    """run folder"""
    threads: NotNegativeInt = 0
    """CPU threads; 0 leaves torch's own choice"""
    trackers: tuple[str, ...] = ()
    """tensorboard, wandb, trackio, mlflow, ... (needs whet[trackers])"""


@dataclass(frozen=True)
class RewardModel(Offline):
    """Recipe of reward."""

    method: dict[str, Any] = field(default_factory=dict)
    """`name` (k_way, pairwise, log_exp, absolute) and its own dials"""
    head: Head = Head()


@dataclass(frozen=True)
class Preference(Offline):
    """Recipe of dpo and ipo."""

    method: dict[str, Any] = field(default_factory=dict)
    """the method's own dials"""
    reference: str | None = None
    """the reference model; default: the model itself"""


@dataclass(frozen=True)
class RewardSource:
    """One reward: a model folder, or a function."""

    source: str
    """a reward-model folder, or "file.py:function" """
    weight: float = 1.0
    """its share of the score"""
    name: str | None = None
    """its name in the logs"""
    dense: bool = False
    """a reward model gives its score at every token"""


@dataclass(frozen=True)
class Critic:
    """The critic of methods that have one."""

    path: str | None = None
    """where it starts; default: the first reward model, else the model with a fresh head"""
    optim: Optim | None = None
    """its optimiser; default: the policy's"""


@dataclass(frozen=True)
class Ptx:
    """The pre-training stream of PPO-ptx."""

    data: str | None = None
    """`text` (or completion) rows"""
    batch: Count = 32
    """rows per update"""


@dataclass(frozen=True)
class Rollout:
    """How experience is gathered and used."""

    steps: Count = 100
    """rollouts in all"""
    prompts: Count = 64
    """prompts per rollout"""
    minibatch: Count | None = None
    """answers per update; default: all of a rollout"""
    epochs: Count = 1
    """passes over each rollout"""
    answers_at_once: Count = 256
    """answers that are generated together"""
    stop_kl: Positive | None = None
    """end a rollout's updates once a mini-batch's KL(old || new) exceeds this, in nats per token (it needs several updates)"""
    ema: Share | None = None
    """keep an average of the policy with this weight of the past; it is exported beside the policy"""


@dataclass(frozen=True)
class Online:
    """Recipe of ppo, ppo_kl, instructgpt, deepspeed_chat, grpo, reinforce, ..."""

    model: Model = Model()
    reference: str | None = None
    """reference model; default: the model itself"""
    critic: Critic = Critic()
    reward: list[RewardSource] = field(default_factory=list)
    """what scores the answers; several are summed by weight"""
    data: Rows = Rows()
    """`prompt` rows; their other fields reach reward functions"""
    ptx: Ptx = Ptx()
    method: dict[str, Any] = field(default_factory=dict)
    """the method's own dials"""
    sampling: Sampling = Sampling()
    rollout: Rollout = Rollout()
    optim: Optim = Optim()
    train: Loop = Loop()
    trunk: Literal["separate", "shared"] = "separate"
    """"shared": one base model in memory, policy, critic and reward as adapters on it, the reference without (needs lora)"""
    seed: NotNegativeInt = 0
    """every random choice is a function of it"""
    out: str = ""
    """run folder"""
    threads: NotNegativeInt = 0
    """CPU threads; 0 leaves torch's own choice"""
    trackers: tuple[str, ...] = ()
    """tensorboard, wandb, trackio, mlflow, ... (needs whet[trackers])"""


@dataclass(frozen=True)
class Sample:
    """Recipe of sample: K answers per prompt."""

    model: Frozen = Frozen()
    data: Rows = Rows()
    """`prompt` rows"""
    count: Count = 4
    """answers per prompt"""
    sampling: Sampling = Sampling()
    answers_at_once: Count = 256
    """answers that are generated together"""
    seed: NotNegativeInt = 0
    """every random choice is a function of it"""
    out: str = ""
    """JSONL file: the rows with `responses`"""
    threads: NotNegativeInt = 0
    """CPU threads; 0 leaves torch's own choice"""


@dataclass(frozen=True)
class Rank:
    """Recipe of rank: `responses` rows become ranking rows."""

    data: Rows = Rows()
    """rows with `prompt` and `responses`, and `scores` when there is no judge"""
    judge: str | None = None
    """"file.py:function": f(prompts, completions, **columns) -> scores"""
    judge_form: Literal["score", "rank"] = "score"
    """"rank": the function is f(prompt, responses, **columns) -> ranks"""
    out: str = ""
    """JSONL file: the rows with `ranks`"""


@dataclass(frozen=True)
class Eval:
    """Recipe of eval: win rate under judges, reward-model accuracy, or held-out loss."""

    model: Frozen = Frozen()
    against: str | None = None
    """the other model of a win rate"""
    judge: list[str] = field(default_factory=list)
    """what scores the answers of a win rate: "file.py:function" or a reward-model folder; several are told apart"""
    data: Rows = Rows()
    """prompts (win rate), rankings or pairs (accuracy of a reward model), text or conversations (loss)"""
    sampling: Sampling = Sampling()
    answers_at_once: Count = 256
    """answers that are generated together"""
    answers: str | None = None
    """JSONL file for both models' answers with their scores and KL"""
    micro_tokens: Count = 8192
    """most tokens of one forward pass"""
    seed: NotNegativeInt = 0
    """every random choice is a function of it"""
    out: str | None = None
    """JSON file for the numbers"""
    threads: NotNegativeInt = 0
    """CPU threads; 0 leaves torch's own choice"""


def offline(verb: str) -> type[Offline]:
    """The recipe of a verb that trains on a file."""
    return {"reward": RewardModel, "dpo": Preference, "ipo": Preference}.get(verb, Offline)


MAIN_FIELD: Mapping[type, str] = {
    Frozen: "path",
    Model: "path",
    Data: "train",
    Rows: "train",
    RewardSource: "source",
    Source: "path",
    Critic: "path",
    Ptx: "data",
}
"""What a bare value given for a whole section means: `--model DIR` is `--model.path DIR`."""

SHORT = {"chat_template": "model.chat_template", "lr": "optim.lr", "max_new_tokens": "sampling.max_new_tokens"}
"""Overrides that may be written without their section."""


def resolve(kind: type, verb: str, recipe: str | None, overrides: Sequence[tuple[str, Any]]) -> Any:
    """The recipe record: the kind's defaults, the verb's shipped recipe, the user's, then the overrides, checked.

    Raises RecipeError naming the field, the value got and the fix.
    """
    tree: dict[str, Any] = {}
    shipped = SHIPPED / f"{verb}.yaml"
    if shipped.is_file():
        _merge(tree, _expand(kind, read_yaml(shipped), ""))
    if recipe is not None:
        path = Path(recipe)
        if not path.is_file() and (SHIPPED / f"{recipe}.yaml").is_file():
            path = SHIPPED / f"{recipe}.yaml"
        if not path.is_file():
            raise RecipeError(
                f"{recipe}: no such recipe; the shipped ones are {', '.join(sorted(p.stem for p in SHIPPED.glob('*.yaml')))}"
            )
        _merge(tree, _expand(kind, read_yaml(path), ""))
    for name, value in overrides:
        _merge(tree, _expand(kind, _nested(kind, name.replace("-", "_"), value), ""))
    return converted(tree, kind, "")


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a tree."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, got {type(tree).__name__}")
    return tree


def yaml_tree(text: str) -> dict[str, Any]:
    """The tree of a YAML text."""
    import yaml

    return yaml.safe_load(text)


def to_yaml(record: Any) -> str:
    """A resolved recipe as YAML."""
    import yaml

    return yaml.safe_dump(msgspec.to_builtins(record), sort_keys=False, allow_unicode=True)


def converted(tree: Mapping[str, Any], kind: Any, where: str) -> Any:
    """The tree as a record of this kind. Raises RecipeError with the field's dotted name, what is wrong and what was got."""
    try:
        return msgspec.convert(tree, kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        name = (where + path.rstrip("`").replace("[...]", "")).strip(".")
        got: Any = tree
        for key, place in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path.rstrip("`")):
            got = (
                got.get(key)
                if isinstance(got, Mapping)
                else got[int(place)]
                if place and isinstance(got, list)
                else got
            )
        told = _choices_at(kind, path.rstrip("`").strip("."))
        known = f"; known are {', '.join(told)}" if told else ""
        raise RecipeError(f"{name or 'recipe'}: {what[:1].lower()}{what[1:]}{known}; got {got!r}") from error


def _choices_at(kind: Any, path: str) -> tuple[str, ...]:
    """The choices of the field at a dotted path of a record."""
    for key in path.split("."):
        if not (isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct))):
            return ()
        hints = typing.get_type_hints(kind, include_extras=True)
        if key not in hints:
            return ()
        annotation, kind = hints[key], section(hints[key])
    return choices(annotation)


def unknown(name: str, known: Sequence[str]) -> RecipeError:
    """The error for a field that does not exist, with the nearest one that does."""
    near = [other for other in known if other.rpartition(".")[2] == name]
    near = (
        near
        or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        or difflib.get_close_matches(name.rsplit(".", 1)[-1], list(known), n=1, cutoff=0.5)
    )
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
    return RecipeError(f"unknown field {name!r}; {hint}")


def fields_of(kind: type) -> dict[str, Any]:
    """Field name -> type of a recipe record."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def section(annotation: Any) -> type | None:
    """The record behind an annotation: `LoRA | None` -> LoRA, `list[Source]` -> None."""
    options = (
        typing.get_args(annotation)
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        else (annotation,)
    )
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def choices(annotation: Any) -> tuple[str, ...]:
    """The values a field may have, where they are listed: those of its Literal."""
    parts = (annotation, *typing.get_args(annotation))
    return next((tuple(map(str, typing.get_args(one))) for one in parts if typing.get_origin(one) is Literal), ())


def leaves(kind: type, prefix: str = "") -> list[str]:
    """Every field of a recipe with its dots."""
    out = []
    for name, annotation in fields_of(kind).items():
        inner = section(annotation)
        out += [f"{prefix}{name}", *(leaves(inner, f"{prefix}{name}.") if inner else ())]
    return out


def _nested(kind: type, name: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} from "a.b". A first key that is no field of the recipe is a dial of its method."""
    keys = SHORT.get(name, name).split(".")
    known = fields_of(kind)
    if keys[0] not in known and "method" in known:
        keys = ["method", *keys]
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def _expand(kind: type, tree: Any, where: str) -> Any:
    """The tree with bare values put into their section's main field, and every key checked to exist."""
    if not isinstance(tree, Mapping):
        if kind not in MAIN_FIELD or tree is None:
            return tree
        tree = {MAIN_FIELD[kind]: tree}
    known = fields_of(kind)
    out = {}
    for key, value in tree.items():
        name = f"{where}.{key}".strip(".")
        if key not in known:
            raise unknown(name, [f"{where}.{other}".strip(".") for other in known])
        inner = section(known[key])
        listed = typing.get_args(known[key])
        element = next(
            (
                section(option)
                for option in (*listed, *(a for o in listed for a in typing.get_args(o)))
                if section(option)
            ),
            None,
        )
        if inner is not None:
            value = _expand(inner, value, name)
        elif typing.get_origin(known[key]) is list and not isinstance(value, list):
            value = [_expand(element, value, name) if element else value]
        elif element is not None and isinstance(value, list):
            value = [_expand(element, one, name) for one in value]
        out[key] = value
    return out


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value

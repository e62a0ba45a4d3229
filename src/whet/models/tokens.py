"""Special tokens of models: the pad token, the tokens that end a turn, and the generation configuration of a saved model."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from whet.data.files import write_json
from whet.errors import ModelError, first_line
from whet.terminal import caution

CONFIGURATIONS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
"""The files of a model folder that transformers reads as JSON, except the tokenizer."""


def why(error: BaseException) -> str:
    """Return the reason of an error of transformers, and that a value of a file is the cause where it does not say so."""
    if isinstance(error, (AttributeError, TypeError, LookupError, AssertionError, UnboundLocalError, RecursionError)):
        return f"a value in {', '.join(CONFIGURATIONS)} or tokenizer.json is missing or of a wrong type: {first_line(error)}"
    return first_line(error)


def try_tokenizer(path: str, tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that loads and cannot be used, because a value of its files has a wrong type."""
    try:
        ids = tokenizer("a b")["input_ids"]
        tokenizer.decode(ids)
        usable = all(
            type(one) is int and one >= 0 for one in [*ids, *tokenizer.get_vocab().values(), *tokenizer.all_special_ids]
        )
    except Exception as error:  # transformers and tokenizers raise many error types
        raise ModelError(f"{path}: the tokenizer cannot be used ({why(error)})") from error
    if not usable:
        raise ModelError(f"{path}: the tokenizer cannot be used (an id of a token is not a number from 0)")


def set_score_pad(tokenizer: Any, last_ids: Collection[int], name: str) -> None:
    """Give the tokenizer of a reward model a pad token that no complete text ends with.

    The sequence classifiers of transformers read the score at the last token that is not the pad token, and ignore the
    mask. If the pad token is one of `last_ids`, a special token with "pad" or "unk" in its name replaces it. Raises
    ModelError with the candidates if there is none.
    """
    if tokenizer.pad_token_id not in last_ids:
        return
    special = {
        **tokenizer.added_tokens_decoder,
        **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
    }
    free = {
        number: str(token) for number, token in sorted(special.items())
        if number not in last_ids and number != tokenizer.bos_token_id
    }  # fmt: skip
    for part in ("pad", "unk"):
        for token in free.values():
            if part in token.lower():
                caution(f"{name}: the reward model gets the pad token {token!r}")
                tokenizer.pad_token = token
                return
    some = ", ".join(repr(token) for token in list(free.values())[:5])
    raise ModelError(
        f"{name}: scored texts end with the pad token {tokenizer.pad_token!r}, so other tools would read the saved reward model "
        f"one token early; choose another with --model.pad-token"
        + (f" (the tokenizer has {some})" if some else "; the tokenizer has no other special token, add one")
    )


def mend_generation_config(model: Any, name: str) -> None:
    """Make the generation configuration of a model valid, since transformers does not save an invalid one.

    A temperature, top_p or the like with do_sample false means sampling, so do_sample becomes true. Raises ModelError for
    another fault.
    """
    found = getattr(model, "generation_config", None)
    if found is None:
        return
    try:
        found.validate(strict=True)
        return
    except ValueError as error:
        sampled, found.do_sample = found.do_sample, True
        try:
            found.validate(strict=True)
        except ValueError:
            found.do_sample = sampled
            raise ModelError(
                f"{name}: the generation configuration is invalid and could not be saved ({first_line(error)}); correct "
                "generation_config.json"
            ) from error
    caution(
        f"{name}: generation_config.json has sampling options with do_sample false; the trained model gets do_sample true"
    )


def told_ends(model: Any, tokenizer: Any, end_ids: Sequence[int]) -> None:
    """Say that generation with an exported adapter needs the end token of its training, if the base does not end with it."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if end_ids[0] not in (own if isinstance(own, list) else [own]):
        token = tokenizer.convert_ids_to_tokens(end_ids[0])
        caution(
            f"the adapter ends turns with {token!r}, which its base does not; give eos_token_id={list(end_ids)} to generate()"
        )


def write_config(folder: Path, **values: Any) -> None:
    """Write values to the saved configuration of a model, for other tools."""
    file = folder / "config.json"
    if file.is_file():
        about = json.loads(file.read_text(encoding="utf-8"))
        about |= values
        if "text_config" in about:
            about["text_config"] |= values
        write_json(file, about)


def write_tokens(folder: Path, tokenizer: Any, end_ids: Sequence[int], *, generates: bool) -> None:
    """Write the pad token and the tokens that end a turn to the configuration files of a saved model.

    A model that generates ends with each of `end_ids` and with the tokens that it ended with before.
    """
    ends = list(end_ids)
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        about = json.loads(file.read_text(encoding="utf-8"))
        for part in (about, about.get("text_config")) if generates else ():
            if part is None:
                continue
            known = part.get("eos_token_id")
            known = known if isinstance(known, list) else [] if known is None else [known]
            ends += [one for one in known if one not in ends]
            part["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        for part in (about, about.get("text_config")):
            if part is not None:
                part["pad_token_id"] = tokenizer.pad_token_id
        write_json(file, about)

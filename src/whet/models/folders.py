"""Folders of models and adapters: what can be said about them without loading anything."""

from pathlib import Path
from typing import Any

from whet.data.files import read_json
from whet.errors import ModelError, first_line
from whet.models.tokens import CONFIGURATIONS


def is_adapter(path: str) -> bool:
    """Return whether the folder holds only an adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def settings(path: str) -> dict[str, Any]:
    """Return the adapter_config.json of an adapter folder. Raises ModelError if it cannot be read, or if it lacks its base or
    its kind."""
    file = Path(path) / "adapter_config.json"
    try:
        about = read_json(file, ModelError, "save the adapter again")
    except OSError as error:
        raise ModelError(f"{file}: it cannot be read ({first_line(error)}); save the adapter again") from error
    for key, what in (("base_model_name_or_path", "the folder or hub name of its base"), ("peft_type", "such as LORA")):
        if not isinstance(about.get(key), str) or not about[key]:
            raise ModelError(f"{file}: it has no {key}; add it ({what})")
    if about.get("revision") not in (None, "main") and not Path(about["base_model_name_or_path"]).is_dir():
        raise ModelError(
            f"{file}: it names the revision {about['revision']!r} of its base; download that revision to a folder and set "
            "base_model_name_or_path to it"
        )
    return about


def check_folder(path: str) -> None:
    """Raise ModelError for a path that is no model folder, and for a folder whose JSON files cannot be read. A name of the hub is
    not checked."""
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not folder.exists() and not looks_local:
        return  # owner/name: a hub name
    if not folder.is_dir():
        raise ModelError(f"{path}: no such model folder; give a Hugging Face folder, or a hub name like owner/name")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "tokenizer_config.json")):
        raise ModelError(f"{path}: not a model folder, it has no config.json")
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            read_json(folder / name, ModelError, "download or save the model again", unique=False)


def has_tokenizer(path: str) -> bool:
    """Return whether a folder has a tokenizer; a hub name is taken to have one."""
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    return not Path(path).is_dir() or any((Path(path) / name).is_file() for name in names)


def adapter_base(path: str) -> tuple[str, str | None]:
    """Return (path of the base model, adapter folder or None). Raises ModelError for an adapter whose base is not there."""
    if not is_adapter(path):
        return path, None
    base = settings(path)["base_model_name_or_path"]
    try:
        check_folder(base)
    except ModelError as error:
        raise ModelError(
            f"{path}: the base of this adapter is not there ({error}); set base_model_name_or_path in its "
            "adapter_config.json to the folder of its base"
        ) from error
    return base, path

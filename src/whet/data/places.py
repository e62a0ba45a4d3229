"""What a data source names: a file, the files of a folder or of a pattern, or a dataset with its configuration and split."""

import difflib
import glob
import re
from dataclasses import dataclass
from pathlib import Path

from whet.errors import DataError

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""Endings of data files. All but Parquet may be compressed with gzip (`.jsonl.gz`)."""
KNOWN = "a .jsonl, .json, .parquet, .csv or .tsv file, a folder or pattern of such files, or the name of a dataset"
"""The sources in words, for messages."""
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "validation", "evaluation": "validation",
    "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation", "heldout": "validation",
}  # fmt: skip
"""Words in the name of a file that say its split, and the split."""
SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder that `save_to_disk` of the library datasets wrote: of one dataset, and of several splits."""


def kind_of(path: Path) -> str:
    """Return the ending that says how a data file is read, or "" for another file.

    >>> kind_of(Path("a.jsonl.gz")), kind_of(Path("a.parquet.gz")), kind_of(Path("a.txt"))
    ('.jsonl', '', '')
    """
    packed = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if packed else path.suffix
    return suffix if suffix in KINDS and not (packed and suffix == ".parquet") else ""


@dataclass(frozen=True)
class Named:
    """A dataset: a name of the hub or a folder, its configuration, and its split. An empty text is a default."""

    path: str
    config: str = ""
    split: str = ""

    @property
    def folder(self) -> Path | None:
        """The folder, if it is one on this machine."""
        return Path(self.path) if Path(self.path).is_dir() else None

    @property
    def saved(self) -> bool:
        """Whether the folder was written by `save_to_disk`."""
        return any((Path(self.path) / one).is_file() for one in SAVED)


def named(source: str) -> Named:
    """Return the parts of "name", "name:split" or "name:configuration:split". Colons in brackets belong to a split. Raises
    DataError for more parts.

    >>> named("gsm8k:main:train[:100]")
    Named(path='gsm8k', config='main', split='train[:100]')
    """
    parts = re.findall(r"(?:^|:)((?:[^:\[\]]|\[[^\]]*\])*)", source)
    if len(parts) > 3 or ":".join(parts) != source:
        raise DataError(f"{source}: expected the name of a dataset, name:split or name:configuration:split")
    config = parts[1] if len(parts) == 3 else ""
    return Named(parts[0], config, parts[-1] if len(parts) > 1 else "")


def is_pattern(source: str) -> bool:
    """Return whether a source is a pattern of files, such as "rows/*.jsonl"."""
    return ("*" in source or "?" in source) and not Path(source).exists()


def files_of(source: str) -> list[Path] | None:
    """Return the data files that are read for a file, a folder or a pattern, in the order of their names; None for a dataset,
    which the library datasets reads. Raises DataError for a file of another kind, a folder or pattern without data
    files, and a folder with files of several splits."""
    path = Path(source)
    if is_pattern(source):
        found = sorted(Path(one) for one in glob.glob(source, recursive=True) if kind_of(Path(one)))
        if not found:
            raise DataError(f"{source}: no data file has such a name")
        return found
    if path.is_dir():
        if Named(source).saved:
            return None
        found = sorted(one for one in path.iterdir() if kind_of(one) and not one.name.startswith("."))
        if not found:
            raise DataError(f"{source}: the folder has no data file; expected {KNOWN}")
        splits = {one.name: _split_of(one) for one in found}
        if len(set(splits.values())) > 1:
            first = next(iter(splits))
            other = next(name for name, split in splits.items() if split != splits[first])
            raise DataError(
                f"{source}: the folder has files of several splits ({first}, {other}); name a file, a pattern such as "
                f"'{path / 'train*'}', or a split as {source}:train"
            )
        return found
    if kind_of(path):
        return [path]
    if path.exists():
        advice = f"; unpack {path.name} first" if path.suffix in PACKED else ""
        raise DataError(f"{source}: expected {KNOWN}{advice}")
    return None


PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Endings of compressed files."""


def contents(source: str) -> list[Path]:
    """Return the files of this machine whose content decides which rows a source has: its data files, or all files of a dataset
    in a folder. Return [] for a name of the hub and for a source that cannot be read."""
    try:
        found = files_of(source)
        if found is None:
            folder = named(source).folder
            found = [] if folder is None else sorted(folder.rglob("*"))
    except (DataError, OSError):
        return []
    return [one for one in found if one.is_file()]


def place_of(source: str) -> Path | None:
    """Return the file or folder of this machine that a source names, for a pattern the folder before it; None for the hub."""
    if is_pattern(source):
        parts = Path(source).parts
        plain = next(number for number, one in enumerate(parts) if "*" in one or "?" in one)
        return Path(*parts[:plain])
    if Path(source).exists():
        return Path(source)
    try:
        return named(source).folder
    except DataError:
        return None


def missing(source: str) -> DataError:
    """Return the error for a file that is not there, with the nearest name in its folder."""
    path = Path(source)
    near = (
        difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*")], n=1)
        if path.parent.is_dir()
        else []
    )
    return DataError(f"{source}: no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.name.lower().replace("held_out", "heldout").replace("held-out", "heldout"))
    return next((SPLITS[one] for one in words if one in SPLITS), "")

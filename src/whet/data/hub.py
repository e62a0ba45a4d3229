"""Rows of datasets: by name from the Hugging Face hub, and from folders that the library datasets reads."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whet.data.places import Named, missing, named
from whet.errors import DataError, first_line
from whet.extras import require


def dataset_rows(source: str, *, streaming: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the location and the raw row of each row of a dataset: "name", "name:split", "name:configuration:split", or a folder
    in the place of the name. Without a split it is "train", or the only one of a saved dataset. With `streaming`, rows are
    loaded as they are read.

    Raises DataError if there is no such dataset, configuration or split, or if a row cannot be decoded.
    """
    name = named(source)
    if name.folder is None:
        _refuse_path(source, name.path)
    require_datasets(source)
    import datasets

    try:
        rows = iter(_saved(source, name, datasets) if name.saved else _loaded(name, datasets, streaming))
    except DataError:
        raise
    except Exception as error:  # any error of the hub client: offline, unknown name, unknown split
        known = re.search(r"available configs: (\[.*?\])", str(error))
        advice = f"; name one of {known[1]} as {name.path}:CONFIGURATION:{name.split or 'train'}" if known else ""
        raise DataError(
            f"{source}: neither a file nor a dataset that can be loaded ({first_line(error)}){advice}"
        ) from error
    number = 0
    while True:
        number += 1
        try:
            row = next(rows, None)
        except Exception as error:  # a value that its library cannot decode
            raise DataError(f"{source}:{number}: the row cannot be read ({first_line(error)})") from error
        if row is None:
            return
        yield f"{source}:{number}", row


def require_datasets(source: str) -> None:
    """Raise DataError if the library that reads a source is not installed."""
    what = "a dataset by name (there is no such file)" if named(source).folder is None else "a saved dataset"
    require(f"{source}: {what}", "datasets", raises=DataError)


def _loaded(name: Named, datasets: Any, streaming: bool) -> Any:
    config = (name.config,) if name.config else ()
    more = {"streaming": True} if streaming else {}
    return datasets.load_dataset(name.path, *config, split=name.split or "train", **more)


def _saved(source: str, name: Named, datasets: Any) -> Any:
    """Return the rows of a folder that `save_to_disk` wrote. Raises DataError if it is not said which of several splits."""
    if name.config:
        raise DataError(f"{source}: a saved dataset has no configurations; give {name.path}:{name.split or 'train'}")
    found = datasets.load_from_disk(name.path)
    if not isinstance(found, Mapping):
        if name.split:
            raise DataError(f"{source}: the folder has one dataset and no splits; give {name.path}")
        return found
    if not name.split and len(found) == 1:
        return next(iter(found.values()))
    if name.split not in found:
        raise DataError(
            f"{source}: the folder has the splits {', '.join(found)}; name one, as {name.path}:{next(iter(found))}"
        )
    return found[name.split]


def _refuse_path(source: str, name: str) -> None:
    """Raise DataError for a text that can only be meant as a path."""
    path = Path(name)
    if path.suffix or source.startswith((".", "/", "~")):
        raise missing(source)

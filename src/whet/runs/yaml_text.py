"""Read YAML strictly: one line of error for what has two readings, is there twice, or grows without bound. Imports no torch.

Scalars are those of YAML 1.1 (`yes` and `on` are true) with these differences: numbers that YAML 1.1 and 1.2 read differently
(`010`, `12:30:45`) are refused, and dates are text. Tags are refused. So are names that stand twice in one mapping, names that
are not text, and documents beyond the bounds below.
"""

import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from whet.errors import RecipeError, first_line

LARGEST_FILE = 1 << 20
"""Largest number of bytes of a file."""
MOST_NODES = 20_000
"""Largest number of values of a document, with each alias counted as the values that it stands for."""
DEEPEST = 50
"""Largest number of mappings and lists inside each other."""
LONGEST_NUMBER = 100
"""Largest number of characters of a number."""
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]*[0-9][0-9_]*(\.[0-9_]*)?")
"""Numbers with a leading zero that YAML 1.1 reads in base 8, or as text if they have an 8 or a 9."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe file as nested dicts. Raises RecipeError with the file and the line if it is not valid YAML, not a mapping,
    or refused (see the module)."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise RecipeError(f"{path}: the file cannot be read ({error.strerror or first_line(error)})") from error
    if len(data) > LARGEST_FILE:
        raise RecipeError(
            f"{path}: a recipe has at most {LARGEST_FILE} bytes, and this file has more; is it another file?"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not valid UTF-8, got {data[error.start : error.end]!r}; save the file as UTF-8"
        ) from error
    try:
        tree = parsed(text)
    except NotYaml as error:
        raise RecipeError(f"{path}:{error.line}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, got {type(tree).__name__}")
    return tree


def yaml_tree(text: str) -> dict[str, Any]:
    """Parse a YAML text that whet wrote."""
    return parsed(text)


def given_value(name: str, text: str) -> Any:
    """Return the value of an option of the command line: YAML, or the text itself if it is not valid YAML.

    Raises RecipeError for a number with two readings, and for a list or mapping that is refused (see the module).
    """
    try:
        found = parsed(text)
    except NotYaml as error:
        flow = text.lstrip()[:1] in ("[", "{") and not any(
            mark in text for mark in ("{%", "{{", "{#")
        )  # no Jinja template
        if error.refused and (flow or error.number):
            raise RecipeError(f"--{name}: {error}") from error
        return text
    quoted = isinstance(found, str) and text[:1] == '"'  # in double quotes, \n is a line break
    return found if quoted or isinstance(found, (bool, int, float, list, dict)) or found is None else text


class NotYaml(Exception):
    """A text is not valid YAML, or `refused` by the rules of this module. `line` counts from 1; `number` is True for a number with
    two readings."""

    def __init__(self, reason: str, line: int, *, refused: bool = True, number: bool = False) -> None:
        super().__init__(reason)
        self.line, self.refused, self.number = line, refused, number


def parsed(text: str) -> Any:
    """Return the value of one YAML document. Raises NotYaml."""
    import yaml

    try:
        loader = _loader()(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotYaml(
            f"not valid YAML: the character {chr(error.character)!a} is not allowed", line, refused=False
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise NotYaml(f"not valid YAML: {error.problem or error.context}", line, refused=False) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise NotYaml(f"not valid YAML: {first_line(error)}", 1, refused=False) from error


@functools.lru_cache(maxsize=1)
def _loader() -> Any:
    """Return the class of the reader. PyYAML is imported here, so that `import whet` stays light."""
    import yaml

    class Strict(yaml.SafeLoader):
        """PyYAML's safe loader with the rules of this module."""

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.depth = self.total = 0
            self.sizes: dict[str, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            line, before = event.start_mark.line + 1, self.total
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in self.anchors and event.anchor not in self.sizes:
                    raise NotYaml(f"the alias *{event.anchor} stands inside what it names; write it out", line)
                self.total += self.sizes.get(str(event.anchor), 1)
            elif event.tag is not None:
                raise NotYaml(f"tags are not read, got {event.tag!r}; leave it out", line)
            else:
                self.total += 1
            self.depth += 1
            if self.total > MOST_NODES:
                raise NotYaml(f"more than {MOST_NODES} values, with each alias written out; a recipe is smaller", line)
            if self.depth > DEEPEST:
                raise NotYaml(f"more than {DEEPEST} lists and mappings inside each other; a recipe is flatter", line)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
                self.sizes[event.anchor] = self.total - before
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: dict[str, int] = {}
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                line = key.start_mark.line + 1
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a name must be text", key.start_mark)
                if key.tag != "tag:yaml.org,2002:str":
                    raise NotYaml(f"the name {key.value!r:.40} is not text; write it in quotes", line)
                if key.value in seen:
                    first = f" (first on line {seen[key.value]})" if seen[key.value] != line else ""
                    raise NotYaml(
                        f"the name {key.value!r:.40} stands twice in one mapping{first}; remove one of them", line
                    )
                seen[key.value] = line
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            if node.style is None:  # not in quotes
                _check_number(node.value, node.tag.rpartition(":")[2], node.start_mark.line + 1)
            return super().construct_scalar(node)

    dropped = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
    Strict.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in dropped]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Strict


def _check_number(text: str, kind: str, line: int) -> None:
    """Raise NotYaml for a number with two readings, and for one that is too long to be a number of a recipe. `kind` is what YAML
    1.1 reads it as: int, float, str, ..."""
    if kind in ("int", "float") and len(text) > LONGEST_NUMBER:
        raise NotYaml(f"a number of {len(text)} characters; write it as text", line, number=True)
    if LEADING_ZERO.fullmatch(text):
        plain = re.sub(r"^([-+]?)[0_]+(?=[0-9])", r"\1", text).replace("_", "").lstrip("+")
        why = f'YAML 1.1 reads a number with a leading zero in base 8); write {plain} or "{text}" in quotes'
        raise NotYaml(f"the number {text} has two readings ({why}", line, number=True)
    if kind in ("int", "float") and ":" in text:
        why = f'YAML 1.1 reads a number with colons in base 60); write "{text}" in quotes'
        raise NotYaml(f"the number {text} has two readings ({why}", line, number=True)

"""Tests and the program that they test, in two processes: tests call its functions, and only plain data crosses between them."""

import ast
import builtins
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

LARGEST = 4 << 20
"""Most bytes of one message."""
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "call": lambda thing, *given, **named: thing(*given, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda thing, key: thing[key],
    "put": lambda thing, key, value: thing.__setitem__(key, value),
    "len": len,
    "str": str,
    "repr": repr,
    "iter": iter,
    "next": next,
    "in": lambda thing, value: value in thing,
    "bool": bool,
}
"""What tests can do with an object of the program."""


class Broken(BaseException):
    """The other process has ended, or sent what is no message."""


class Link:
    """A connection of two pipes. A message is its length in 4 bytes, and JSON."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.broken = os.fdopen(read, "rb"), os.fdopen(write, "wb"), False

    def send(self, message: Any) -> None:
        """Send a message. Raises Broken, ValueError for one that is too large."""
        data = json.dumps(message).encode()
        if len(data) > LARGEST:
            raise ValueError(f"a value of more than {LARGEST} bytes")
        try:
            self.write.write(len(data).to_bytes(4, "big") + data)
            self.write.flush()
        except OSError as error:
            self.broken = True
            raise Broken from error

    def receive(self) -> Any:
        """Return the next message. Raises Broken."""
        try:
            size = int.from_bytes(self.read.read(4), "big")
            data = self.read.read(size) if 0 < size <= LARGEST else b""
            if len(data) == size > 0:
                return json.loads(data)
        except (OSError, ValueError, RecursionError, MemoryError):
            pass
        self.broken = True
        raise Broken


def packed(value: Any, other: Callable[[Any], Any], depth: int = 0) -> Any:
    """Return a value as JSON that `unpacked` reads. Objects of a subclass of a plain type are converted to the plain type; `other`
    converts objects of other types."""
    if depth > 50:
        raise ValueError("a value with more than 50 levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value) if abs(int.__int__(value)) < 1 << 53 else {"i": hex(int.__int__(value))}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [packed(one, other, depth + 1) for one in list.__iter__(value)]
    kinds: tuple[tuple[str, Any], ...] = (("t", tuple), ("s", set), ("z", frozenset))
    for mark, kind in kinds:
        if isinstance(value, kind):
            return {mark: [packed(one, other, depth + 1) for one in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[packed(one, other, depth + 1) for one in pair] for pair in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"b" if isinstance(value, bytes) else "a": bytes(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, (Decimal, Fraction)):
        return {"D" if isinstance(value, Decimal) else "F": str(value)}
    return other(value)


def unpacked(value: Any, other: Callable[[Any], Any]) -> Any:
    """Return the value of `packed`. `other` converts what its `other` returned. Raises ValueError, TypeError and others for what is
    none."""
    if isinstance(value, list):
        return [unpacked(one, other) for one in value]
    if not isinstance(value, dict):
        return value
    inner: Any
    mark, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
    if mark in ("t", "s", "z"):
        kind: Any = {"t": tuple, "s": set, "z": frozenset}[mark]
        return kind(unpacked(one, other) for one in inner)
    if mark == "d":
        return {unpacked(key, other): unpacked(one, other) for key, one in inner}
    if mark in ("b", "a"):
        return (bytes if mark == "b" else bytearray).fromhex(inner)
    simple: Mapping[Any, Callable[[Any], Any]] = {
        "i": lambda one: int(one, 16), "c": lambda one: complex(*one), "D": Decimal, "F": Fraction,
    }  # fmt: skip
    return simple[mark](inner) if mark in simple else other(value)


def execute(code: str, module: types.ModuleType) -> None:
    """Run a program as a module. `exit` and `quit` are there as in an interactive Python."""
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    exec(compile(code, "solution.py", "exec"), module.__dict__)


def _silent() -> None:
    """Send what a program prints to nowhere."""
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def serve(code: str, read: int, write: int) -> None:
    """Run a program as the module "solution", send its names, and do what the other process asks for."""
    _silent()
    link, things, places = Link(read, write), list[Any](), dict[int, int]()

    def handle(thing: Any) -> Any:
        if isinstance(thing, types.ModuleType):
            return {"m": thing.__name__}
        if type(thing).__module__ == "numpy" and hasattr(thing, "tolist"):
            return packed(thing.tolist(), handle)
        place = places.setdefault(id(thing), len(things))
        if place == len(things):
            things.append(thing)  # which keeps it, and so its id
        kinds = thing.__mro__ if isinstance(thing, type) and issubclass(thing, BaseException) else ()
        return {
            "h": place,
            "name": getattr(thing, "__name__", type(thing).__name__),
            "kinds": [one.__name__ for one in kinds],
        }

    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        execute(code, module)
    except BaseException as error:
        link.send({"error": [type(error).__name__]})
        return
    link.send({"names": {name: packed(one, handle) for name, one in vars(module).items() if name[:2] != "__"}})
    while True:
        operation, place, given, named = link.receive()
        try:
            values = [unpacked(one, lambda mark: things[mark["h"]]) for one in given]
            before = [
                json.dumps(packed(one, handle)) if isinstance(one, (list, dict, set, bytearray)) else ""
                for one in values
            ]
            named = {name: unpacked(one, lambda mark: things[mark["h"]]) for name, one in named.items()}
            reply = {"value": packed(OPERATIONS[operation](things[place], *values, **named), handle)}
            after = {str(number): packed(one, handle) for number, one in enumerate(values) if before[number]}
            changed = {number: one for number, one in after.items() if json.dumps(one) != before[int(number)]}
            link.send(reply | {"changed": changed})
        except Broken:
            return
        except BaseException as error:
            link.send({"error": [one.__name__ for one in type(error).__mro__], "text": str(error)[:500]})


class Remote:
    """An object of the program, as tests see it. What is done with it is done in the program's process. It equals only itself."""

    def __init__(self, asked: Callable[..., Any], place: int, name: str) -> None:
        vars(self).update(_asked=asked, _place=place, _name=name)

    def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: D102
        return self._asked("call", self._place, given, named)

    def __getattr__(self, name: str) -> Any:
        if name in ("_asked", "_place", "_name"):
            raise AttributeError(name)
        return self._asked("get", self._place, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._asked("set", self._place, (name, value))

    def __getitem__(self, key: Any) -> Any:
        return self._asked("item", self._place, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._asked("put", self._place, (key, value))

    def __len__(self) -> int:
        return int(self._asked("len", self._place))

    def __str__(self) -> str:
        return str(self._asked("str", self._place))

    def __repr__(self) -> str:
        return str(self._asked("repr", self._place))

    def __bool__(self) -> bool:
        return bool(self._asked("bool", self._place))

    def __contains__(self, value: Any) -> bool:
        return bool(self._asked("in", self._place, (value,)))

    def __iter__(self) -> Iterator[Any]:
        return self._asked("iter", self._place)  # type: ignore[no-any-return]

    def __next__(self) -> Any:
        return self._asked("next", self._place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._place == self._place

    def __hash__(self) -> int:
        return hash(self._place)


class Program:
    """The side of the tests: the names of the program, and requests to its process."""

    def __init__(self, link: Link) -> None:
        self.link, self.errors, self.known = link, dict[str, type[BaseException]](), dict[int, Any]()

    def names(self, entry: str = "") -> dict[str, Any]:
        """Return the names of the program, without those of builtins other than `entry`, the function that is tested. Raises
        RuntimeError with the name of the error if it could not be run."""
        message = self.link.receive()
        if "error" in message:
            raise RuntimeError(str(message["error"][0]))
        try:
            # a builtin of the program's own would replace one that the tests use
            kept = set(dir(builtins)) - {entry}
            names = {str(name): one for name, one in message["names"].items() if name not in kept}
            return {name: unpacked(one, self._known) for name, one in names.items()}
        except Exception as error:
            self.link.broken = True
            raise Broken from error

    def asked(self, operation: str, place: int, given: Any = (), named: Mapping[str, Any] = {}) -> Any:
        """Do something with an object of the program. Raises its error, as far as it is one of Python's or of the program."""
        arguments = [packed(one, _mark) for one in given]
        self.link.send([operation, place, arguments, {name: packed(one, _mark) for name, one in named.items()}])
        reply = self.link.receive()
        try:
            if "error" in reply:
                raised = next(kind for name in reply["error"] if (kind := self._error(name)) is not None)
            else:
                for number, one in reply["changed"].items():
                    _replace(given[int(number)], unpacked(one, self._known))
                return unpacked(reply["value"], self._known)
        except Exception as error:  # the program has written to the pipe itself
            self.link.broken = True
            raise Broken from error
        raise raised(str(reply.get("text", "")))

    def _known(self, mark: Mapping[str, Any]) -> Any:
        """Return the object of a mark. Classes of errors are made here too, so that tests can catch them; modules of Python's library
        are imported here, so that the program cannot replace what tests use of them."""
        if "m" in mark:
            name = mark["m"] if mark["m"] in sys.stdlib_module_names else "types"
            space: dict[str, Any] = {}
            exec(f"import {name} as found", space)
            return space["found"]
        place, name = int(mark["h"]), str(mark["name"])
        if mark["kinds"]:
            base = next(kind for one in mark["kinds"] if (kind := self._error(one)) is not None)
            return self.errors.setdefault(name, type(name, (base,), {}))
        return Remote(self.asked, place, name)

    def _error(self, name: str) -> type[BaseException] | None:
        found = self.errors.get(name, getattr(builtins, str(name), None))
        return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _mark(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"h": value._place}
    raise TypeError(f"tests can give plain data to the program, and a {type(value).__name__} is none")


def _replace(old: Any, new: Any) -> None:
    """Change a list, dict, set or bytearray of the tests as the program has changed its copy."""
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        old.update(new)


def units(source: str) -> list[tuple[str, ast.stmt]]:
    """Return the parts of tests in order, as (kind, statement): "setup", "test" for a statement with an assert, "function" for a
    function test..., "check" for HumanEval's check(candidate). Raises SyntaxError."""
    body = ast.parse(source).body
    calls = [one.value for one in body if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call)]
    checks = [one for one in calls if isinstance(one.func, ast.Name) and one.func.id == "check"]
    out = []
    for one in body:
        kind = "setup"
        if isinstance(one, ast.FunctionDef):
            needed = len(one.args.posonlyargs + one.args.args) - len(one.args.defaults)
            if one.name.startswith("test") and not needed:
                kind = "function"
            elif one.name == "check" and needed == 1 and not checks:
                kind = "check"
        elif isinstance(one, ast.Expr) and one.value in checks:
            kind = "test"
        elif not isinstance(one, (ast.ClassDef, ast.AsyncFunctionDef)):
            kind = "test" if any(isinstance(node, ast.Assert) for node in ast.walk(one)) else kind
        out.append((kind, one))
    return out


def test(tests: list[str], entry: str, code: str, *link: int) -> None:
    """Run tests, and write a line of JSON for each to what is standard output at the start: null if it passed, else the reason. The
    first line has their number. With a link the program is in another process; without one `code` runs in this one."""
    results = os.fdopen(os.dup(1), "w", encoding="ascii")
    _silent()
    parts = [unit for source in tests for unit in units(source)]
    program = Program(Link(*link)) if link else None
    count = sum(kind != "setup" for kind, _ in parts)
    results.write(json.dumps(count) + "\n")

    def tell(reason: str | None) -> None:
        said = (
            None if reason is None else re.sub(r"[^\w .]", "?", reason)[:80] or "an error"
        )  # the program may have named it
        results.write(json.dumps(said) + "\n")
        results.flush()

    space: dict[str, Any] = {"__name__": "tests"}
    try:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        if program is None:
            execute(code, module)
        else:
            vars(module).update(program.names(entry))
        space |= {name: one for name, one in vars(module).items() if name[:2] != "__"}
    except BaseException as error:
        named = program is not None and isinstance(error, RuntimeError)  # with the name of the program's error
        failed = "the program ended" if isinstance(error, Broken) else str(error) if named else type(error).__name__
        for _ in range(count):
            tell(failed)
        return
    later = [
        (kind, one.name) for kind, one in parts if kind in ("function", "check") and isinstance(one, ast.FunctionDef)
    ]
    for kind, one in parts:
        reason = _run(partial(exec, compile(ast.Module([one], []), "tests.py", "exec"), space), program)
        if kind == "test":
            tell(reason)
    for kind, name in later:
        given = [space.get(entry)] if kind == "check" else []
        tell(_run(partial(space[name], *given), program) if name in space else "NameError")


def _run(one: Callable[[], Any], program: Program | None) -> str | None:
    """Call a test. Return why it failed, None if it passed."""
    reason = None
    try:
        one()
    except BaseException as error:
        reason = "the program ended" if isinstance(error, Broken) else type(error).__name__
    return "the program ended" if program is not None and program.link.broken else reason

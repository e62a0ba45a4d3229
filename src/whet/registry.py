"""Tables of adapters. An adapter is found by name, by entry point or by "file.py:Name", and imported on first use.

An adapter is a module with `Options` (a frozen dataclass), `make(options, context)` and optionally
`check(options, context)`, which raises an error for invalid options. An adapter can also be a class, whose keyword-only
parameters are its options. A user's adapter is named by its file ("mine.py:Thing"), by its module
("package.module:Thing"), or by an entry point of the group "whet.<table>".
"""

import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.errors import RecipeError, RewardError, WhetError


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter. `options` is a frozen dataclass, `make` builds the adapter, and `check` raises for invalid options.

    `home` is its module or class, in which a table may look for further functions.
    """

    name: str
    options: type
    make: Callable[[Any, Any], Any]
    check: Callable[[Any, Any], None]
    home: Any = None

    def more(self, name: str) -> Any:
        """Return a further function of an adapter's module, or None. A class has none."""
        return getattr(self.home, name, None) if inspect.ismodule(self.home) else None


class Registry:
    """The adapters of one table, by name. `built_in` maps names to modules; `protocol` has the methods that a class needs.

    `others` are names that are not adapters. `given` are parameters of a class that are not options: whet passes them later,
    and `make` returns the class with its options only.

    >>> Registry("trackers", {"console": "whet.trackers.console"}, object).names()
    ['console']
    """

    def __init__(
        self,
        seam: str,
        built_in: Mapping[str, str],
        protocol: type,
        others: Sequence[str] = (),
        given: Sequence[str] = (),
    ) -> None:
        self.seam, self.built_in, self.protocol, self.others = seam, built_in, protocol, tuple(others)
        self.given = tuple(given)

    def names(self) -> list[str]:
        """Return the built-in names and the names of installed entry points."""
        return sorted({*self.built_in, *(one.name for one in self._entry_points())})

    def find(self, name: str, where: str = "") -> Adapter:
        """Return the adapter with this name.

        Raises RecipeError for an unknown name, with the known names, and for an error in a user's file, with its line.
        """
        if name in self.built_in:
            return self._of_module(name, importlib.import_module(self.built_in[name]))
        for entry in self._entry_points():
            if entry.name == name:
                try:
                    return self._of(name, entry.load())
                except RecipeError:
                    raise
                except (Exception, SystemExit) as error:
                    raise RecipeError(f"{self.seam}: loading {entry.value} failed with {told(error)}") from error
        if ":" not in name:
            raise RecipeError(
                f"{where or self.seam}: unknown name {name!r}; known are {', '.join([*self.others, *self.names()])}, or your "
                'own as "file.py:Name"'
            )
        return self._of(name, load_object(name))

    def _entry_points(self) -> list[Any]:
        from importlib.metadata import entry_points

        return list(entry_points(group=f"whet.{self.seam}"))

    def _of(self, name: str, found: Any) -> Adapter:
        if inspect.ismodule(found):
            return self._of_module(name, found)
        if not inspect.isclass(found) and self._is_instance(found):
            return Adapter(name, options_of(lambda: None), lambda options, _: found, _no_check, type(found))
        if not callable(found):
            raise RecipeError(
                f"{self.seam}: {name} is a {type(found).__name__}; give a class or a function that makes one"
            )
        if inspect.isclass(found):
            self._has_methods(name, found)
        static = isinstance(inspect.getattr_static(found, "check", None), (staticmethod, classmethod))
        check = found.check if static else _no_check  # type: ignore[attr-defined]

        def make(options: Any, context: Any) -> Any:
            values = objects(_values(options))
            return functools.partial(found, **values) if self.given else found(**values)

        return Adapter(name, options_of(found, self.given), make, check, found)

    def _of_module(self, name: str, module: Any) -> Adapter:
        missing = [part for part in ("Options", "make") if not hasattr(module, part)]
        if missing:
            raise RecipeError(
                f"{self.seam}: {module.__name__} has no {missing[0]}; an adapter's module has Options and make"
            )
        return Adapter(name, module.Options, module.make, getattr(module, "check", _no_check), module)

    def _is_instance(self, found: Any) -> bool:
        """Return True if an object has a method of the protocol, so that it is used as it is."""
        methods = [name for name, _ in inspect.getmembers(self.protocol, inspect.isfunction) if name[0] != "_"]
        if not any(hasattr(found, name) for name in methods):
            return False
        self._has_methods(type(found).__name__, type(found))
        return True

    def _has_methods(self, name: str, found: type) -> None:
        """Raise RecipeError if the class has no method of the protocol, or a method with other parameters."""
        missing = []
        for method, wanted in inspect.getmembers(self.protocol, inspect.isfunction):
            if method.startswith("_"):
                continue
            parameters = [one for one in inspect.signature(wanted).parameters.values() if one.name != "self"]
            own = getattr(found, method, None)
            form = f"{method}({', '.join(one.name for one in parameters)})"
            if not callable(own):
                missing.append(form)
                continue
            required = [
                None for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty
            ]
            try:
                inspect.signature(own).bind(None, *required)
            except TypeError as error:
                raise RecipeError(
                    f"{self.seam}: {place_of(own)}: {found.__name__}.{method} must take {form} ({error})"
                ) from error
        if missing:
            raise RecipeError(
                f"{self.seam}: {place_of(found)}: class {found.__name__} has no method {' and no method '.join(missing)}"
            )


def options_of(function: Callable[..., Any], given: Sequence[str] = ()) -> type:
    """Return a frozen dataclass of a callable's keyword-only parameters, with their types and defaults. Parameters in `given`
    are left out.

    >>> def tracker(*, path: str = "log", every: int = 1): ...
    >>> options_of(tracker)(every=2)
    Options(path='log', every=2)
    """
    fields: list[Any] = []
    try:
        types = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except (NameError, TypeError):
        types = {}
    for one in inspect.signature(function).parameters.values():
        if one.name in given:
            continue
        if one.kind is one.KEYWORD_ONLY:
            kind = types.get(one.name, Any)
            default = dataclasses.field(default_factory=functools.partial(copy.deepcopy, one.default))
            fields.append((one.name, kind) if one.default is one.empty else (one.name, kind, default))
        elif one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            raise RecipeError(
                f"{place_of(function)}: the parameter {one.name!r} of {function.__name__} cannot be set from a recipe; "
                "options must be keyword-only, so put it after *"
            )
    return dataclasses.make_dataclass("Options", sorted(fields, key=len), frozen=True)


def load_object(spec: str) -> Any:
    """Load the object named by "file.py:name" or "package.module:name". Raises RecipeError if it cannot be found."""
    if spec.startswith("python:"):
        if spec not in OBJECTS:
            raise RecipeError(
                f"{spec}: this run was given a Python function; start it from Python with the same function"
            )
        return OBJECTS[spec]
    place, _, name = spec.rpartition(":")
    if not place:
        raise RecipeError(f'{spec!r}: expected "file.py:name" or "package.module:name"')
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise RecipeError(f"{spec}: no such file {place}")
            module = _module_of(path.resolve())
        else:
            module = importlib.import_module(place)
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        raise RecipeError(f"{spec}: importing {place} failed with {told(error)}") from error
    if not hasattr(module, name):
        raise RecipeError(f"{spec}: {place} has no {name!r}")
    return getattr(module, name)


_MODULES: dict[Path, tuple[tuple[int, int], Any]] = {}


def _module_of(path: Path) -> Any:
    """Import a file as a module. It is executed once per run, and again after the file has changed."""
    stat = path.stat()
    version = (stat.st_mtime_ns, stat.st_size)
    if path in _MODULES and _MODULES[path][0] == version:
        return _MODULES[path][1]
    found = importlib.util.spec_from_file_location(f"whet_user_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    _MODULES[path] = version, module
    return module


def forget_modules() -> None:
    """Execute the users' files again when they are next named. A run calls this first, so it starts with their initial state."""
    _MODULES.clear()


OBJECTS: dict[str, Any] = {}
"""Functions that were given as Python objects in this process, by their reference in a recipe."""


def register(function: Callable[..., Any]) -> str:
    """Return the reference of a callable: "python:module:name#hash".

    The hash covers its source and its plain values: defaults, closure, and the attributes of an instance.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    mark = hashlib.sha256(repr(_content(function)).encode()).hexdigest()[:12]
    reference = f"python:{getattr(function, '__module__', '?')}:{name}#{mark}"
    OBJECTS[reference] = function
    return reference


def _content(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Return what a value is made of, as plain values that are equal in another process. No address is in it."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if id(value) in seen:  # a cycle
        return type(value).__qualname__
    seen = (*seen, id(value))
    if hasattr(value, "detach") and hasattr(value, "dtype"):  # a tensor; numpy has no bfloat16
        array = value.detach().cpu()
        return [str(value.dtype), tuple(value.shape), (array.float() if array.is_floating_point() else array).tolist()]
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array
        return [str(value.dtype), tuple(value.shape), value.tobytes()]
    if isinstance(value, (list, tuple)):
        return [type(value).__qualname__, *(_content(one, seen) for one in value)]
    if isinstance(value, (set, frozenset)):
        return [type(value).__qualname__, *sorted(repr(_content(one, seen)) for one in value)]
    if isinstance(value, Mapping):
        return [(_content(key, seen), _content(one, seen)) for key, one in value.items()]
    if isinstance(value, functools.partial):
        return [_content(one, seen) for one in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [value.__func__.__qualname__, _content(value.__self__, seen)]
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held = [_content(one, seen) for one in (value.__defaults__, value.__kwdefaults__, cells)]
        return [value.__qualname__, _source(value), _code(value.__code__), *held]
    if inspect.isclass(value) or inspect.isbuiltin(value) or inspect.ismodule(value):
        return [getattr(value, "__qualname__", value.__name__), _source(value)]
    own = dict(vars(value)) if hasattr(value, "__dict__") else {}
    slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    own |= {name: getattr(value, name) for name in slots if hasattr(value, name) and name != "__dict__"}
    return [type(value).__qualname__, _source(type(value)), _content(own, seen)]


def _names(slots: str | Sequence[str]) -> Sequence[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def _code(code: Any) -> list[Any]:
    """Return the instructions and constants of a code object, which tell two lambdas on one line apart."""
    constants = [_code(one) if inspect.iscode(one) else repr(one) for one in code.co_consts]
    return [code.co_code, code.co_names, constants]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the cell of a name that is not bound yet
        return False


def place_of(thing: Any) -> str:
    """Return the file and line where a class or function is defined."""
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return getattr(thing, "__module__", "?")


def told(error: BaseException) -> str:
    """Format an error's class and message, with the line of the user's file that raised it."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        if (
            not trace.tb_frame.f_code.co_filename.startswith("<frozen")
            and trace.tb_frame.f_code.co_filename != __file__
        ):
            where = f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        where = f" (at {error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {_text(error)}{where}"


def called(
    function: Callable[..., Any],
    label: str,
    given: Sequence[Any] = (),
    named: Mapping[str, Any] = {},
    raises: type[WhetError] = RewardError,
    own: Any = None,
) -> Any:
    """Call a function. If it raises, raise an error of the class `raises` with `label` and the line of the user's file. This is
    so for SystemExit too, which must not end the run. KeyboardInterrupt passes: a signal saves and ends the run.

    `own` is the user's function if `function` only calls it. A copy of the process that the function forked ends here: it must
    not continue the run.
    """
    process = os.getpid()
    try:
        return _ended_if_forked(process, function(*given, **named))
    except (WhetError, KeyboardInterrupt) as error:
        _ended_if_forked(process, error)
        raise
    except BaseException as error:
        _ended_if_forked(process, error)
        function = own or getattr(function, "func", function)  # functools.partial
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else "?"
        trace = error.__traceback__
        while trace is not None:  # the deepest frame in the user's own file: libraries below it say little
            if code and trace.tb_frame.f_code.co_filename == code.co_filename:
                where = f"{code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        raise raises(f"{label} raised {type(error).__name__}: {_text(error)} (at {where})") from error


def _ended_if_forked(process: int, outcome: Any) -> Any:
    """Return the outcome in this process. In a fork of it, end the process: with the status of SystemExit, 1 after another error,
    0 after a result."""
    if os.getpid() == process:
        return outcome
    code = outcome.code if isinstance(outcome, SystemExit) else int(isinstance(outcome, BaseException))
    os._exit(code if isinstance(code, int) else int(code is not None))


def _text(error: BaseException) -> str:
    """Return the message of an error. The class of a user's error may be unable to say it."""
    try:
        return str(error)
    except Exception as failed:
        return f"(its message cannot be read: {type(failed).__name__})"


def _values(options: Any) -> dict[str, Any]:
    return {one.name: getattr(options, one.name) for one in dataclasses.fields(options)}


def objects(value: Any) -> Any:
    """Return a value with the Python objects in place of their references, also in lists and dicts."""
    if isinstance(value, str) and value.startswith("python:"):
        return load_object(value)
    if isinstance(value, dict):
        return {key: objects(one) for key, one in value.items()}
    return [objects(one) for one in value] if isinstance(value, list) else value


def _no_check(options: Any, context: Any) -> None:
    """Do nothing: all options are valid."""

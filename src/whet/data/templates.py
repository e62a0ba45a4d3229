"""Render chat templates in Jinja's sandbox, as transformers does, with a bound on work and on text.

A template comes with a model that somebody else made, and its input with data that somebody else wrote. Jinja's sandbox
limits `range` alone: nested loops, `*`, `~`, `|center` or a macro that calls itself twice run for years or fill the memory.
Here the compiled template pays for its work from a budget, and a template that exceeds it is ended with `payments.TemplateLimit`.
The budget is of steps and characters and not of seconds, so the same template and row give the same result on each machine
and in each thread, and nothing but the rendering thread is needed.

The syntax tree is changed before it is compiled (`_Counted`): each turn of a loop and each call of a macro pays for itself
and its text, `~`, slices, comparisons and literals pay for their operands. Operators, calls, filters and tests are
intercepted by the environment. What can make a text longer than its parts pays before it runs. Containers pay for all that
they contain each time they are put together, so lists that share their elements cannot grow beyond the budget either.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from whet.data import payments
from whet.data.marks import TRACE, Mark, joined, looked_at
from whet.errors import ModelError

LARGEST_SOURCE = 1 << 20
"""Largest number of characters of a template."""
COMPARING = (
    "==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan", ">=", "ge", "in", "lower",
    "upper",
)  # fmt: skip
"""Tests that read all of a value."""


def rendered(source: str, **given: Any) -> str:
    """Render a template with these variables, as `apply_chat_template` of transformers does.

    Raises payments.TemplateLimit if it does too much work or writes too much text, and whatever the template raises.
    """
    template = compiled(source)
    payments.METER.left = payments.BUDGET
    payments.METER.left += payments.FOR_INPUT * payments.whole(given, 1.0)
    return template.render(**given)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Return the compiled template. Raises TemplateError for a template that is not valid Jinja or too long."""
    if len(source) > LARGEST_SOURCE:
        raise payments.TemplateLimit(f"it has {len(source)} characters, and at most {LARGEST_SOURCE} are read")
    payments.METER.left = payments.BUDGET
    return environment().from_string(source)


@functools.lru_cache(maxsize=8)
def variables(source: str) -> frozenset[str]:
    """Return the names that a template takes from outside. Raises as `compiled`."""
    import jinja2.meta

    compiled(source)
    payments.METER.left = payments.BUDGET
    return frozenset(jinja2.meta.find_undeclared_variables(environment().parse(source)))


@functools.lru_cache(maxsize=8)
def is_traceable(source: str) -> bool:
    """Return whether `data.marks` sees all that a template does with a text: it has no macros and no blocks that make texts, and
    does not write the date."""
    compiled(source)
    payments.METER.left = payments.BUDGET
    hidden = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block)
    return next(environment().parse(source).find_all(hidden), None) is None and "strftime_now" not in source


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant writes; it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Bounded(ImmutableSandboxedEnvironment):
    """The environment of transformers' templates, in which everything that takes time or memory pays for it."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and not isinstance(text, float):
                payments.METER.spend(
                    payments.size(text) * (times.bit_length() if isinstance(text, int) else max(0, times))
                )
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            payments.METER.spend(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            payments.pay_format(left, "%", right)
        else:
            payments.METER.spend(payments.size(left) + payments.size(right))
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return joined(super().call_binop(context, operator, left, right), (left, right))
        looked_at(left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        TRACE.read = TRACE.read or isinstance(obj, Mark)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        TRACE.read = TRACE.read or isinstance(obj, Mark)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *given: Any, **named: Any) -> Any:
        own = getattr(__obj, "__self__", None)
        payments.METER.spend(payments.CALL)
        looked_at(own if isinstance(own, str) else None, *given, *named.values())
        if isinstance(own, (str, bytes)):
            name = getattr(__obj, "__name__", "")
            if name == "join" and given:
                given = (payments.pay_joined(str(own), given[0]), *given[1:])
            payments.pay_for(name, (own, *given), named)
        else:
            if isinstance(own, (list, tuple, Mapping)):
                payments.METER.spend(payments.ITEM * len(own))
            _pay_whole((*given, *named.values()))
        return super().call(__context, __obj, *given, **named)

    def wrap_str_format(self, value: Any) -> Any:
        plain = super().wrap_str_format(value)
        if plain is None:
            return None

        @functools.wraps(plain)
        def counted(*given: Any, **named: Any) -> str:
            payments.pay_format(value.__self__, "{", (given, named))
            return plain(*given, **named)

        return counted


class _Counted(NodeTransformer):
    """Put the payments into the syntax tree of a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _turn(node.body))
        if node.test is not None:
            node.test = nodes.And(_paid(nodes.Const(0), "whet turn"), node.test)  # it is true
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _turn(node.body))
        return node

    visit_CallBlock = visit_Block = visit_FilterBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _paid(nodes.Tuple(node.nodes, "load"), "whet join")

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return _paid(node, "whet whole")

    visit_Dict = visit_Tuple = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _paid(node.node, "whet slice")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands: list[Any] = [node, *node.ops]
        for one in operands:
            if not isinstance(one.expr, nodes.Const):
                one.expr = _paid(one.expr, "whet whole")
        return node


def _paid(node: nodes.Expr, name: str) -> nodes.Expr:
    """Return the expression with a filter of this module; no template can write the space in its name."""
    return nodes.Filter(node, name, [], [], None, None)


def _turn(body: list[nodes.Node]) -> nodes.Node:
    """Return the statement that pays for one turn and the text that it writes, without that of loops and macros inside."""
    text, stack = 0, list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, nodes.TemplateData):
            text += len(node.data)
        elif not isinstance(node, (nodes.For, nodes.Macro)):
            stack += node.iter_child_nodes()
    return nodes.ExprStmt(_paid(nodes.Const(text), "whet turn"))


def _pay_turn(text: int) -> bool:
    payments.METER.spend(payments.TURN + payments.WRITTEN * text)
    return True


def _pay_slice(value: Any) -> Any:
    payments.METER.spend(payments.size(value) // payments.BUILT)
    return value


def _pay_whole(value: Any) -> Any:
    payments.METER.spend(payments.whole(value))
    looked_at(value)
    return value


def _joined(parts: tuple[Any, ...]) -> str:
    return joined("".join(map(str, payments.pay_joined("", parts))), parts)


def _filter(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that pays before it is called, and for each entry of the sequence that it returns."""
    before = 1 if hasattr(plain, "jinja_pass_arg") else 0

    @functools.wraps(plain)
    def counted(*given: Any, **named: Any) -> Any:
        payments.pay_for(name, given[before:], named)
        if TRACE.on and name == "trim" and len(given) == 1 and not named and isinstance(given[0], Mark):
            TRACE.trimmed = True
            return given[0]
        looked_at(*given[before:], *named.values())
        found = plain(*given, **named)
        return _each(found) if isinstance(found, Iterator) else found

    return counted


def _each(values: Iterator[Any]) -> Iterator[Any]:
    for one in values:
        payments.METER.spend(payments.TURN)
        yield one


def _test(plain: Any) -> Any:
    @functools.wraps(plain)
    def counted(*given: Any, **named: Any) -> Any:
        for one in given:
            _pay_whole(one)
        return plain(*given, **named)

    return counted


def _attributes(environment: Any, value: Any, attribute: Any) -> list[Any]:
    """Return the entries of a sequence, or this attribute of each, as the filters `join` and `sum` read them."""
    payments.METER.spend(payments.CALL + payments.whole(value) + payments.whole(attribute) * payments.TURN)
    looked_at(value)
    return list(value if attribute is None else map(jinja2.filters.make_attrgetter(environment, attribute), value))


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    """The filter `join`, which pays for all parts before they are joined."""
    parts = _attributes(context.environment, value, attribute)
    return jinja2.filters.sync_do_join(context, payments.pay_joined(str(d), parts), d)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """The filter `sum`, which pays for the copies of a sum of lists."""
    parts = _attributes(environment, iterable, attribute)
    if not isinstance(start, (int, float)):
        payments.METER.spend(len(parts) * sum(map(payments.size, [start, *parts])) // payments.ITEM)
    return sum(parts, start)


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    """Pay for what is written to the text of the conversation."""
    payments.METER.spend(payments.whole(value, payments.WRITTEN))
    if not isinstance(value, str):
        looked_at(value)
    return value


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of transformers: without the escapes of HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=1)
def environment() -> Any:
    """Return the environment that `transformers.utils.chat_template_utils` has, with the payments. `lipsum`, which writes
    random text, is left out."""
    found = _Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], optimized=False,
        finalize=_written, cache_size=0,
    )  # fmt: skip
    found.filters["tojson"] = _tojson
    found.filters = {name: _filter(name, one) for name, one in found.filters.items()} | {"join": _join, "sum": _sum}
    found.filters |= {"whet turn": _pay_turn, "whet join": _joined, "whet whole": _pay_whole, "whet slice": _pay_slice}
    found.tests |= {name: _test(found.tests[name]) for name in COMPARING}
    found.globals |= {"raise_exception": _raise, "strftime_now": lambda format: datetime.now().strftime(format)}
    del found.globals["lipsum"]
    return found


def template_file(template: str | None) -> Path | None:
    """Return the file of a chat template, None for a name or for the template itself. Raises ModelError if it is not there."""
    if template is None or template in ("plain", "none") or "{" in template:
        return None
    path = Path(template)
    if not path.is_file():
        raise ModelError(f'chat template {template!r}: expected "plain", "none" or an existing Jinja file')
    return path


def no_template(name: str) -> ModelError:
    """Return the error for a tokenizer without a chat template."""
    return ModelError(
        f"{name}: the tokenizer has no chat template; give one with --chat-template plain (### Human / ### Assistant), "
        'a Jinja file, or "none" to join prompt and completion as they are'
    )

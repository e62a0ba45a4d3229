"""A chat template that loops without end or grows without bound ends with one error, in seconds and little memory."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from proof.limits import limited
from whet.data import chat_format, payments, templates
from whet.errors import DataError, ModelError

TEXTS = [
    tiny.TEMPLATE,
    (
        "{% for m in messages %}{{ loop.index ~ m.role ~ loop.last }}"
        "{% if m.content == ' Hello b c ' and m.size > 2 %}!{% endif %}{% endfor %}"
    ),
    "{% for m in messages if m.size > 5 %}{{ m.content|upper }}{% else %}none{% endfor %}",
    "{% for a in [1, [2, 3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% macro f(x, n=2) %}<{{ x }}{{ n }}{{ varargs }}{{ kwargs }}>{% endmacro %}{{ f('a') }}{{ f('b', 3, 4, k=5) }}",
    "{% macro g() %}[{{ caller() }}]{% endmacro %}{% call g() %}inside{% endcall %}",
    (
        "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + m.size %}"
        "{% set ns.t = ns.t + m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.t }}"
    ),
    "{% set b %}x{{ 1 + 2 * 3 // 2 ** 2 % 5 - 1 }}{% endset %}{{ b }}{{ 7 / 2 }}{{ 'ab' * 3 }}{{ -3 % 5 }}",
    (
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{{ ['b', 'a']|sort|join('-') }}"
        "{{ messages|map(attribute='role')|join(', ') }}"
    ),
    (
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
        "{{ messages|rejectattr('size', 'gt', 5)|map(attribute='content')|first }}"
    ),
    (
        "{{ [1, 2, 3]|sum }}{{ messages|sum(attribute='size') }}"
        "{{ [[1], [2]]|sum(start=[]) }}{{ messages|join('|', attribute='role') }}"
    ),
    (
        "{{ 'a-b-c'.split('-')[1:] }}{{ ' x '.strip() }}{{ '-'.join(['a', 'b']) }}"
        "{{ 'abc'.replace('b', 'd') }}{{ 'x'.center(5) }}{{ 'abc'[::-1] }}"
    ),
    (
        "{{ '%s-%d' % ('a', 3) }}{{ '{:>5}|{a}'.format(1, a=2) }}"
        "{{ '%05.1f'|format(2.5) }}{{ '{a}'.format_map({'a': 1}) }}"
    ),
    (
        "{{ 'x'|center(7) }}{{ 'a b'|wordwrap(1) }}{{ 'a\nb'|indent(2, true) }}"
        "{{ 'abcdef'|truncate(5) }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}"
    ),
    (
        "{{ tools|tojson }}{{ tools|tojson(indent=2) }}"
        "{{ messages[0]|tojson(ensure_ascii=true, separators=(',', ':')) }}{{ {'b': 1, 'a': [none, true]} }}"
    ),
    (
        "{% if 'user' in messages[0].role and flag is defined and other is not defined and messages is sequence %}"
        "yes{% endif %}{{ other|default('d') }}"
    ),
    (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{{ m.content }}{% break %}{% endfor %}{{ eos_token }}{{ (1, 'a', []) }}"
    ),
    (
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
        "{{ messages[0]|dictsort|length }}{{ messages|groupby('role')|length }}{{ dict(a=1) }}"
    ),
    (
        "{% generation %}{% set hidden = 1 %}g{{ messages|length }}{% endgeneration %}"
        "{{ hidden is defined }}{{ range(3)|list }}{{ '<a>'|e }}{{ 2.567|round(1) }}"
    ),
    (
        "{% block title %}t{{ self is defined }}{% endblock %}{{ 'A' is upper }}"
        "{{ 3 is in [1, 3] }}{{ cycler('a', 'b').next() }}{{ 'aXb'|lower|title }}"
    ),
]
GROW = "{{% set ns = namespace(x={0}, y={0}) %}}{{% for i in range(60) %}}{1}{{% endfor %}}{{{{ ns.x }}}}"
LONG = "{% set x = 'a' * 100000 %}"
BOMBS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a test of a loop": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "text in a loop": "{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "a text times a number": "{{ 'x' * 10**10 }}",
    "a number times a list": "{{ (10**10 * [1])|length }}",
    "a power": "{{ 10 ** (10**10) }}",
    "texts joined": GROW.format("'x'", "{% set ns.x = ns.x ~ ns.x %}"),
    "texts added": GROW.format("'x'", "{% set ns.x = ns.x + ns.x %}"),
    "lists of one list": GROW.format("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "tuples of one tuple": GROW.format("(1,)", "{% set ns.x = (ns.x, ns.x) %}"),
    "dicts of one dict": GROW.format("{}", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "namespaces of one": GROW.format("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}"),
    "fillings of a batch": GROW.format("[1]", "{% set ns.x = [1]|batch(4, ns.x)|list %}"),
    "blocks of text": GROW.format("'xxxx'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "filtered blocks": GROW.format(
        "'x'", "{% set y %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = y %}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop that calls itself twice": (
        "{% for a in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}"
    ),
    "the filter center": "{{ 'x'|center(10**9) }}",
    "the method zfill": "{{ 'x'.zfill(10**9) }}",
    "tabs": "{{ '\\t'.expandtabs(10**9) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width that is computed": "{{ '%*d' % (10**9, 1) }}",
    "a width of format": "{{ '{:>1000000000}'.format(1) }}",
    "a width inside a width": "{{ '{:>{}}'.format(1, '1000000000') }}",
    "format_map": "{{ '{a:>{b[0]}}'.format_map({'a': 1, 'b': [10**9]}) }}",
    "replace": LONG + "{{ x|replace('a', x) }}",
    "replace by name": LONG + "{{ x|replace(old='a', new=x) }}",
    "the method replace": LONG + "{{ x.replace('', x) }}",
    "join": LONG + "{{ ([x] * 100000)|join }}",
    "join of attributes": LONG + "{{ ([{'a': x}] * 100000)|join(attribute='a') }}",
    "the method join": LONG + "{{ x.join(x) }}",
    "indent": "{{ ('a\n' * 100000)|indent(9999) }}",
    "wordwrap": LONG + "{{ ('a ' * 100000)|wordwrap(1, wrapstring=x) }}",
    "tojson": LONG + "{{ ([1] * 100000)|tojson(separators=(x, x)) }}",
    "slice": "{% for i in [1]|slice(10**9) %}{% endfor %}",
    "select": "{% for a in range(99999) %}{% for b in range(99999)|select('none') %}{% endfor %}{% endfor %}",
    "map": "{{ range(99999)|map('string')|map('center', 9999)|join }}",
    "slices": "{% set x = 'a' * 1000000 %}{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "comparisons": "{% set x = 'a' * 1000000 %}{% for a in range(99999) %}{% if x == x ~ 'b' %}{% endif %}{% endfor %}",
    "in a list": "{% set x = range(99999)|list %}{% for a in range(99999) %}{% if -1 in x %}{% endif %}{% endfor %}",
    "a test in a list": (
        "{% set x = range(99999)|list %}{% for a in range(99999) %}{% if -1 is in x %}{% endif %}{% endfor %}"
    ),
    "sum of lists": "{{ ([[1] * 3000] * 3000)|sum(start=[])|length }}",
    "translate": "{{ ('a' * 10000).translate({97: 'a' * 10000}) }}",
    "a long source": "x" * 2_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_bound_ends_with_one_error(name: str, tmp_path: Path) -> None:
    def render() -> int:
        try:
            templates.rendered(BOMBS[name], messages=[{"role": "user", "content": "a"}])
        except payments.TemplateLimit:
            return 3
        return 0

    ended = limited(render, tmp_path, seconds=20, mebibytes=512)
    assert ended.status == 3, ended.error


@pytest.mark.parametrize("source", TEXTS)
def test_a_template_writes_what_transformers_writes(source: str) -> None:
    """Every construct of the bombs in a small size, with a part that pays in each way."""
    messages = [
        {"role": "user", "content": " Hello b c ", "tags": ["x", "y"], "size": 3},
        {"role": "assistant", "content": "yes", "tags": [], "size": 12},
    ]
    tokenizer = tiny.tokenizer(template=source)
    given: dict[str, Any] = {"tools": [{"name": "t", "n": 1}], "flag": True}
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
    more = {"documents": None, "add_generation_prompt": True, **tokenizer.special_tokens_map}
    assert templates.rendered(source, messages=messages, **given, **more) == wanted


def test_the_environment_is_that_of_transformers() -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs, ours = _compile_jinja_template("").environment, templates.environment()
    assert {name for name in ours.filters if " " not in name} == set(theirs.filters)
    assert set(ours.tests) == set(theirs.tests)
    assert set(ours.globals) | {"lipsum"} == set(theirs.globals)
    for name in ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape", "undefined"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_budget_grows_with_the_conversation() -> None:
    source = "{% for m in messages %}{% for word in m.content.split() %}{{ word }} {% endfor %}{% endfor %}"
    content = "word " * 400_000
    assert templates.rendered(source, messages=[{"role": "user", "content": content}]) == content


def test_each_rendering_has_the_whole_budget() -> None:
    source = "{% for a in range(99999) %}{% endfor %}" * 9
    for _ in range(3):
        assert templates.rendered(source) == ""


def test_the_error_names_the_fix() -> None:
    endless = (
        tiny.TEMPLATE
        + "{% if messages|length > 2 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    chat = chat_format(tiny.tokenizer(template=endless))
    with pytest.raises(DataError, match=r"too much work on these messages: it loops without end.*--chat-template"):
        chat.prompt_ids([{"role": "user", "content": "a"}] * 3)
    with pytest.raises(DataError, match="too much work"):
        chat_format(tiny.tokenizer(template="{{ 'x' * 10**10 }}"))
    with pytest.raises(ModelError, match=r"chat template cannot be used.*--chat-template"):
        chat_format(tiny.tokenizer(template="{% if %}"), arguments={"a": 1})

"""Limits on untrusted templates: time, memory and Python; and what honest ones may use."""

import json
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_stream.errors import MlxStreamError, TemplateError
from mlx_stream.text.template import meter
from mlx_stream.text.template.chat_template import MAX_SOURCE, ChatTemplate, user
from mlx_stream.text.template.meter import BUDGET, ITEM, Meter
from tests.fuzz.texts import HOSTILE_TEMPLATES

# These templates write no more than a template of their length should.
HARMLESS = {
    *("nested namespaces", "long text", "long source", "large constants", "writes a name"),
    "surrogate",
}
# Compiling one of the largest takes this much; running it takes less.
MEMORY = 160 << 20
# Seconds of CPU within which a stopped template ends on any machine. Without a limit these take
# minutes, or never end.
ENDS = 20


def elsewhere(do: Callable[[], object]) -> tuple[BaseException | None, float]:
    """Run in a new thread, where no signal arrives; return the error raised and the CPU time."""
    found: list[tuple[BaseException | None, float]] = []

    def run() -> None:
        began, raised = time.thread_time(), None
        try:
            do()
        except MlxStreamError as error:
            raised = error
        found.append((raised, time.thread_time() - began))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (answer,) = found  # empty after any error but our own
    return answer


def answer(source: str) -> str:
    return ChatTemplate(source).render([user("Hi")], reply=True)


KEEPS = (
    "{{% set ns = namespace(x=0) %}}{{% set s = {} %}}{{% for i in range(99999) %}}"
    "{{% set ns.x = namespace(before=ns.x, value={}) %}}{{% endfor %}}"
)
# Texts with four bytes per character, or as many objects.
WIDE = {
    "wide texts kept": KEEPS.format("'😀' * 900000", "s ~ i"),
    "lists of wide texts kept": KEEPS.format("'😀' * 50000", "s | list"),
    "lists of numbers kept": KEEPS.format("0", "range(1000000, 1050000) | list"),
    "words kept": KEEPS.format("'😀 ' * 30000", "s.split()"),
    "namespaces kept": KEEPS.format("0", "0").replace("%}{%", "%}{% for j in range(99) %}{%", 3),
    "lists written": "{% set x = ['😀' * 1000] * 900 %}{% macro m() %}"
    + "{{ x }}" * 3_000
    + "{% endmacro %}{{ m() }}",
    "lists joined": "{% set n = namespace(x=['😀' * 900] * 900) %}"
    "{{ ([n] * 50000) | join(attribute='x') | length }}",
    "indented lines": "{{ ('😀' ~ '\n' * 900000) | indent(99, true, true) | length }}",
    "other lines indented": "{{ ('😀' ~ '\x0b' * 900000) | indent(99, true, true) | length }}",
    "formatted numbers": "{{ (('%f' * 300000) % 1e308) | length }}",
    "json separators": "{{ ([1] * 50000) | tojson(separators=('😀' * 900000, ':')) | length }}",
    "sorted text": "{{ ('😀' * 990000) | sort | length }}",
    "json indents": "{% set ns = namespace(x=['a'] * 30000) %}{% for i in range(400) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=99) | length }}",
}
# Single steps of Python or Jinja that would take minutes if time were not checked.
SLOW = {
    "search from behind": "{% set x = 'a' * 200000 %}{{ ('a' * 900000).rfind(x ~ 'b' ~ x) }}",
    "strip": "{{ ('a' * 900000).strip('b' * 900000 ~ 'a') }}",
    "trim": "{{ ('a' * 900000) | trim('b' * 900000 ~ 'a') }}",
    "striptags": "{{ ('<!-- -->' * 100000 | safe).striptags() }}",
    "path": "{{ ['a'] * 9000 | sort(attribute='0' + '.0' * 200000) }}",
    "path of join": "{{ (['a'] * 9000) | join(attribute='0' + '.0' * 200000) }}",
    "equal hashes": "{{ range(0, 99999 * (2**61 - 1), 2**61 - 1) | unique | list | length }}",
    "equal keys": "{{ dict(range(0, 59998 * (2**61 - 1), 2**61 - 1) | batch(2) | list) }}",
    "equal names": "{{ namespace(range(0, 59998 * (2**61 - 1), 2**61 - 1) | batch(2) | list) }}",
    "tests": "{% set x = range(50000) | list %}{{ ([x] * 1) | select('eq', x) | list | length }}"
    "{{ range(99999) | select('in', x) | list | length }}",
    "condition": "{% for i in [0] * 50000 if "
    + " or ".join(["(i or i)"] * 1_500)
    + " %}{% endfor %}",
    "attributes in a condition": "{% set x = [0] * 50000 %}"
    + ("{% for i in x if i" + ".real" * 150 + " %}{% endfor %}") * 9,
    "search from behind by name": "{% set x = 'a' * 200000 %}"
    "{{ ('a' * 900000).rsplit(sep=x ~ 'b' ~ x) }}",
    "rows of rows": "{% set ns = namespace(x='x') %}{% for i in range(9) %}"
    "{% for row in [ns] * 99 | map(attribute='x') | batch(99) %}{% set ns.x = row %}{% endfor %}"
    "{% endfor %}{{ ns.x }}",
    "json of anything": "{% set n = namespace(x=1) %}"
    "{{ ([n] * 50000) | tojson(default=('a' * 900000).upper) | length }}",
    "rounding": "{{ 5 | round(-999999999) }}",
    "numbers": "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "digits": "{{ ('1' * 900000) | int(0, 2) }}",
    "sets of nested lists": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 900 + "{{ x }}",
    "sets of nested pairs": "{% set x = 1 %}" + "{% set x = (x, x) %}" * 900 + "{{ x == x }}",
    "items of items": "{% set ns = namespace(x=1) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x}.items() %}{% endfor %}{{ ns.x }}",
    "escapes": "{% autoescape true %}{{ '<' * 900000 }}{% endautoescape %}",
}


@pytest.mark.parametrize("name", SLOW)
def test_no_single_step_takes_long(name: str):
    raised, seconds = elsewhere(lambda: answer(SLOW[name]))
    assert isinstance(raised, TemplateError) and seconds < ENDS


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_a_hostile_template_ends_in_time_on_any_thread(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meter, "SECONDS", 0.2)
    raised, seconds = elsewhere(lambda: answer(HOSTILE_TEMPLATES[name]))
    assert seconds < ENDS
    assert (raised is None) == (name in HARMLESS), raised
    if raised is not None:
        assert isinstance(raised, TemplateError) and len(str(raised)) < 300


@pytest.mark.parametrize(
    "name",
    [
        "kept",
        "kept lists",
        "kept slices",
        "doubled by +",
        "nested list",
        "macro that writes",
        "join",
        *WIDE,
    ],
)
def test_a_template_ends_in_bounded_memory(name: str):
    source = WIDE.get(name) or HOSTILE_TEMPLATES[name]
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            answer(source)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_the_longest_source_compiles_or_is_refused_in_time():
    units = ["{{a}}", "{%if a%}{%endif%}", "{%macro a()%}{%endmacro%}", "{%set a=b%}"]
    sources = [unit * (MAX_SOURCE // len(unit)) for unit in units]
    for source in [*sources, "{{[" + "a," * 49_000 + "]}}", "{{a" + "+a" * 49_000 + "}}"]:
        raised, seconds = elsewhere(lambda source=source: ChatTemplate(source))
        assert seconds < ENDS and (raised is None or isinstance(raised, TemplateError))


def test_all_renders_of_a_check_share_one_time_limit():
    # Each render is well within the limit, but a check needs some forty of them.
    slow = (
        "{% for i in range(99999) %}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    raised, seconds = elsewhere(lambda: ChatTemplate(slow * 3).check(system=True))
    assert isinstance(raised, TemplateError) and seconds < ENDS


def test_a_sleeping_machine_does_not_stop_an_honest_template(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1_000_000, 60))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert answer("{% for m in messages %}{{ m.content }}{% endfor %}") == "Hi"


def test_a_value_that_holds_another_twice_weighs_it_twice():
    value: list = ["ab"]
    for _ in range(10):
        value = [value, value]
    running = Meter()
    running.left = 2**10 * (2 + 3 * ITEM)  # 1,024 texts, their lists, and the lists of those
    assert running.weigh(value) == running.left - ITEM
    with pytest.raises(RuntimeError, match="too large"):
        running.weigh([value, "a"])


def test_all_values_of_a_render_share_one_budget():
    running = Meter()
    for _ in range(BUDGET // 100):
        running.made("x" * (100 - ITEM))
    with pytest.raises(RuntimeError, match="too numerous"):
        running.made("x")


def test_the_budget_grows_with_the_messages():
    question = "long " * 1_000_000
    source = "{% set c = messages[0].content | trim %}{% set c = '[' + c + ']' %}{{ c ~ c }}"
    assert len(ChatTemplate(source).render([user(question)], False)) == 2 * len(question) + 2
    with pytest.raises(TemplateError, match="too large"):
        ChatTemplate("{{ " + " ~ ".join(["messages[0].content"] * 60) + " }}").render(
            [user(question)], False
        )


HONEST = [
    "{{ '%s is %5.2f%% of %-4d|' % ('a', 1.5, 7) }}{{ '%(a)s' % {'a': 'b'} }}",
    "{{ 'a' | center(5) }}|{{ 'b'.ljust(3) }}|{{ '7'.zfill(3) }}|{{ 'a\nb' | indent(2) }}",
    "{{ ['a', 1] | join(', ') }}{{ '-'.join(['x', 'y']) }}",
    "{{ messages | map(attribute='content') | join('+') }}{{ messages | join(',', 'role') }}",
    "{{ 'a\nb\n\nc' | indent(2, true, true) }}{{ 'a\n\nb' | indent('- ') }}",
    "{{ 3.14159 | round(2) }}{{ 3.5 | round }}{{ '-7' | int }}{{ '7.5' | float }}",
    "{{ 'a b b' | replace('b', 'c', 1) }}{{ 'a' ~ 1 ~ none ~ no ~ [2] }}{{ 1 < 2 == 2 }}",
    "{{ 'aXbX' | replace('X', '--') }}{{ 'aa'.replace('a', 'b', 1) }}{{ 'x,y'.split(',')[-1] }}",
    "{{ {'b': [1, {'a': none}], 'a': 'é'} | tojson(indent=1, sort_keys=true) }}",
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{% for a, b in {'x': 1}.items() if b < 2 %}{{ a }}{{ loop.length }}{% endfor %}",
    "{{ '<b>' | safe }}{{ '<%s>' % '<' }}{{ {'a': '<'} | tojson | safe }}{{ '<' | e }}",
    "{{ (1, 2)[:1] }}{{ 'abc'[::-1] }}{{ [3, 1] | sort | last }}{{ messages[0]['role'][1:] }}",
    "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is not number else i }}{% endfor %}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2] | slice(2) | list }}{{ range(3) | list }}",
    "{{ 1 < 2 < 3 }}{{ 'H' in messages[0].content }}{{ 2 ** 8 - 1 }}{{ 7 // 2 % 2 }}{{ 1 / 4 }}",
    "{{ no }}{{ messages[0].no is defined }}{{ none }}{{ 1.0 }}{{ true }}{{ [none, 'a'] }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter upper %}b{% endfilter %}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{{ varargs }}{% endmacro %}"
    "{{ m(1) }}{% call m(3, 4, 5) %}!{% endcall %}",
    "{% for m in messages %}{{ loop.index ~ loop.last ~ loop.cycle(1, 2) }}{% endfor %}",
    "{% set ns = namespace(a=[], n=0) %}{% for i in range(3) %}{% set ns.a = ns.a + [i] %}"
    "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.a }}{{ ns.n }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | list }}{{ [1, 1] | unique | list }}",
    "{% if messages is iterable and messages[0] is mapping and 'a' is string %}yes{% endif %}",
    "{{ 'hello there' | title }}{{ ' a ' | trim }}{{ 'b' | default('c') }}{{ no | default('c') }}",
    "{% block a %}{{ messages | length }}{% endblock %}{{self.a()}}{%with x=1%}{{x}}{%endwith%}",
]  # fmt: skip


@pytest.mark.parametrize("source", HONEST)
def test_honest_templates_render_as_in_jinja(source: str):
    peer = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    peer.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    assert answer(source) == peer.from_string(source).render(messages=[user("Hi")])

"""Hostile chat templates and tokenizer steps, written by hand and by seed; knows no files."""

import random
from collections.abc import Callable
from typing import Any

# Each would take time or memory without end, or reach for Python.
HOSTILE_TEMPLATES = {
    "python": "{{ ''.__class__.__mro__ }}",
    "quiet loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "quiet loops with a test": (
        "{% for i in range(99999) if false %}{% endfor %}"
        "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "loops over one list": (
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    ),
    "compared in a row": (
        "{% set x = range(1000, 99999) | list %}{% set y = range(1000, 99999) | list %}"
        "{% if x " + "== y == x " * 1_000 + "%}{% endif %}"
    ),
    "loops that read loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% if loop.last %}{% endif %}"
        "{% endfor %}{% endfor %}"
    ),
    "recursive loop": (
        "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 9 }}{% endfor %}"
    ),
    "doubled by +": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x | length }}"
    ),
    "doubled by ~": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x | length }}"
    ),
    "doubled list": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x | length }}"
    ),
    "nested list": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "nested dict": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} "
        "%}{% endfor %}{{ ns.x | tojson }}"
    ),
    "nested list compared": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] "
        "%}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "nested namespaces": (
        "{% set ns = namespace(x=1) %}{% set top = namespace(n=ns) %}{% for i in range(60) %}"
        "{% set m = namespace(x=1) %}{% set ns.a = [m, m] %}{% endfor %}{{ top }}"
    ),
    "nested by product": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x] * 2 %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "nested by dict": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "nested by macro": (
        "{% macro m(n) %}{% if n < 60 %}{{ m(n + 1, varargs, varargs) }}{% else %}{{ varargs }}"
        "{% endif %}{% endmacro %}{{ m(0, 1, 1) }}"
    ),
    "field width": "{{ '%9999999999d' % 1 }}",
    "field width of format": "{{ '{:>9999999999}'.format(1) }}",
    "nested field width": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "precision": "{{ '%.9999999999f' % 1.5 }}",
    "precision of format": "{{ '{:.9999999999f}'.format(1.5) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "star width": "{{ '%*d' % (9999999999, 1) }}",
    "repeated fields": (
        "{% set x = 'ab' * 400000 %}{% set f = '%(a)s' * 100000 %}{{ (f % {'a': x}) | length }}"
    ),
    "repeated format": (
        "{% set x = 'ab' * 400000 %}{% set f = '{0}' * 100000 %}{{ f.format(x) | length }}"
    ),
    "center": "{{ 'a' | center(9999999999) }}",
    "indent": "{{ 'a\nb' | indent(9999999999) }}",
    "batch": "{{ [1] | batch(999999999, 1) | list | length }}",
    "slice": "{{ [1] | slice(999999999) | list | length }}",
    "replace": "{{ ('a' * 900000) | replace('a', 'b' * 900000) | length }}",
    "replace nothing": "{{ ('a' * 900000).replace('', 'b' * 900000) | length }}",
    "join": "{{ range(99999) | join('a' * 900000) | length }}",
    "join method": "{{ ('a' * 900000).join(['', '', ''] * 30000) | length }}",
    "ljust": "{{ 'a'.ljust(9999999999) | length }}",
    "zfill": "{{ 'a'.zfill(9999999999) | length }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) | length }}",
    "translate": "{{ ('a' * 900000).translate({97: 'b' * 900000}) | length }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') | length }}",
    "json indent": "{{ {'a': 1} | tojson(indent=999999999) }}",
    "wordwrap": "{{ ('a ' * 400000) | wordwrap(1, wrapstring='b' * 900000) | length }}",
    "urlize": "{{ ('http://a.b/' * 80000) | urlize | length }}",
    "striptags": "{{ ('<' * 900000) | striptags | length }}",
    "truncate": "{{ ('a' * 900000) | truncate(10, true, 'b' * 900000) | length }}",
    "xmlattr": "{{ {'a': 'b' * 900000} | xmlattr | length }}",
    "sum of lists": "{{ ([[1, 2]] * 300000) | sum(start=[]) | length }}",
    "strftime": "{{ strftime_now('%9999999d' * 20000) | length }}",
    "long strftime": "{{ strftime_now('%c' * 400000) | length }}",
    "compared": (
        "{% set x = ['a' * 1000] * 900 %}{% for i in range(99999) %}"
        "{% if x == ['a' * 1000] * 900 %}{% endif %}{% endfor %}"
    ),
    "found": (
        "{% set x = 'a' * 900000 %}{% set y = 'a' * 400000 + 'b' + 'a' * 400000 %}"
        "{% for i in range(99999) %}{% if y in x %}{% endif %}{% endfor %}"
    ),
    "kept": (
        "{% set ns = namespace(x=none) %}{% for i in range(99999) %}"
        "{% set ns.x = namespace(before=ns.x, text=i ~ 'a' * 900000) %}{% endfor %}"
    ),
    "kept slices": (
        "{% set ns = namespace(x=none) %}{% set x = 'a' * 900000 %}{% for i in range(99999) %}"
        "{% set ns.x = namespace(before=ns.x, text=x[1:]) %}{% endfor %}"
    ),
    "kept lists": (
        "{% set ns = namespace(x=none) %}{% for i in range(99999) %}"
        "{% set ns.x = namespace(before=ns.x, all=range(99999) | list) %}{% endfor %}"
    ),
    "macro that writes": (
        "{% macro m() %}" + "{{ 'a' * 900000 }}" * 900 + "{% endmacro %}{% set x = m() %}"
    ),
    "two calls each": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "caller": (
        "{% macro m(n) %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call m(1) %}" * 40
        + "x"
        + "{% endcall %}" * 40
    ),
    "attribute path": "{{ range(99999) | map(attribute='a' + '.a' * 400000) | list }}",
    "undefined path": "{{ messages | map(attribute='x.y.z') | list }}",
    "sorted": "{{ range(99999) | sort(reverse=true) | unique | list | length }}" * 300,
    "pprint": "{{ (range(99999) | list) | pprint | length }}" * 50,
    "long source": "{{ messages[0].content }}" * 300,
    "long text": "{% raw %}" + "{{" * 40_000 + "{% endraw %}",
    "deep": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "deep blocks": "{% if true %}" * 3_000,
    "large constants": "{{ " + " ~ ".join(["'a'"] * 900) + " }}",
    "digits": "{{ " + "9" * 50_000 + " }}",
    "spaces": "{%" + " " * 90_000,
    "dashes": "{{ 1 " + "-" * 4_000 + "1 }}",
    "includes itself": "{% include 'x' %}{% import 'x' as y %}{% extends 'x' %}",
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "writes a name": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    "raises": "{{ raise_exception(messages) }}",
    "debug": "{% debug %}",
    "surrogate": "{{ '\\ud800' }}{% for m in messages %}{{ m.content }}{% endfor %}",
}

PARTS = (
    *("{{ m.content }}", "{{ m['role'] }}", "{{ x }}", "{{ ns.x | length }}", "<|im_end|>"),
    *("{% set ns.x = ns.x + ns.x %}", "{% set x = [x, x] %}", "{% set x = x ~ x %}", "{{ x * 9 }}"),
    *(
        "{{ '%' ~ 99999 ~ 'd' % 1 }}",
        "{{ x | tojson }}",
        "{{ m | dictsort }}",
        "{{ ns.x.split() }}",
    ),
    *(
        "{{ loop.index }}",
        "{{ x | replace('a', ns.x) }}",
        "{{ x.join(messages) }}",
        "{{ range(9) }}",
    ),
    *("{{ x.y.z }}", "{{ messages | map(attribute='content') | join(ns.x) }}", "{{ m.items() }}"),
)


def some_template(draw: random.Random) -> str:
    """Return a template of random parts in loops, of which some multiply what they have."""
    parts = ["{% set ns = namespace(x='ab') %}{% set x = 'a' %}"]
    depth = draw.randint(1, 4)
    parts += [f"{{% for m in range({draw.choice((2, 99, 99999))}) %}}" for _ in range(depth - 1)]
    parts += ["{% for m in messages %}", *draw.choices(PARTS, k=draw.randint(1, 6))]
    return "".join(parts) + "{% endfor %}" * depth


Step = Callable[[dict[str, Any], random.Random], None]


def replaces(value: dict[str, Any], draw: random.Random) -> None:
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    value["normalizer"] = {"type": "Sequence", "normalizers": [step] * draw.choice((2, 26, 60))}


def replace_by_regex(value: dict[str, Any], draw: random.Random) -> None:
    pattern = draw.choice(("", "(a*)*b", "(.|e)*x", "(?=(\\w+))\\1:", "\\w", "(x+x+)+y", "["))
    content = draw.choice(("", "ee" * 1_000))
    value["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def split(value: dict[str, Any], draw: random.Random) -> None:
    pattern = draw.choice(("(a|aa)+$", "(e*)*z", "(\\w+\\s?)+$", "", "(?<=a)", "(((((e+)+)+)+)+)z"))
    value["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": draw.choice(("Isolated", "Removed", "MergedWithNext", "Nothing")),
        "invert": draw.choice((False, True)),
    }


def templates(value: dict[str, Any], draw: random.Random) -> None:
    special = {"id": "x", "ids": draw.choice(([], [1], [9_999_999], [1] * 50_000)), "tokens": ["x"]}
    single = [{"SpecialToken": {"id": draw.choice(("x", "y")), "type_id": 0}}]
    single += [{"Sequence": {"id": draw.choice("AB"), "type_id": 0}}] * draw.choice((0, 1, 500))
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": draw.choice(({}, {"x": special}, {"z": special})),
    }


def added(value: dict[str, Any], draw: random.Random) -> None:
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), draw.random() < 0.5)
    count = draw.choice((1, 30, 20_000))
    ids = draw.choice(
        (range(count), [2**32 - 1] * count, range(10**6, 10**6 + count), [-1] * count)
    )
    value["added_tokens"] = [
        {"id": i, "content": draw.choice(("", "a", f"<{i}>", " ")), "special": True} | token
        for i in ids
    ]


def vocabulary(value: dict[str, Any], draw: random.Random) -> None:
    vocab, merges = value["model"]["vocab"], value["model"]["merges"]
    name = draw.choice(list(vocab))
    number = draw.choice((0, -1, 2**31, 2**32 - 1, 2**32, 10**12, 1.5, "1"))
    ways: list[Callable[[], Any]] = [
        lambda: vocab.update({name: number}),
        lambda: vocab.pop(name),
        lambda: merges.append(["no", "such"]),
        lambda: merges.append(draw.choice(([], ["a"], "a", "a b c", None, ["", ""]))),
        lambda: vocab.clear(),
        lambda: vocab.update({"x" * 100_000: 300}),
        lambda: vocab.update({f"t{i}": 1_000 + i for i in range(20_000)}),
    ]
    draw.choice(ways)()


def other_model(value: dict[str, Any], draw: random.Random) -> None:
    vocab = value["model"]["vocab"]
    scores = [[token, draw.choice((-1.0, 0.0, 1e300, -1e300))] for token in vocab]
    models = [
        {"type": "Unigram", "unk_id": draw.choice((0, None, 10**6)), "vocab": scores},
        {"type": "Unigram", "unk_id": 0, "vocab": []},
        {"type": "WordLevel", "vocab": vocab, "unk_token": draw.choice(("", "no"))},
        {
            "type": "WordPiece",
            "vocab": vocab,
            "unk_token": "no",
            "continuing_subword_prefix": "#" * draw.choice((0, 2, 100_000)),
            "max_input_chars_per_word": draw.choice((0, 100, 2**63)),
        },
        {"type": "BPE", "vocab": vocab, "merges": [], "dropout": draw.choice((1.0, 0.5, 7, -1))},
        value["model"] | {"unk_token": "no such"},
        value["model"] | {"byte_fallback": True, "fuse_unk": True},
        value["model"] | {"continuing_subword_prefix": "é" * 3, "end_of_word_suffix": "x"},
    ]
    value["model"] = draw.choice(models)


def other_steps(value: dict[str, Any], draw: random.Random) -> None:
    steps = [
        {"type": "Precompiled", "precompiled_charsmap": draw.choice(("", "AAAA", "/////w==", "x"))},
        {"type": "Prepend", "prepend": "e" * draw.choice((0, 1_000_000))},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 2_000},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "ByteLevel"},
        {"type": "NoSuch"},
    ]
    value["normalizer"] = draw.choice(steps)
    value["decoder"] = draw.choice(
        (
            value["decoder"],
            {"type": "Replace", "pattern": {"Regex": "(e*)*z"}, "content": "e" * 10_000},
            {"type": "Strip", "content": "e", "start": 2**40, "stop": 2**40},
            {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
            {"type": "WordPiece", "prefix": "e", "cleanup": True},
            {"type": "BPEDecoder", "suffix": "e"},
            {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 2_000},
            None,
        )
    )


def words(value: dict[str, Any], draw: random.Random) -> None:
    value["pre_tokenizer"] = draw.choice(
        (
            {"type": "Metaspace", "replacement": draw.choice(("▁", "", "ab")), "split": True},
            {"type": "FixedLength", "length": draw.choice((0, 1, -1, 2**63))},
            {"type": "CharDelimiterSplit", "delimiter": draw.choice(("e", "", "ab"))},
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 3_000},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            {"type": "UnicodeScripts"},
            None,
        )
    )


def settings(value: dict[str, Any], draw: random.Random) -> None:
    huge = draw.choice((0, 1, 2**31, 2**62))
    value["truncation"] = {
        "direction": "Right",
        "max_length": huge,
        "strategy": "LongestFirst",
        "stride": draw.choice((0, huge)),
    }
    value["padding"] = {
        "strategy": {"Fixed": huge},
        "direction": "Right",
        "pad_to_multiple_of": draw.choice((None, 0, huge)),
        "pad_id": 2**32 - 1,
        "pad_type_id": 0,
        "pad_token": "p",
    }


HOSTILE_STEPS: dict[str, Step] = {
    **{"replaces": replaces, "replaces by regex": replace_by_regex, "split": split},
    **{"template processing": templates, "added tokens": added, "vocabulary": vocabulary},
    **{"another model": other_model, "other steps": other_steps, "words": words},
    **{"settings": settings},
}

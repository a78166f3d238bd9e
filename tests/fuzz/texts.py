"""Hostile chat templates and tokenizer steps, written by hand and by seed; independent of files."""

import random
from collections.abc import Callable
from typing import Any


def grown(step: str, out: str = "ns.x | length", first: str = "1", times: int = 60) -> str:
    """Return a template that enlarges a value again and again, and then writes `out`."""
    return (
        f"{{% set ns = namespace(x={first}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.x = {step} %}}{{% endfor %}}{{{{ {out} }}}}"
    )


FOR, END = "{% for i in range(99999) %}", "{% endfor %}"
# Each would take unlimited time or memory, or try to reach Python.
HOSTILE_TEMPLATES = {
    "python": "{{ ''.__class__.__mro__ }}",
    "quiet loops": FOR * 2 + END * 2,
    "quiet loops with a test": (
        "{% for i in range(99999) if false %}{% endfor %}"
        "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "loops over one list": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}" + END * 2,
    "compared in a row": (
        "{% set x = range(1000, 99999) | list %}{% set y = range(1000, 99999) | list %}"
        "{% if x " + "== y == x " * 1_000 + "%}{% endif %}"
    ),
    "loops that read loop": FOR * 2 + "{% if loop.last %}{% endif %}" + END * 2,
    "recursive loop": (
        "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 9 }}{% endfor %}"
    ),
    "doubled by +": grown("ns.x + ns.x", first="'ab'", times=99),
    "doubled by ~": grown("ns.x ~ ns.x", first="'ab'", times=99),
    "doubled list": grown("ns.x + ns.x", first="[1]", times=99),
    "nested list": grown("[ns.x, ns.x]", "ns.x", "[1]"),
    "nested dict": grown("{'a': ns.x, 'b': ns.x}", "ns.x | tojson"),
    "nested list compared": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] "
        "%}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "nested namespaces": (
        "{% set ns = namespace(x=1) %}{% set top = namespace(n=ns) %}{% for i in range(60) %}"
        "{% set m = namespace(x=1) %}{% set ns.a = [m, m] %}{% endfor %}{{ top }}"
    ),
    "nested by product": grown("[ns.x] * 2", "ns.x", "[1]"),
    "nested by dict": grown("dict(a=ns.x, b=ns.x)", "ns.x"),
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
    "kept": grown("namespace(before=ns.x, text=i ~ 'a' * 900000)", "''", "none", 99999),
    "kept slices": (
        "{% set ns = namespace(x=none) %}{% set x = 'a' * 900000 %}{% for i in range(99999) %}"
        "{% set ns.x = namespace(before=ns.x, text=x[1:]) %}{% endfor %}"
    ),
    "kept lists": grown("namespace(before=ns.x, all=range(99999) | list)", "''", "none", 99999),
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
    "long text": "{% raw %}" + "{{" * 20_000 + "{% endraw %}",
    "deep": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "deep blocks": "{% if true %}" * 3_000,
    "large constants": "{{ " + " ~ ".join(["'a'"] * 900) + " }}",
    "digits": "{{ " + "9" * 40_000 + " }}",
    "spaces": "{%" + " " * 40_000,
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
    *("{{ '%' ~ 99999 ~ 'd' % 1 }}", "{{ x | tojson }}", "{{ m | dictsort }}", "{{ x.y.z }}"),
    *("{{ loop.index }}", "{{ x | replace('a', ns.x) }}", "{{ x.join(messages) }}"),
    *("{{ messages | map(attribute='content') | join(ns.x) }}", "{{ ns.x.split() }}"),
    *("{{ range(9) }}", "{{ m.items() }}"),
)


def some_template(draw: random.Random) -> str:
    """Return a template of random parts in loops; some of the parts multiply what they have."""
    parts = ["{% set ns = namespace(x='ab') %}{% set x = 'a' %}"]
    depth = draw.randint(1, 4)
    parts += [f"{{% for m in range({draw.choice((2, 99, 99999))}) %}}" for _ in range(depth - 1)]
    parts += ["{% for m in messages %}", *draw.choices(PARTS, k=draw.randint(1, 6))]
    return "".join(parts) + "{% endfor %}" * depth


Step = Callable[[dict[str, Any], random.Random], None]
HUGE = (0, 1, -1, 2**31, 2**40, 2**62, 2**63)
BEHAVIORS = ("Isolated", "Removed", "MergedWithNext", "Nothing")
# Some of these take forever on some texts.
PATTERNS = ("", "(a*)*b", "(.|e)*x", "(?=(\\w+))\\1:", "\\w", "(x+x+)+y", "[", "(?<=a)", "(e*)*z")
PATTERNS += ("(a|aa)+$", "(\\w+\\s?)+$", "(((((e+)+)+)+)+)z")
PATTERNS += (
    "(?:e|\\s*)*",
    "\\s*\\n|\\s+",
    "\\s*\\n|\\s",
    "\\s+$",
    "(?=(\\d{3})+(?!\\d))",
    "e{1,9}" * 9 + "z",
)


def replaces(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizer(value: dict[str, Any], draw: random.Random) -> None:
    step = replaces({"String": "e"}, "ee")
    maps = ("", "AAAA", "/////w==", "x")
    value["normalizer"] = draw.choice(
        (
            *({"type": "Sequence", "normalizers": [step] * count} for count in (2, 26, 60)),
            replaces({"Regex": draw.choice(PATTERNS)}, draw.choice(("", "ee" * 1_000))),
            replaces({"Regex": draw.choice(PATTERNS)}, draw.choice(("", "ee" * 1_000))),
            {"type": "Precompiled", "precompiled_charsmap": draw.choice(maps)},
            {"type": "Prepend", "prepend": "e" * draw.choice((0, 1_000_000))},
            {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 2_000},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": draw.choice(("ByteLevel", "NoSuch"))},
        )
    )


def decoder(value: dict[str, Any], draw: random.Random) -> None:
    value["decoder"] = draw.choice(
        (
            replaces({"Regex": "(e*)*z"}, "e" * 10_000),
            {"type": "Strip", "content": "e", "start": 2**40, "stop": 2**40},
            {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
            {"type": "WordPiece", "prefix": "e", "cleanup": True},
            {"type": "BPEDecoder", "suffix": "e"},
            {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 2_000},
            None,
        )
    )


def pre_tokenizer(value: dict[str, Any], draw: random.Random) -> None:
    split = {"type": "Split", "behavior": draw.choice(BEHAVIORS), "invert": draw.random() < 0.5}
    value["pre_tokenizer"] = draw.choice(
        (
            *({**split, "pattern": {"Regex": draw.choice(PATTERNS)}} for _ in range(4)),
            {"type": "Metaspace", "replacement": draw.choice(("▁", "", "ab")), "split": True},
            {"type": "FixedLength", "length": draw.choice(HUGE)},
            {"type": "CharDelimiterSplit", "delimiter": draw.choice(("e", "", "ab"))},
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 3_000},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            {"type": "UnicodeScripts"},
            None,
        )
    )


def templates(value: dict[str, Any], draw: random.Random) -> None:
    special = {"id": "x", "ids": draw.choice(([], [1], [9_999_999], [1] * 50_000)), "tokens": ["x"]}
    single = [{"SpecialToken": {"id": draw.choice(("x", "y")), "type_id": 0}}]
    single += [{"Sequence": {"id": draw.choice("AB"), "type_id": 0}}] * draw.choice((0, 1, 500))
    tokens = draw.choice(({}, {"x": special}, {"z": special}))
    texts = {"single": single, "pair": single, "special_tokens": tokens}
    value["post_processor"] = {"type": "TemplateProcessing", **texts}


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
    model, vocab = value["model"], value["model"]["vocab"]
    scores = [[token, draw.choice((-1.0, 0.0, 1e300, -1e300))] for token in vocab]
    pieces = {"type": "WordPiece", "vocab": vocab, "unk_token": "no"}
    pieces["continuing_subword_prefix"] = "#" * draw.choice((0, 2, 100_000))
    value["model"] = draw.choice(
        (
            {"type": "Unigram", "unk_id": draw.choice((0, None, 10**6)), "vocab": scores},
            {"type": "Unigram", "unk_id": 0, "vocab": []},
            {"type": "WordLevel", "vocab": vocab, "unk_token": draw.choice(("", "no"))},
            pieces | {"max_input_chars_per_word": draw.choice((0, 100, 2**63))},
            {"type": "BPE", "vocab": vocab, "merges": [], "dropout": draw.choice((1.0, 0.5, 7))},
            model | {"unk_token": "no such"},
            model | {"byte_fallback": True, "fuse_unk": True},
            model | {"continuing_subword_prefix": "é" * 3, "end_of_word_suffix": "x"},
        )
    )


def settings(value: dict[str, Any], draw: random.Random) -> None:
    huge, step = (draw.choice(HUGE[:2] + HUGE[3:6]) for _ in range(2))
    cut = {"max_length": huge, "strategy": "LongestFirst", "stride": step}
    value["truncation"] = {"direction": "Right", **cut}
    value["padding"] = {
        **{"strategy": {"Fixed": huge}, "direction": "Right", "pad_to_multiple_of": step},
        **{"pad_id": 2**32 - 1, "pad_type_id": 0, "pad_token": "p"},
    }


HOSTILE_STEPS: dict[str, Step] = {
    **{"normalizer": normalizer, "decoder": decoder, "words": pre_tokenizer, "added": added},
    **{"template processing": templates, "vocabulary": vocabulary, "another model": other_model},
    **{"settings": settings},
}

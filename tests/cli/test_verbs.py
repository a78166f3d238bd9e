"""The commands as users see them: whole transcripts, results, help and wrong usage."""

import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_stream
from mlx_stream import ChatSession, Sampling
from mlx_stream.cli import VERBS as REGISTERED
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.hub.starter import STARTER_HUB_SIZE, STARTER_WHEEL_BYTES
from tests.chat.test_settle import SCRIPT, THINKS
from tests.fakes.shell import DEADLINE, GREEDY, done, edit, parsed, program, run
from tests.fakes.thinkers import write_thinker
from tests.fakes.tiny import tiny_tokenizer

VERBS = (
    "chat",
    "generate",
    "serve",
    "score",
    "plan",
    "devices",
    "convert",
    "bench",
    "doctor",
    "pull",
    "ls",
    "show",
    "models",
    "rm",
)
TEXT = "The man and the other one sat in the shade of a hill, and he said: I see it is so.\n" * 3


# --- chat, piped ---


def test_chat_is_a_chat_session(tiny: Path) -> None:
    sampling = Sampling(1.1, 40, 0.95, 0.01, 1.2, 7)
    session = ChatSession(
        mlx_stream.load(tiny), "Be brief.", 48, 2, sampling, max_tokens=30, stop=["e", "zz"]
    )
    expected = "".join(
        "".join(piece.text for piece in session.reply(question)) + "\n"
        for question in ("Hello there", "And then?")
    )
    options = "--window 48 --sinks 2 --temp 1.1 --top-k 40 --top-p 0.95 --min-p 0.01 --seed 7"
    more = "--repetition-penalty 1.2 --max-tokens 30 --stop e --stop zz --dtype float32"
    system = ("--system", "Be brief.")
    lines = "Hello there\n\n   \n\tAnd then?  \n \n"
    result = done("chat", tiny, *system, *options.split(), *more.split(), stdin=lines)
    assert result.out == expected
    other = done("chat", tiny, *options.split(), *more.split(), stdin=lines)
    assert other.out != expected


def test_chat_answers_each_line_whatever_its_end(letters: Path) -> None:
    options = ("chat", letters, *GREEDY, "--max-tokens", 12)
    for nothing in ("", "\n \n\t\n"):
        assert done(*options, stdin=nothing).out == ""
    result = done(*options, stdin="Hello\r\nAnd then?\r\n")
    assert re.fullmatch(r"[a-z]{12}\n[a-z]{12}\n", result.out) and result.err == ""
    assert done(*options, stdin="\ufeffHello\nAnd then?").out == result.out


def test_stats_go_to_standard_error(letters: Path) -> None:
    options = ("chat", letters, *GREEDY, "--max-tokens", 40, "--window", 24, "--seed", 5)
    quiet, result = (done(*options, *more, stdin="a\nb\n") for more in ((), ("--stats",)))
    assert result.out == quiet.out
    # The user is told once what is attended, with --stats and without.
    assert quiet.err.startswith(
        "mlx_stream: the window of 24 tokens is full: the oldest tokens are"
    )
    assert quiet.err.count("\n") == 1 == result.err.count(quiet.err)
    line = (
        r"\[28 of 28 tokens attended, [\d,]+ evicted(?: \(1 exchange\))?; "
        r"\d+\.\d tok/s, reading \d+ tok/s; cache \d+\.\d MB; seed 5\]\n"
    )
    assert re.fullmatch(f"({line}){{2}}", result.err.replace(quiet.err, ""))


def test_a_turn_longer_than_the_window_is_said_on_standard_error(letters: Path) -> None:
    result = done("chat", letters, *GREEDY, "--max-tokens", 4, "--window", 8, stdin="the man " * 20)
    assert re.fullmatch(r"[a-z]{4}\n", result.out)
    longer, full = result.err.splitlines()
    assert re.match(r"mlx_stream: this turn of \d+ tokens is longer than the window of 8: ", longer)
    assert full.startswith("mlx_stream: the window of 8 tokens is full: ")


# --- models ---


def test_the_starter_has_the_same_sizes_everywhere() -> None:
    (row,) = [line for line in done("models").out.splitlines() if line.startswith("starter ")]
    assert STARTER_HUB_SIZE in row
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    index_size = f"{STARTER_WHEEL_BYTES / 1e6:.0f} MB"
    assert f"{STARTER_HUB_SIZE} from the Hub" in readme and index_size in readme


# --- generate ---


def test_the_seed_decides_and_greedy_needs_none(tiny: Path) -> None:
    def said(*options: object) -> str:
        return done("generate", tiny, "-p", "The man", "--max-tokens", 24, *options).out

    assert said("--seed", 3) == said("--seed", 3) != said("--seed", 4)
    assert said() != said()
    assert said(*GREEDY) == said(*GREEDY, "--seed", 4)


def test_generate_reads_its_prompt_as_it_is(tiny: Path) -> None:
    options = ("generate", tiny, "--seed", 1, "--max-tokens", 16)
    texts = {
        text: done(*options, "-p", text).out for text in ("a\n b\n", "a\n b", "<|im_start|>", "€")
    }
    for text, out in texts.items():
        assert done(*options, "-p", "-", stdin=text).out == out
        assert done(*options, "-p", "-", stdin=f"\ufeff{text}".encode()).out == out
    assert len(set(texts.values())) == len(texts)


def test_a_long_standard_input_passes_through_a_small_window(letters: Path) -> None:
    options = ("generate", letters, "-p", "-", *GREEDY, "--window", 32, "--max-tokens", 20)
    prompt = " the" * 50_000
    assert len(prompt) == 200_000
    ran = done(*options, "--json", stdin=prompt)
    result = parsed(ran.out)
    assert [f"mlx_stream: {notice}" for notice in result["notices"]] == ran.err.splitlines()
    assert ran.err.startswith("mlx_stream: the text of 50,000 tokens is longer than sinks and ")
    assert re.fullmatch(r"[a-z]{20}", result["text"])
    assert result["prompt_tokens"] == 50_000 and result["attended"] == 36
    assert result["evicted"] == 50_000 + 19 - 36


def test_generate_as_json_is_the_same_text(tiny: Path) -> None:
    options = ("generate", tiny, "-p", "The man", "--seed", 3)
    result = done(*options, "--max-tokens", 9, "--json")
    assert result.err == ""
    found = parsed(result.out)
    assert found.keys() == {
        *("text", "finish", "prompt_tokens", "reply_tokens", "prompt_tokens_per_second"),
        *("tokens_per_second", "attended", "evicted", "sinks", "window", "cache_bytes", "seed"),
        *("drafted_tokens", "accepted_tokens", "notices"),
    }
    assert (found["finish"], found["reply_tokens"], found["seed"]) == ("length", 9, 3)
    assert (found["sinks"], found["window"]) == (4, 508)
    plain = done(*options, "--max-tokens", 9).out
    assert plain == found["text"] + "\n"
    stop = found["text"].strip()[-1]
    stopped = parsed(done(*options, "--max-tokens", 9, "--json", "--stop", stop).out)
    assert stopped["finish"] == "stop"
    assert stopped["text"] == found["text"].partition(stop)[0]


def test_a_reply_ends_where_the_model_ends_it(letters: Path, tmp_path: Path) -> None:
    said = done("generate", letters, "-p", "a", *GREEDY, "--max-tokens", 9).out.strip()
    folder = Path(shutil.copytree(letters, tmp_path / "ends"))
    edit(folder / "config.json", eos_token_id=tiny_tokenizer().get_vocab()[said[-1]])
    expected = said.partition(said[-1])[0]
    result = parsed(done("generate", folder, "-p", "a", *GREEDY, "--json").out)
    assert (result["text"], result["finish"]) == (expected, "end")
    assert result["reply_tokens"] == len(expected)
    assert done("generate", folder, "-p", "a", *GREEDY).out == f"{expected}\n"


# --- score ---


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def scored(*args: object, stdin: str | bytes = b"") -> dict[str, Any]:
    result = done("score", *args, "--json", stdin=stdin)
    assert result.err == ""
    return parsed(result.out)


def test_score_tells_how_likely_each_next_token_is(tiny: Path, text: Path) -> None:
    model = mlx_stream.load(tiny)
    ids = model.tokenizer.encode(TEXT)
    found = scored(tiny, text, "--window", 24)
    assert found.keys() == {
        *("tokens", "perplexity", "nll", "evicted", "seconds", "active_bytes", "peak_bytes")
    }
    assert found["tokens"] == len(found["nll"]) == len(ids) - 1
    mean = math.fsum(found["nll"]) / len(found["nll"])
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-9)
    assert found["evicted"] == len(ids) - 1 - 28
    assert 0 < found["active_bytes"] <= found["peak_bytes"] and found["seconds"] > 0
    assert scored(tiny, "-", "--window", 24, stdin=TEXT)["nll"] == found["nll"]
    for count in (1, 2, 28, 29, len(ids) - 1):
        logits = np.array(TokenStream(model, model.new_cache(4, 24)).read(ids[:count]))
        expected = np.logaddexp.reduce(logits) - logits[ids[count]]
        assert found["nll"][count - 1] == pytest.approx(expected, abs=2e-3)
    chunked = scored(tiny, text, "--window", 24, "--chunk", 7)["nll"]
    assert np.allclose(chunked, found["nll"], rtol=0, atol=2e-3)
    whole, dense = scored(tiny, text, "--window", 500), scored(tiny, text, "--dense")
    assert not np.allclose(whole["nll"], found["nll"], rtol=0, atol=0.1)
    assert np.allclose(dense["nll"], whole["nll"], rtol=0, atol=2e-3) and dense["evicted"] == 0
    part = scored(tiny, text, "--window", 500, "--max-tokens", 10)["nll"]
    assert len(part) == 9 and np.allclose(part, whole["nll"][:9], rtol=0, atol=2e-3)


def test_score_is_printed_as_text(tiny: Path, text: Path) -> None:
    match = re.match(
        r"perplexity ([\d.]+) over ([\d,]+) tokens\n0 evicted; ", done("score", tiny, text).out
    )
    assert match is not None
    assert float(match[1]) == pytest.approx(scored(tiny, text)["perplexity"], abs=1e-3)


# --- doctor, ls, help, bench ---


def test_doctor_says_what_is_here() -> None:
    result = done("doctor", "--json")
    facts = parsed(result.out)
    assert result.err == ""
    assert facts.keys() == {
        *("mlx_stream", "mlx", "mlx-lm", "python", "system", "device", "metal", "openblas", "blas"),
        *("memory_budget_bytes", "cores", "cache", "server", "advice"),
    }
    assert facts["cache"].startswith(os.environ["MLX_STREAM_HOME"])
    assert all(isinstance(line, str) and line for line in facts["advice"])
    shown = " ".join(done("doctor").out.split())
    for name, value in facts.items():
        assert name == "advice" or f"{name} {' '.join(str(value).split())}" in shown
    assert all(" ".join(line.split()) in shown for line in facts["advice"])


def test_a_cached_model_is_listed_and_opens_without_the_network(tiny: Path) -> None:
    assert "no models are cached yet; `mlx_stream models`" in done("ls").err
    assert parsed(done("ls", "--json").out) == {"models": []}
    folder = Path(os.environ["HF_HOME"]) / "hub" / "models--org--name"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for path in tiny.iterdir():
        (snapshot / path.name).symlink_to(path)
    result = done("ls")
    assert result.err == ""
    assert [line.split()[0] for line in result.out.splitlines()] == ["model", "org/name"]
    [entry] = parsed(done("ls", "--json").out)["models"]
    assert entry.keys() == {"name", "kind", "bytes", "path", "date"}
    assert (entry["name"], entry["kind"]) == ("org/name", "hub")
    options = ("-p", "a", *GREEDY, "--max-tokens", 8)
    by_name, by_path = (done("generate", name, *options) for name in ("org/name", tiny))
    assert (by_name.out, by_name.err) == (by_path.out, "")


def test_help_names_every_verb() -> None:
    found = subprocess.run(
        program("--help"), capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert found.stderr == ""
    assert all(re.search(rf"\b{verb}\b", found.stdout) for verb in VERBS)
    assert set(REGISTERED) == {*VERBS, "config", "eval", "sessions"}
    for verb in VERBS:
        assert done(verb, "--help").out == done(verb, "-h").out != ""


EVAL = ("perplexity", "sinks", "windows", "latency", "plot", "endurance", "streameval")
GROUPS = {
    "config": ("path", "get", "set"),
    "eval": EVAL,
    "sessions": ("list", "show", "export", "rm", "search", "verify"),
    "assistant": ("run", "ask", "note", "status", "stop", "install", "uninstall"),
}


@pytest.mark.parametrize("verb", [*VERBS, *(f"{g} {v}" for g in GROUPS for v in GROUPS[g])])
def test_help_has_no_names_of_pythons_types(verb: str) -> None:
    shown = done(*verb.split(), "--help").out
    assert f"{verb} [OPTIONS]" in shown and not re.search(r"[<>{}]", shown)


def test_the_line_of_sessions_names_its_commands() -> None:
    line = REGISTERED["sessions"].lower()
    assert all(name in line for name in GROUPS["sessions"] if name != "rm") and "remove" in line


def plain(text: str) -> str:
    """Remove colours, and the frame's line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", text).split())


USAGE = {
    **{"nonsense": "nonsense", "--nonsense": "--nonsense", "chat x --nonsense": "--nonsense"},
    **{"chat x y": "y", "generate x": "--prompt", "score": "FILE", "generate x -p": "-p"},
    **{"score x y --window many": "--window", "bench x --pairs 2.5": "--pairs", "ls x": "x"},
}


@pytest.mark.parametrize("arguments", USAGE)
def test_wrong_usage_exits_with_2(arguments: str) -> None:
    result = run(*arguments.split())
    assert (result.code, result.out) == (2, "")
    assert USAGE[arguments] in plain(result.err) and "Traceback" not in result.err


def test_only_bench_needs_mlx_lm(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str, version: Any = importlib.metadata.version) -> str:
        if name == "mlx-lm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    for package in ("mlx_lm", "transformers"):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    done("generate", tiny, "-p", "the", "--max-tokens", 5, *GREEDY)
    done("score", tiny, text, "--window", 20)
    done("plan", tiny)
    done("convert", tiny, tmp_path / "four", "--bits", 4, "--group-size", 32)
    done("chat", tiny, "--window", 60, "--max-tokens", 5, *GREEDY, stdin=b"Hi\n")
    assert parsed(done("doctor", "--json").out)["mlx-lm"] == "not installed"
    result = run("bench", tiny, "--window", 64)
    assert (result.code, result.out) == (1, "")
    assert "mlx-lm: it is not installed: pip install mlx-lm" in result.err


def test_bench_compares_with_mlx_lm(tiny: Path) -> None:
    # It runs in its own process, because mlx-lm imports a lot that would disturb other tests.
    options = ("--json", "--pairs", 3, "--window", 64, "--chunk", 16, "--prefill", 40)
    command = program("bench", tiny, *options)
    found = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert found.returncode == 0, found.stderr
    assert all(line.startswith("mlx_stream: ") for line in found.stderr.splitlines())
    result = parsed(found.stdout)
    assert result.keys() >= {"model", "dtype", "quantized", "against", "windows", "machine"}
    assert (result["against"], result["dtype"], result["quantized"]) == ("mlx-lm", "float32", False)
    assert list(result["windows"]) == ["64"]
    window = result["windows"]["64"]
    assert window["decode"]["pairs"] == window["prefill"]["pairs"] == 3
    for kind in ("decode", "prefill"):
        assert window[f"{kind}_ratio"] == window[kind]["ratio_quartiles"][1] > 0
    assert window["python"]["ours_nodes"] > 50 < window["python"]["mlx_lm_nodes"]
    assert window["bytes"].keys() == {"weights", "cache", "least_ms", "share_of_limit"}
    assert result["read"]["bytes_per_second"] > 0
    assert [one["tokens"] for one in (*result["prefill"], *result["prefill_best"])] == [40, 40]


def test_show_describes_a_model_and_its_template(tmp_path):
    thinks = write_thinker(tmp_path / "thinks", THINKS["thinks"], SCRIPT, "<|im_end|>")
    found = parsed(done("show", thinks, "--json").out)
    assert (found["family"], found["weights"]) == ("llama", "float32")
    assert found["largest_window"] == found["trained_context"] - 4 == 508
    assert found["template"] == {
        "chat": "yes",
        "system prompt": "a turn of its own, pinned",
        "thinks": "yes, marked by <think>",
        "tools": "no: this model's template cannot be used with tools: it does not write them",
        "rewrites a reply": "once the next question follows",
    }
    text = done("show", thinks).out
    assert "508 tokens, and 4 sinks" in text and "marked by <think>" in text
    edit(thinks / "tokenizer_config.json", chat_template=None)
    assert re.search("chat +no: use generate", done("show", thinks).out)
    refused = run("show", "nobody/nothing")
    assert refused.code == 1 and "mlx_stream pull nobody/nothing" in refused.err

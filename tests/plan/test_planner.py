"""The bits and window that a plan chooses, against every possible choice; the README's table."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.backend import CACHE_LIMIT
from mlx_stream.config import read_config
from mlx_stream.errors import ValueRefused
from mlx_stream.models.window import DEFAULT_WINDOW, resolve_window
from mlx_stream.plan.devices import Device, Figure, find
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.plan.memory import BITS
from mlx_stream.plan.planner import (
    FITS,
    ITEMSIZES,
    TIGHT,
    TOO_LARGE,
    WINDOWS,
    ModelSummary,
    Plan,
    Planner,
    PlanRequest,
    make_plan,
)
from tests.fakes.tiny import tiny_config

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "fakes" / "published"
ALL_WINDOWS = [window for windows in WINDOWS for window in windows]


def never(notice: str) -> None:
    raise AssertionError(notice)


def outline(name: str = "Llama-3.2-1B") -> ModelSummary:
    return summarize_model(str(PUBLISHED / f"{name}.json"), never)


def device(budget: int, metal: bool = True) -> Device:
    here = "a test"
    return Device("d", "d", "laptop", Figure(2**40, here), Figure(int(budget), here), metal=metal)


def tiny_outline(**changes) -> ModelSummary:
    return ModelSummary("tiny", read_config(tiny_config(**changes)), "float16")


# --- the choice ---


def order(plan: Plan) -> tuple[bool, int, int]:
    """Rank a plan: a window of at least the default comes first, then bits, then the window."""
    assert plan.recipe.bits is not None
    return plan.window >= DEFAULT_WINDOW, plan.recipe.bits, plan.window


@given(budget=st.integers(4 * 10**8, 5 * 10**9))
def test_nothing_better_fits_than_what_is_chosen(budget):
    model, place = outline(), device(budget)
    chosen = make_plan(model, place, PlanRequest())
    each = [
        make_plan(model, place, PlanRequest(bits=bits, window=window))
        for bits in BITS
        for window in ALL_WINDOWS
    ]
    fitting = [plan for plan in each if plan.verdict == FITS]
    if fitting:
        assert order(chosen) == max(order(plan) for plan in fitting)
    elif any(plan.verdict == TIGHT for plan in each):
        assert chosen.verdict == TIGHT
    else:
        assert chosen.verdict == TOO_LARGE and chosen.peak == min(plan.peak for plan in each)


def test_a_verdict_leaves_room_for_the_allocators_cache_and_says_what_is_missing():
    chosen = make_plan(outline(), device(2**40), PlanRequest(bits=4, window=1_020))
    assert chosen.peak == chosen.total > chosen.loading
    verdicts = {CACHE_LIMIT: FITS, CACHE_LIMIT - 1: TIGHT, 0: TIGHT, -1: TOO_LARGE}
    for room, verdict in verdicts.items():
        assert chosen.verdict_for(chosen.peak + room) == verdict
    none = make_plan(outline("Mistral-Nemo-12B"), find("iphone-13"), PlanRequest())
    assert (none.recipe.bits, none.window, none.verdict) == (2, min(ALL_WINDOWS), TOO_LARGE)
    assert none.missing == none.peak - int(2.4 * 2**30) > 10**9


def test_what_is_asked_for_is_kept():
    asked = PlanRequest("float16", sinks=9, window=777, bits=3, group_size=32, kv_bits=8)
    chosen = make_plan(outline(), device(2**40), asked)
    assert (chosen.dtype, chosen.sinks, chosen.window) == ("float16", 9, 777)
    assert chosen.recipe.name == "3 bits in groups of 32"
    full = make_plan(outline(), device(2**40), replace(asked, kv_bits=None))
    assert 0.53 < chosen.ring / full.ring < 0.54
    assert chosen.weights == full.weights


def test_speed_is_bandwidth_over_what_a_token_reads():
    chosen = make_plan(outline(), find("macbook-air-m2-8gb"), PlanRequest(bits=8, window=1_020))
    assert chosen.step == chosen.weights + chosen.ring  # its head is its embedding
    assert chosen.tokens_per_second == 100e9 / chosen.step
    assert make_plan(outline(), device(2**40), PlanRequest()).tokens_per_second is None


def test_quantized_files_are_kept_on_metal_and_never_given_more_bits():
    raw = tiny_config(quantization={"group_size": 32, "bits": 4})
    config = read_config(raw)
    paths = ("q", "k", "v", "o")
    held = frozenset(f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in paths)
    model = ModelSummary("tiny", config, "float16", held)
    kept = make_plan(model, device(2**40), PlanRequest())
    assert kept.recipe.bits is None and kept.recipe.name.startswith("as it is, 1")
    dequantized = make_plan(model, device(2**40, metal=False), PlanRequest(window=kept.window))
    assert dequantized.recipe.name == "float32 dequantized when loaded"
    assert dequantized.weights > 2 * kept.weights
    # Where that does not fit, they are kept after all.
    small = device(dequantized.peak - 1, metal=False)
    assert make_plan(model, small, PlanRequest(window=kept.window)).recipe.bits is None
    asked = PlanRequest(window=kept.window, keep=False)
    assert make_plan(model, small, asked).verdict == TOO_LARGE


def test_files_of_four_bits_are_offered_fewer_alone(tmp_path):
    raw = json.loads((PUBLISHED / "Llama-3.2-1B.json").read_text())
    path = tmp_path / "four.json"
    path.write_text(json.dumps(raw | {"quantization": {"group_size": 64, "bits": 4}}))
    model = summarize_model(str(path), never)
    recipes = list(Planner(model, device(2**40), PlanRequest()).recipes())
    assert [recipe.bits for recipe in recipes] == [None, 3, 2]
    assert recipes[0].name == "as it is, 4.5 bits per weight"


def test_a_bounded_model_gets_no_longer_window():
    assert make_plan(tiny_outline(), device(2**40), PlanRequest()).window == 512 - 4
    model = tiny_outline(model_type="mistral", sliding_window=100)
    assert make_plan(model, device(2**40), PlanRequest()).window == 100
    assert resolve_window(model.config, None, None) == (4, 100)


# --- the README's table ---

ROW = re.compile(r"^\| (\S+) \| (.+) \|$")


def readme_table() -> tuple[list[str], dict[str, list[str]]]:
    """Return the devices of the README's table, and its cells by model."""
    text = (ROOT / "mlx_stream" / "plan" / "README.md").read_text("utf-8")
    section = text[text.index("## Phones and laptops") :]
    section = section[: section.index("\n## ")]
    command = re.search(r"for device in ([^;]*); do", section.replace("\\\n", " "))
    assert command
    rows = [match for line in section.splitlines() if (match := ROW.match(line))]
    return command[1].split(), {row[1]: row[2].split(" | ") for row in rows}


def cell(chosen: Plan) -> str:
    bits = chosen.recipe.name.replace(" in groups of 64", "")
    return f"{bits}, {chosen.window:,}, {chosen.tokens_per_second:.0f}"


def test_the_readmes_table_is_what_plan_says():
    names, cells = readme_table()
    assert {find(name).memory.amount / 2**30 for name in names} == {8, 16, 64}
    kinds = [find(name).kind for name in names]
    assert kinds == ["phone", "laptop", "laptop", "laptop"]
    assert list(cells) == [path.stem for path in sorted(PUBLISHED.glob("[LM]*.json"))]
    for model, found in cells.items():
        plans = [make_plan(outline(model), find(name), PlanRequest()) for name in names]
        assert all(plan.verdict == FITS for plan in plans)
        assert found == [cell(plan) for plan in plans], model
        stored = json.loads((PUBLISHED / f"{model}.json").read_text())["torch_dtype"]
        assert outline(model).dtype == stored and stored in ITEMSIZES


def test_several_streams_share_the_weights_and_have_a_ring_each():
    one, four = (
        make_plan(outline(), device(2**40), PlanRequest(bits=4, window=1_020, streams=streams))
        for streams in (1, 4)
    )
    assert four.weights == one.weights and four.ring == 4 * one.ring
    assert one.workspace < four.workspace <= 2 * one.workspace
    assert four.step - four.ring == one.step - one.ring
    with pytest.raises(ValueRefused, match="--streams must be at least 1"):
        make_plan(outline(), device(2**40), PlanRequest(streams=0))

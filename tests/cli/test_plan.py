"""`plan` and `devices` as typed: their lines, their JSON, and what they refuse."""

import json
from pathlib import Path

from mlx_stream import backend
from mlx_stream.cache.steps.verify import SPARE
from mlx_stream.load import load
from mlx_stream.plan import devices
from tests.fakes.shell import done, edit, parsed
from tests.fakes.tiny import CHAT_TEMPLATE, tiny_config, tiny_weights, write_model, write_tiny

PUBLISHED = Path(__file__).parents[1] / "fakes" / "published"
ONE = PUBLISHED / "Llama-3.2-1B.json"
PHONE = ("--device", "iphone-16-pro")

PLAN_KEYS = {
    *(
        "model",
        "device",
        "recipe",
        "bits",
        "dtype",
        "kv_bits",
        "sinks",
        "window",
        "streams",
        "weights_bytes",
    ),
    *("ring_bytes", "workspace_bytes", "total_bytes", "loading_bytes", "stored_bytes"),
    *("step_bytes", "budget_bytes", "budget_estimated", "budget_bytes_without_entitlement"),
    *("bandwidth_bytes_per_second", "bandwidth_estimated", "verdict", "missing_bytes"),
    *("verdict_without_entitlement", "tokens_per_second"),
}


def plan(*args: object) -> dict:
    result = done("plan", *args, "--json")
    found = parsed(result.out)
    assert found.keys() == PLAN_KEYS
    total = found["weights_bytes"] + found["ring_bytes"] + found["workspace_bytes"]
    assert found["total_bytes"] == total
    return found


# --- plan ---


def test_plan_says_what_a_phone_has_to_hold():
    assert done("plan", ONE, *PHONE, "--bits", 4, "--window", 1_020).out.splitlines() == [
        "Llama-3.2-1B on iPhone 16 Pro, Pro Max",
        "",
        "what       needs",
        "weights    695.2 MB  4 bits in groups of 64",
        "ring       33.8 MB  4 sinks, window 1,020",
        "workspace  66.4 MB  one chunk of a prompt",
        "total      795.4 MB  fits: one program may use 6,442.5 MB with the increased-memory-limit "
        "entitlement; without it, 3,221.2 MB: fits",
        "loading    704.5 MB  at its peak, before the ring is allocated",
        "reads      729.1 MB  per token: at 60 GB/s, 82.3 tokens/s at most",
    ]


def test_plan_chooses_where_nothing_is_asked_for():
    found = plan(PUBLISHED / "Llama-3.1-8B.json", *PHONE)
    assert (found["bits"], found["window"], found["verdict"]) == (5, 2_048, "fits")
    assert found["verdict_without_entitlement"] == "does not fit"
    assert found["recipe"] == "5 bits in groups of 64" and found["dtype"] == "bfloat16"
    assert found["stored_bytes"] is None and not found["bandwidth_estimated"]
    lower = plan(PUBLISHED / "Llama-3.1-8B.json", *PHONE, "--no-entitlement")
    assert lower["budget_bytes"] == found["budget_bytes_without_entitlement"] == 3 * 2**30
    assert (lower["bits"], lower["verdict_without_entitlement"]) == (2, None)


def test_a_model_that_no_recipe_makes_fit_says_by_how_much():
    command = (PUBLISHED / "Mistral-Nemo-12B.json", "--device", "iphone-13")
    found = plan(*command)
    assert (found["bits"], found["verdict"]) == (2, "does not fit")
    missing = f"{found['missing_bytes'] / 1e6:,.1f} MB"
    assert f"does not fit by {missing}: one program may use" in done("plan", *command).out


def test_a_quantized_ring_is_planned_for():
    full, less = (plan(ONE, *PHONE, "--window", 8_188, *more) for more in ((), ("--kv-bits", 4)))
    assert less["ring_bytes"] < 0.3 * full["ring_bytes"]
    assert (full["kv_bits"], less["kv_bits"]) == (None, 4)
    assert ", 4 bits\n" in done("plan", ONE, *PHONE, "--kv-bits", 4).out


def test_without_a_device_it_is_about_this_machine(tmp_path):
    raw = tiny_config()
    folder = write_tiny(tmp_path / "model", raw, tiny_weights(raw))
    found = plan(folder, "--window", 200)
    model = load(folder)
    assert found["device"] == "here" and found["model"] == str(folder)
    assert found["budget_bytes"] == backend.memory_budget()
    assert found["weights_bytes"] == model.weight_bytes
    assert found["ring_bytes"] == model.new_cache(window=200, spare=SPARE).nbytes
    assert found["stored_bytes"] == model.weight_bytes  # both are float32
    if not backend.on_metal():
        assert found["tokens_per_second"] is None and found["dtype"] == "float32"
        assert "reads" not in done("plan", folder).out


def test_a_window_the_model_bounds_is_said(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config(model_type="mistral", sliding_window=100)))
    result = done("plan", config, "--window", 300, "--json")
    assert result.err == (
        "mlx_stream: window reduced from 300 to 100: the model's sliding_window\n"
    )
    assert parsed(result.out)["window"] == 100


def test_a_long_head_of_the_template_is_named(tmp_path):
    folder = write_model(tmp_path / "model")
    assert not done("plan", folder).err
    long = "{{ 'the head ' * 99 }}<|im_end|>" + CHAT_TEMPLATE
    edit(folder / "tokenizer_config.json", chat_template=long)
    found = done("plan", folder).err
    assert "begins every conversation with" in found and len(found.splitlines()) == 1


# --- devices ---


def test_devices_lists_all_and_marks_what_is_estimated():
    *lines, last = done("devices").out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:] if line.startswith(("i", "mac"))}
    assert list(rows) == [device.name for device in devices.built_in()]
    assert rows["iphone-16-pro"][1:5] == ["8", "6", "3", "60"]
    assert rows["iphone-air"][1:5] == ["12", "~9", "~4.5", "~76.8"]
    assert rows["mac-studio-m3-ultra-512gb"][1:5] == ["512", "~384", "-", "819"]
    assert last.endswith(str(devices.user_file()))


def test_devices_as_json_have_the_source_or_the_method_of_each_figure(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[[device]]\nname = "mine"\nkind = "laptop"\nmemory_gb = 8\n')
    found = parsed(done("devices", "--devices", own, "--json").out)["devices"]
    assert [device["name"] for device in found[-2:]] == ["mac-studio-m3-ultra-512gb", "mine"]
    phone = next(device for device in found if device["name"] == "iphone-17")
    bandwidth = phone["bandwidth_bytes_per_second"]
    assert bandwidth["value"] == 68_300_000_000 and bandwidth["estimated"] and bandwidth["method"]
    assert phone["memory_bytes"]["value"] == 8 * 2**30 and phone["memory_bytes"]["source"]
    assert found[-1]["bandwidth_bytes_per_second"] is None
    assert done("plan", ONE, "--device", "mine", "--devices", own).out.startswith("Llama-3.2-1B on")

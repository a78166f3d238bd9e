"""`mlx_stream convert`: refusals, interrupts, folders that may be replaced, reports, recipes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_stream.checkpoint import write
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.program import atomic_replace
from tests.fakes.refusals import one_line
from tests.fakes.shell import DEADLINE, done, edit, parsed, program
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

CONVERT = Path(__file__).parents[2] / "convert"
WORDS = "the man and the house of the river and the sea in the end " * 40
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**SHAPE)
    folder = tmp_path_factory.mktemp("source") / "model"
    return write_tiny(folder, config, tiny_weights(config), "bfloat16", shards=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_places_are_refused(source, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (theirs / name).write_text("{}")
    before = names(tmp_path), names(source)
    for out, why, *options in (
        (tmp_path / "file", "is a file: use a folder"),
        (tmp_path / "link", "is a link: use a folder"),
        (tmp_path / "file" / "out", "could not be written: "),
        (theirs, "exists: use another folder, or --force to replace it"),
        (source / "out", "is the source, is inside it, or contains it"),
        *((place, "not be replaced", "--force") for place in (theirs, source, source.parent)),
    ):
        assert why in one_line("convert", source, out, *options)
    assert (names(tmp_path), names(source)) == before


def test_only_what_a_conversion_wrote_is_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is not a model
    done("convert", source, out, "--bits", 4)
    first = files_of(out)
    assert "or --force to replace it" in one_line("convert", source, out, "--bits", 8)
    assert files_of(out) == first
    done("convert", source, out, "--bits", 8, "--force")
    assert json.loads((out / "conversion.json").read_text())["recipe"] == "uniform_8"
    done("convert", source, out, "--bits", 4, "--force")
    assert files_of(out) == first and names(tmp_path) == ["out"]
    (out / "notes.txt").touch()
    assert "not be replaced" in one_line("convert", source, out, "--force")
    (out / "notes.txt").unlink()
    edit(out / "conversion.json", conversion=None)
    assert "not be replaced" in one_line("convert", source, out, "--force")


def test_a_folder_is_replaced_or_stays(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
        (folder / folder.name).touch()
    atomic_replace.replace_folder(new, old)
    assert names(tmp_path) == ["old"] and names(old) == ["new"]
    with pytest.raises(OSError, match="new"):  # it no longer exists
        atomic_replace.replace_folder(new, old)
    assert names(tmp_path) == ["old"] and names(old) == ["new"]


@pytest.mark.parametrize(
    ("options", "why"),
    [((), "another process has written this"), (("--force",), "not be replaced")],
)
def test_a_process_that_was_first_keeps_its_folder(source, tmp_path, monkeypatch, options, why):
    flush, out = write.flush, tmp_path / "out"

    def race(path: Path) -> None:
        flush(path)
        if not out.exists():
            out.mkdir()
            (out / "theirs").touch()

    monkeypatch.setattr(write, "flush", race)
    assert why in one_line("convert", source, out, "--bits", 4, *options)
    assert names(out) == ["theirs"] and names(tmp_path) == ["out"]


STOPPING = """
import sys, time
from mlx_stream.checkpoint import shards
save = shards.mx.save_safetensors
def stop(path, *rest, **more):
    save(path, *rest, **more)
    print(path, file=sys.stderr, flush=True)
    time.sleep(60)
shards.mx.save_safetensors = stop
from mlx_stream.cli import main
main()
"""


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_what_is_interrupted_leaves_nothing_that_looks_finished(source, tmp_path, sent, code):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPPING, "convert", str(source), str(out), "--bits", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        weights = Path(process.stderr.readline().strip())
        assert weights.name == "shard-0.safetensors"
        for name in ("out", "other"):  # nothing deletes it while its owner is running
            with atomic_replace.partial_folder(tmp_path, name):
                assert weights.is_file()
        process.send_signal(sent)
        _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == code and not out.exists()
    if sent == signal.SIGINT:
        assert said == "mlx_stream: interrupted\n" and names(tmp_path) == []
    else:
        assert [name.startswith(".out.") for name in names(tmp_path)] == [True]
    done("convert", source, out, "--bits", 4)
    assert names(tmp_path) == ["out"]
    read_folder(out)


def test_every_process_writes_the_same_bytes(source, tmp_path):
    done("convert", source, tmp_path / "one", "--recipe", "mixed_4_6")
    command = program("convert", source, tmp_path / "two", "--recipe", "mixed_4_6")
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=DEADLINE)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    assert not any(str(tmp_path).encode() in data for data in one.values())


def test_the_result_is_described(source, tmp_path):
    out = tmp_path / "out"
    said = done("convert", source, out, "--bits", 4)
    first, second = said.out.splitlines()
    assert first.startswith(f"{out}: uniform_4, 4.5") and first.endswith("MB in 1 file")
    assert "at peak, within the bound of" in second and said.err == ""
    found = parsed(done("convert", out, tmp_path / "again", "--json").out)
    assert found["tensor_bytes"] == sum(a.nbytes for a in read_folder(out).tensors.values())
    assert found["peak_bytes"] <= found["bound_bytes"] and found["report"] is None
    assert found["recipe"] is None and found["source_quantized"] and found["not_quantized"] == []


def test_notices_tell_what_a_conversion_loses(source, tmp_path):
    done("convert", source, tmp_path / "four", "--bits", 4)
    again = done("convert", tmp_path / "four", tmp_path / "out", "--bits", 3, "--group-size", 128)
    assert again.err.startswith("mlx_stream: the source is already quantized")
    config = tiny_config()
    odd = write_tiny(tmp_path / "odd", config, tiny_weights(config), "float16")
    told = done("convert", odd, tmp_path / "odd4", "--bits", 4).err
    assert "2 matrices stay as they are" in told


def test_a_report_says_what_was_lost(source, text, tmp_path):
    found = {}
    for name, bits in (("copy", ()), ("eight", ("--bits", 8)), ("two", ("--bits", 2))):
        options = (*bits, "--report", text, "--report-tokens", 300, "--json")
        result = parsed(done("convert", source, tmp_path / name, *options).out)
        about = json.loads((tmp_path / name / "conversion.json").read_text())
        assert about == {key: result[key] for key in about}
        report = found[name] = about["report"]
        assert report.keys() == {
            *("text", "sinks", "window", "tokens", "source_perplexity", "perplexity", "kl_mean"),
            *("kl_p99", "top1_agreement", "source"),
        }
        sizes = sum(array.nbytes for array in read_folder(source).tensors.values())
        assert report["tokens"] == 299 and report["source"]["tensor_bytes"] == sizes
    copy, eight, two = found["copy"], found["eight"], found["two"]
    assert abs(copy["kl_mean"]) < 1e-6 and copy["top1_agreement"] == 1
    assert copy["perplexity"] == copy["source_perplexity"]
    assert 0 < eight["kl_mean"] < two["kl_mean"] and eight["kl_mean"] < eight["kl_p99"]
    assert eight["top1_agreement"] > two["top1_agreement"]
    options = ("--window", 508, "--max-tokens", 300, "--dtype", "float32", "--json")
    score = parsed(done("score", tmp_path / "two", text, *options).out)
    assert abs(score["perplexity"] - two["perplexity"]) < 1e-3 * score["perplexity"]
    assert names(tmp_path) == ["copy", "eight", "text.txt", "two"]


def test_a_sensitive_recipe_gives_what_suffers_more_bits(source, text, tmp_path):
    out = tmp_path / "out"
    options = ("--recipe", "sensitive_4_6", "--calibration", text, "--json")
    found = parsed(done("convert", source, out, *options).out)
    entry = json.loads((out / "config.json").read_text())["quantization"]
    more = {path for path, kind in entry.items() if isinstance(kind, dict) and kind["bits"] == 6}
    assert entry["bits"] == 4 and {"model.embed_tokens", "lm_head"} < more
    assert found["recipe"] == "sensitive_4_6"
    five = parsed(done("convert", source, tmp_path / "five", "--bits", 5, "--json").out)
    four = parsed(done("convert", source, tmp_path / "four", "--bits", 4, "--json").out)
    assert four["tensor_bytes"] < found["tensor_bytes"] <= five["tensor_bytes"]


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ("phone", "uniform_4"),
        ("laptop", "uniform_6"),
        ("laptop --bits 8", "uniform_8"),
        ("phone --calibration TEXT", "sensitive_4_6"),
    ],
)
def test_presets_run(source, text, tmp_path, words, recipe):
    preset, *options = words.replace("TEXT", str(text)).split()
    command = [sys.executable, str(CONVERT / "presets.py"), preset, str(source)]
    command += [str(tmp_path / "out"), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)
    about = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert about["recipe"] == recipe and (preset == "laptop" or about["dtype"] == "float16")
    if words == "phone":  # it does not replace an existing folder
        result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1


def test_a_preset_may_be_changed_and_must_exist(source, tmp_path):
    words = ("--preset", "phone", "--bits", 8, "--dtype", "bfloat16")
    found = parsed(done("convert", source, tmp_path / "out", *words, "--json").out)
    assert (found["recipe"], found["dtype"]) == ("uniform_8", "bfloat16")
    line = one_line("convert", source, tmp_path / "other", "--preset", "fridge")
    assert line == "--preset must be one of phone, laptop, not 'fridge'"


def test_recipes_are_compared_on_a_text(source, text):
    command = [sys.executable, str(CONVERT / "compare.py"), str(source), str(text)]
    options = ["--recipe", "uniform_8", "--recipe", "uniform_3", "--report-tokens", "300"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0
    assert [line.split(" |")[0] for line in done.stdout.splitlines()[2:]] == [
        *("source", "uniform_8", "uniform_3")
    ]
    lost = [float(line.split(" | ")[4]) for line in done.stdout.splitlines()[3:]]
    assert 0 < lost[0] < lost[1]
    none = subprocess.run([*command, "--recipe", "none"], capture_output=True, timeout=DEADLINE)
    assert none.returncode == 1 and none.stdout == b""


@pytest.mark.parametrize("script", sorted(path.name for path in CONVERT.glob("*.py")))
def test_a_script_says_what_it_takes(script):
    # A script of this name would shadow the package for scripts in its folder.
    assert script != "gguf.py"
    command = [sys.executable, str(CONVERT / script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 0 and result.stderr == ""
    table = (CONVERT / "README.md").read_text(encoding="utf-8")
    assert f"`{script} " in table


def on_a_device(budget: int) -> None:
    """Describe a user's own device, on which a program may use this many bytes."""
    home = Path(os.environ["MLX_STREAM_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "devices.toml").write_text(
        f'[[device]]\nname = "mine"\nkind = "laptop"\nmemory_gb = 1\nbudget_gb = {budget / 2**30}\n'
    )


def test_a_device_gets_the_most_bits_that_fit_it(source, tmp_path):
    on_a_device(2**28)
    needed = {}
    for bits in (8, 6):
        plan = parsed(done("plan", source, "--device", "mine", "--bits", bits, "--json").out)
        needed[bits] = plan["total_bytes"]
    on_a_device((needed[8] + needed[6]) // 2)
    assert "for mine: 6 bits" in done("convert", source, tmp_path / "six", "--device", "mine").err
    config = json.loads((tmp_path / "six" / "config.json").read_text())
    assert config["quantization"]["bits"] == 6
    assert "quantization" not in json.loads((source / "config.json").read_text())
    assert "copy: as stored, 6" in done("convert", tmp_path / "six", tmp_path / "copy").out
    whole = done("convert", source, tmp_path / "whole", "--device", "iphone-16-pro")
    assert "bfloat16" in whole.err and "not quantized" in whole.out
    on_a_device(100_000)
    line = one_line("convert", source, tmp_path / "none", "--device", "mine")
    assert "does not fit mine" in line and not (tmp_path / "none").exists()
    assert "leave out --bits" in one_line("convert", source, "x", "--device", "mine", "--bits", 4)

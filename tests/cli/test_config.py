"""The config file: what it may say, how it changes, and what takes precedence over it."""

import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_stream.cli.config_file import config_path, parse_config, read_config, setting, with_value
from mlx_stream.errors import ValueRefused
from tests.fakes.shell import done, parsed, run

COMMENTED = """\
# My defaults.
model = "starter"  # small
window = 508

[prompts]
# Arr.
pirate = "You are a pirate."
"""


def write(text):
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text, "utf-8")


def test_values_are_set_and_read_and_comments_stay():
    assert done("config", "path").out == f"{config_path()}\n"
    assert run("config", "get", "model").code == 1
    write(COMMENTED)
    done("config", "set", "window", "1,020")
    done("config", "set", "temperature", "0.2")
    done("config", "set", "prompts.short", 'Be "brief".\nVery.')
    text = config_path().read_text("utf-8")
    assert all(line in text for line in ("# My defaults.", "# small", "# Arr."))
    assert done("config", "get", "prompts.short").out == 'Be "brief".\nVery.\n'
    assert parsed(done("config", "get", "--json").out) == {
        "model": "starter",
        "window": 1020,
        "temperature": 0.2,
        "prompts.pirate": "You are a pirate.",
        "prompts.short": 'Be "brief".\nVery.',
    }
    assert [path.name for path in config_path().parent.iterdir()] == ["config.toml"]


@example({"system": "a\u2028b\x85", "model": "\x7f"}, COMMENTED)
@given(
    st.dictionaries(st.sampled_from(["model", "system", "prompts.a", "prompts.b"]), st.text()),
    st.sampled_from(["", COMMENTED, "[prompts]\n", 'model = "x"\n\n\n[prompts]\na = "b"']),
)
def test_any_texts_are_what_is_read_back(values, text):
    expected = parse_config(text, config_path())
    for key, value in values.items():
        changed = with_value(text, key, value)
        if changed is not None:  # a comment could be lost otherwise
            text = changed
            expected[key] = value
    assert parse_config(text, config_path()) == expected
    assert tomllib.loads(text) is not None


def test_the_order_is_option_environment_file(monkeypatch):
    write('window = 508\nmodel = "file"\n')
    assert setting("window") == 508
    monkeypatch.setenv("MLX_STREAM_WINDOW", "1020")
    assert setting("window") == 1020 and setting("model") == "file"
    monkeypatch.setenv("MLX_STREAM_WINDOW", "wide")
    with pytest.raises(
        ValueRefused, match="MLX_STREAM_WINDOW must be a whole number, 1 or more, not 'wide'"
    ):
        setting("window")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("windw = 3", "unknown key 'windw'"),
        ('window = "3"', "window must be a whole number, 1 or more, not '3'"),
        ("temperature = true", "temperature must be a number"),
        ("prompts = 3", "prompts must be a table"),
        ("[prompts]\na = 3", "prompts.a must be text"),
        ("window = = 3", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(text, error):
    write(text)
    for arguments in (("config", "get"), ("config", "set", "model", "x"), ("chat",)):
        refused = run(*arguments)
        assert refused.code == 1 and refused.err.count("\n") == 1 and error in refused.err
    assert config_path().read_text("utf-8") == text


def test_a_key_that_only_the_user_can_edit_is_refused_and_nothing_changes():
    write('system = """\nmodel = 3\n"""\n')
    assert run("config", "set", "system", "new").code == 1
    assert read_config() == {"system": "model = 3\n"}
    assert run("config", "set", "colour", "red").code == 1
    assert run("config", "set", "window", "wide").code == 1


def test_a_chat_begins_with_the_defaults_of_the_file(letters):
    done("config", "set", "model", str(letters))
    done("config", "set", "window", "90")
    done("config", "set", "system", "@short")
    done("config", "set", "temperature", "0")
    options = ("chat", "--max-tokens", 8, "-p", "Hi", "--session")
    refused = run(*options, "one")
    assert refused.code == 1 and "no system prompt is named @short" in refused.err
    done("config", "set", "prompts.short", "Be brief.")
    first = done(*options, "one")
    assert "Be brief." in done("sessions", "show", "one").out
    row = parsed(done("sessions", "list", "--json").out)["sessions"][0]
    assert (row["model"], row["window"]) == (str(letters), 90)
    done("config", "set", "window", "120")
    done(*options, "one")  # saved settings take precedence over the file
    assert parsed(done("sessions", "list", "--json").out)["sessions"][0]["window"] == 90
    assert first.out == done(*options, "two", "--window", 90).out


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "9", "1e999"])
def test_a_temperature_out_of_range_is_refused(value):
    found = run("config", "set", "temperature", "--", value)
    assert found.code == 1 and "temperature must be a number from 0 to 5" in found.err
    assert not config_path().exists()


def test_what_is_in_the_file_beside_the_value_stays():
    config_path().parent.mkdir(parents=True)
    config_path().write_text('model = "m"  # it\'s mine\n')
    config_path().chmod(0o600)
    assert "edit the file" in run("config", "set", "model", "n").err
    done("config", "set", "window", "700")
    assert "# it's mine" in config_path().read_text()
    assert config_path().stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["model = " + "[" * 3_000, "window = " + "9" * 5_000])
def test_a_file_that_the_parser_cannot_read_is_one_line(text):
    config_path().parent.mkdir(parents=True)
    config_path().write_text(text)
    found = run("config", "get")
    assert found.code == 1 and "is not TOML" in found.err and found.err.count("\n") == 1

"""The question of which model to use, asked once on a Mac: wording, answers, what is saved."""

import tomllib

import pytest

from mlx_stream.cli.config_file import config_path
from mlx_stream.cli.first_model import QUESTION, choose_model
from mlx_stream.errors import ValueRefused
from mlx_stream.plan import devices
from tests.fakes.terminals import Terminal
from tests.plan.test_offers import mac

NAME = "qwen3-4b-instruct"


class Asker:
    """A person who always gives the same answer, and the questions that were asked."""

    def __init__(self, answer: str):
        self.answer, self.questions = answer, []

    def __call__(self, question: str) -> str:
        self.questions.append(question)
        return self.answer


@pytest.mark.parametrize(
    ("answer", "chosen", "kept"),
    [("y", NAME, NAME), ("Yes", NAME, NAME), ("always", "starter", "starter"), ("n", "starter", 0)],
)
def test_an_answer_is_asked_once(answer, chosen, kept):
    asker = Asker(answer)
    assert [choose_model(asker, mac(8)) for _ in range(3)] == [chosen] * 3
    [question] = asker.questions
    assert f"{NAME} (2.3 GB to fetch, Apache-2.0) fits here with a window of 8,188" in question
    assert question.endswith(QUESTION) and config_path().exists() == bool(kept)
    if kept:
        assert tomllib.loads(config_path().read_text()) == {"model": kept}


def test_after_no_only_another_model_is_offered():
    asker = Asker("n")
    for size in (8, 8, 16, 16):
        choose_model(asker, mac(size))
    assert [NAME in question for question in asker.questions] == [True, False]


def test_no_answer_is_asked_again_and_changes_nothing():
    asker = Asker("")
    assert [choose_model(asker, mac(8)) for _ in range(2)] == ["starter"] * 2
    assert len(asker.questions) == 2 and not config_path().exists()


def test_nothing_is_asked_where_a_model_is_chosen_or_nothing_fits():
    assert choose_model(Asker("y"), mac(2)) == "starter"
    assert devices.here().metal or choose_model(Asker("y")) == "starter"
    config_path().parent.mkdir(parents=True)
    config_path().write_text('model = "org/name"\n[prompts]\n')
    assert choose_model(pytest.fail, mac(64)) == "org/name"


def test_other_settings_stay():
    config_path().parent.mkdir(parents=True)
    config_path().write_text("window = 508\n[prompts]\na = 'b'\n")
    choose_model(Asker("y"), mac(8))
    kept = tomllib.loads(config_path().read_text())
    assert kept == {"model": NAME, "window": 508, "prompts": {"a": "b"}}
    config_path().write_text("=")
    with pytest.raises(ValueRefused, match="is not TOML"):
        choose_model(pytest.fail, mac(8))


def test_a_chat_on_a_terminal_uses_the_chosen_model(letters):
    config_path().parent.mkdir(parents=True)
    config_path().write_text(f'model = "{letters}"\n')
    terminal = Terminal("-m", "mlx_stream", "chat")
    terminal.see(f"loading {letters}")
    terminal.see(">")
    terminal.leave()

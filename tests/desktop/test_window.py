"""The desktop app's window on Toga's dummy backend: typing, clicks and what it shows."""

import asyncio

from mlx_stream.chat.session_files import session_paths
from mlx_stream.program.lock import Lock
from tests.fakes.desks import answered, app, asked, has_left, on_a_loop, settled, until
from tests.fakes.shell import SMALL
from tests.fakes.tiny import tiny_config, write_letters


def clicked(view, name):
    """Select a saved conversation in the list."""
    names = [row.name for row in view.conversations.data]
    view.conversations._impl.simulate_selection(names.index(name))


def press(one, text):
    """Choose a menu command, or press its shortcut."""
    next(c for c in one.commands if getattr(c, "text", None) == text).action()


@on_a_loop
async def test_a_question_is_sent_and_its_reply_streams_into_the_window(letters):
    async with app(letters, window=200, max_tokens=600) as one:
        view = one.view
        assert view.gauge.text == "nothing is attended yet"
        assert view.send.enabled and not view.stop.enabled
        await asked(one, "What is new?")
        assert view.question.value == ""
        lengths = set()

        def grows():
            lengths.add(len(view.transcript.text))
            return one.controller.status.idle

        await until(grows)
        await settled(one)
        await until(lambda: one.controller.said[0].reply in view.transcript.text)
        assert len(lengths) > 2
        assert view.transcript.text.startswith("What is new?\n\n")
        assert view.gauge.text == str(one.controller.gauge)
        pinned, attended, free = view.gauge.shares
        assert (pinned + attended, pinned + attended + free) == (
            one.controller.gauge.attended,
            one.controller.gauge.capacity,
        )
        await until(lambda: len(view.conversations.data) == 1)
        assert view.conversations.data[0].title == "\N{BULLET} What is new?"


@on_a_loop
async def test_a_key_sends_too_the_stop_button_stops_and_nothing_is_sent_in_between(letters):
    async with app(letters, window=200, max_tokens=2_000) as one:
        one.view.question.value = "For ever?"
        press(one, "Send")
        await until(lambda: one.view.stop.enabled and one.controller.said[0].reply)
        assert not one.view.send.enabled and not one.view.model.enabled
        one.view.question.value = "Second"
        press(one, "Send")
        one.view.stop._impl.simulate_press()
        await settled(one)
        assert len(one.controller.said) == 1 and len(one.controller.said[0].reply) < 2_000
        assert one.view.question.value == "Second"
        await until(lambda: one.view.transcript.text.endswith(" [stopped]"))


@on_a_loop
async def test_a_click_in_the_list_reopens_a_saved_conversation(letters):
    async with app(letters, window=200) as one:
        view = one.view
        await answered(one, "First?")
        said = one.controller.said[0]
        view.new._impl.simulate_press()
        await until(lambda: view.transcript.text == "")
        await settled(one)
        assert view.gauge.text == "nothing is attended yet"
        await answered(one, "Another?")
        await until(lambda: len(view.conversations.data) == 2)
        clicked(view, "first")
        await until(lambda: one.controller.name == "first")
        await settled(one)
        await until(lambda: said.reply in view.transcript.text)
        assert "Another?" not in view.transcript.text


@on_a_loop
async def test_pickers_choose_a_model_and_a_window_and_errors_are_a_line_in_the_window(tmp_path):
    letters = write_letters(
        tmp_path / "letters", tiny_config(**SMALL, max_position_embeddings=1_024)
    )
    async with app(tmp_path / "nowhere") as one:
        view = one.view
        assert "nowhere" in view.notice.text.replace("\n", "")
        assert view.notice.style.color != view.transcript._colours.faded
        await until(lambda: one.controller.lists.models == ["starter"])
        one.controller.lists.models.append(str(letters))
        one.changed()
        await until(lambda: str(letters) in [row.value for row in view.model.items])
        view.model.value = str(letters)
        await until(lambda: one.controller.status.idle and one.controller.model == str(letters))
        await settled(one)
        await until(lambda: view.notice.text == "")
        await answered(one, "Hi")
        view.window.value = "508"
        await until(lambda: one.controller.gauge.capacity == 512)
        await settled(one)
        view.window.value = "8,000"  # more than the model was trained on
        await until(lambda: "trained context" in view.notice.text.replace("\n", " "))
        await settled(one)
        await until(lambda: view.window.value == "508")


@on_a_loop
async def test_a_question_that_was_not_read_is_back_where_it_was_typed(letters):
    async with app(letters) as one:
        await answered(one, "First?")
        await until(lambda: one.view.conversations.data)
        one.view.new._impl.simulate_press()
        await until(lambda: one.controller.name is None)
        with Lock.acquire(session_paths("first").lock):
            clicked(one.view, "first")
            await until(lambda: one.controller.status.alarming)
            await settled(one)
            one.view.question.value = "Lost?"
            one.view.send._impl.simulate_press()
            await until(lambda: one.view.question.value == "Lost?" and one.controller.status.idle)
            assert len(one.controller.said) == 1


@on_a_loop
async def test_questions_sent_in_the_moment_another_click_takes_are_drafts(letters):
    async with app(letters) as one:
        await answered(one, "First?")
        one.view.new._impl.simulate_press()
        for question in ("Lost?", "Or this?"):
            one.view.question.value = question
            one.view.send._impl.simulate_press()  # before the loop handles the first click
            assert one.view.question.value == ""
        one.view.question.value = "Second?"  # typed before the window shows them again
        await settled(one)
        assert one.view.question.value == "Second?" and one.controller.said == []
        await answered(one, "Second?")
        await until(lambda: one.view.question.value == "Lost? Or this?")
        assert [s.question for s in one.controller.said] == ["Second?"]


@on_a_loop
async def test_a_question_sent_while_the_window_is_changed_is_not_read_behind_its_back(letters):
    async with app(letters, window=200) as one:
        await answered(one, "Hi")
        one.view.window.value = "508"
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one.view.question.value = "More"
        one.view.send._impl.simulate_press()
        await settled(one)
        assert one.controller.window == 508 and not one.controller.status.alarming
        assert one.view.question.value == "More"
        assert [s.question for s in one.controller.said] == ["Hi"]
        (saved,) = one.controller.lists.conversations
        assert saved.exchanges == 1


@on_a_loop
async def test_on_a_mac_an_icon_in_the_menu_bar_stops_replies_and_brings_the_window_back(letters):
    async with app(letters, window=200, max_tokens=2_000, status_icon=True) as one:
        (icon,) = one.status_icons
        commands = {c.text: c for c in one.status_icons.commands if hasattr(c, "text")}
        assert commands["Show window"].group is icon
        await asked(one, "For ever?")
        await until(lambda: one.controller.said[0].reply)
        one.main_window._impl.simulate_close()
        assert not one.main_window.visible and one.controller.status.can_stop and not has_left(one)
        commands["Stop the reply"].action()
        await until(lambda: one.controller.status.idle)
        commands["Show window"].action()
        await until(lambda: one.main_window.visible)


@on_a_loop
async def test_a_conversation_can_be_shown_as_text(letters):
    async with app(letters) as one:
        await answered(one, "Hi <b>you</b>")
        before = set(one.windows)
        next(c for c in one.commands if c.text == "Conversation as text").action()
        await until(lambda: set(one.windows) - before)
        (window,) = set(one.windows) - before
        assert window.content.readonly
        assert window.content.value == (
            f"You:\nHi <b>you</b>\n\nModel:\n{one.controller.said[0].reply}"
        )


@on_a_loop
async def test_a_conversation_is_renamed_and_deleted(letters):
    async with app(letters, window=300) as one:
        view = one.view
        await answered(one, "First?")
        await until(lambda: view.title.value == "First?" and view.title.enabled)
        await answered(one, "Second line\nand third")
        view.title.value = "My trip"
        view.title._impl.simulate_confirm()
        await until(lambda: one.controller.name == "My-trip" and one.controller.status.idle)
        await until(lambda: [row.name for row in view.conversations.data] == ["My-trip"])
        assert view.title.value == "My-trip" and one.controller.attended == 2
        await answered(one, "Third?")
        assert [said.question for said in one.controller.said][1:] == [
            "Second line\nand third",
            "Third?",
        ]
        view.main._impl.dialog_responses["ConfirmDialog"] = [False, True]
        view.remove._impl.simulate_press()
        await asyncio.sleep(0.1)
        assert one.controller.name == "My-trip"
        view.remove._impl.simulate_press()
        await until(lambda: one.controller.name is None and not view.conversations.data)
        assert one.controller.said == [] and not session_paths("My-trip").database.exists()


@on_a_loop
async def test_a_name_that_is_taken_is_refused_and_the_conversation_stays_open(letters):
    async with app(letters) as one:
        await answered(one, "First?")
        await one.controller.begin()
        await answered(one, "Second?")
        await one.controller.rename("first")
        assert one.controller.name == "second" and one.controller.status.alarming
        assert "already exists" in one.controller.status.notice
        await answered(one, "Third?")
        assert len(one.controller.said) == 2

"""What the window shows and what its buttons do; independent of the engine and widgets.

Everything here runs on one event loop. Anything that may block (loading a model, disk access) runs
on a thread and is awaited. After any change, `changed` is called, and the window reads what it
needs.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from mlx_stream import Piece, Sampling
from mlx_stream.chat import remove_session, rename_session
from mlx_stream.errors import MlxStreamError, one_line
from mlx_stream.hub import STARTER, STARTER_SYSTEM
from mlx_stream_desktop import history
from mlx_stream_desktop.history import Message
from mlx_stream_desktop.lists import Lists
from mlx_stream_desktop.model_session import SECONDS_BETWEEN, Gauge, ModelSession

DEFAULT_WINDOW, MAX_TOKENS = 2_048, 512
# The largest leaves room for the system prompt in the 8,192-token context that many models have.
WINDOWS = (508, 1_020, DEFAULT_WINDOW, 4_092, 8_000)
# How many seconds the engine has to end a reply and save it.
SECONDS_TO_KEEP = 2.0


class Status:
    """What the controller is doing, and one line about it.

    Attributes:
        phase: "loading", "idle", "reading" a question, "replying", or "failed" to load a model.
        notice: a line for the user, or an empty string.
        alarming: whether the notice reports a failure.
    """

    def __init__(self, changed: Callable[[], None]):
        self._changed = changed
        self.phase, self.notice, self.alarming = "loading", "", False

    @property
    def idle(self) -> bool:
        return self.phase == "idle"

    @property
    def can_stop(self) -> bool:
        return self.phase in ("reading", "replying")

    @property
    def can_choose(self) -> bool:
        return self.phase in ("idle", "failed")

    def say(self, notice: str, alarming: bool = False) -> None:
        self.notice, self.alarming = notice, alarming
        self._changed()

    def alarm(self, error: Exception) -> None:
        self.say(one_line(error), alarming=True)


class ChatController:
    """One conversation at a time, on one model.

    Attributes:
        said: the open conversation's exchanges, oldest first.
        attended: how many of the latest exchanges are attended.
        lists: the conversations and models that can be opened.
        draft: questions that were not sent; the window puts them back into its input field and
            clears this.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        model: str = STARTER,
        window: int = DEFAULT_WINDOW,
        sampling: Sampling | None = None,
        max_tokens: int = MAX_TOKENS,
    ):
        self._changed = changed
        self.status = Status(lambda: self._changed())
        self.model, self.window = model, window
        sampling = sampling or Sampling(temperature=0.6, top_p=0.9)
        self._session = ModelSession(sampling, max_tokens)
        self.lists = Lists(model, self._session.aside, self.status.alarm, lambda: self._changed())
        self.name: str | None = None
        self.said: list[Message] = []
        self.attended, self.gauge, self.draft = 0, Gauge(), ""
        self._reply: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model, and list the conversations and models."""
        await asyncio.gather(self.lists.refresh(), self._load(self.model))

    async def send(self, text: str) -> None:
        """Ask a question and show the reply as it arrives; return when it has ended.

        A question sent while the chat is not idle becomes a draft.
        """
        question = text.strip()
        if not question:
            return
        if not self.status.idle:
            self._give_back(question)
            return self._changed()
        self.status.phase = "reading"
        self.status.say("")
        self.said.append(Message(question, time=history.now()))
        self._reply = asyncio.create_task(self._ask(question))
        await asyncio.wait({self._reply})
        self._reply.result()
        await self.lists.refresh()

    def stop(self) -> None:
        """End the reply within one token."""
        if self._reply and self.status.can_stop:
            self._reply.cancel()

    async def begin(self) -> None:
        """Leave the conversation for a new one, which is named after its first question."""
        if self.status.can_choose:
            await self._leave()
            self.status.say("")

    async def open(self, name: str) -> None:
        """Open a saved conversation, with its own model and window."""
        if not self.status.can_choose or name == self.name:
            return
        before, self.status.phase = self.status.phase, "loading"
        self.status.say(f"opening {name}")
        try:
            said, damage = await self._session.aside(history.transcript, name)
        except MlxStreamError as error:
            self.status.phase = before
            return self.status.alarm(error)
        await self._leave()
        self.name, self.said = name, said
        summary = self.lists.summary(name)
        header = summary.header if summary else None
        model = header.model if header else self.model
        self.window = header.window if header else self.window
        loaded = self._session.engine and model == self.model
        await (self._join() if loaded else self._load(model))
        if damage:
            self.status.say(damage, alarming=True)

    async def rename(self, text: str) -> None:
        """Rename the open conversation."""
        before, name = self.name, history.as_name(text)
        if not before or not self.status.idle or name in ("", before):
            return self._changed()
        self.status.phase = "loading"  # nothing may be sent to a conversation that is being closed
        self._changed()
        await self._close_chat()
        try:
            await self._session.aside(rename_session, before, name)
            self.name, refused = name, ""
        except MlxStreamError as error:
            refused = one_line(error)
        await self._join()
        if refused:
            self.status.say(refused, alarming=True)
        await self.lists.refresh()

    async def delete(self) -> None:
        """Permanently remove the open conversation."""
        name = self.name
        if not name or not self.status.can_choose:
            return
        await self._leave()
        try:
            await self._session.aside(remove_session, name)
            self.status.say("")
        except MlxStreamError as error:
            self.status.alarm(error)
        await self.lists.refresh()

    async def choose_model(self, model: str) -> None:
        """Switch to another model, which reads the attended turns again."""
        if self.status.can_choose and (model != self.model or not self._session.engine):
            await self._load(model)

    async def choose_window(self, window: int) -> None:
        """Change the size of the window; the attended turns are read again."""
        if not self.status.can_choose or window == self.window:
            return
        before, self.window = self.window, window
        if not self._session.engine or not self.name:
            return self._changed()
        self.status.phase = "loading"  # nothing may be sent to a conversation that is being closed
        self._changed()
        await self._close_chat()
        if not await self._join():
            refused, self.window = self.status.notice, before
            await self._join()
            self.status.say(refused, alarming=True)

    async def close(self) -> None:
        """Stop the reply, save the conversation, and free the model's memory."""
        while self._reply and not self._reply.done():
            self.stop()
            await asyncio.wait({self._reply})
        self.status.phase = "loading"
        await self._close_chat()
        await self._session.close()

    # --- one reply ---

    async def _ask(self, question: str) -> None:
        session = self._session
        before, heard = session.last, False
        try:
            if session.chat is None:
                self.name = self.name or await session.aside(history.new_name, question)
            chat = session.chat or session.open(
                self.name, self.window, opening_system(self.model, self.said)
            )
            async with aclosing(chat.areply(question)) as pieces:
                async for piece in pieces:
                    heard = True
                    self._hear(piece)
        except MlxStreamError as error:
            self.status.alarm(error)
            if not heard:
                try:
                    session.is_open()
                except MlxStreamError:  # the conversation cannot be opened
                    await self._close_chat()
            if not session.chat and len(self.said) == 1:  # there is no conversation yet
                self.name = None
        except asyncio.CancelledError:
            self._hear(Piece("", "interrupted"))
            heard = True
        if heard:  # the engine stops before the next token, and reports what is kept
            with suppress(TimeoutError):
                async with asyncio.timeout(SECONDS_TO_KEEP):
                    while session.last is before:
                        await asyncio.sleep(SECONDS_BETWEEN)
        self.status.phase = "idle"
        self._settle(session.last is not before)
        self._changed()

    def _hear(self, piece: Piece) -> None:
        last = self.said[-1]
        recalled = tuple(passage.line for passage in piece.recalled)
        reply = last.reply + piece.text
        self.said[-1] = replace(last, reply=reply, finish=piece.finish, recalled=recalled)
        if piece.text:
            self.status.phase = "replying"
        self._count()
        self._changed()

    def _settle(self, read: bool) -> None:
        """Show the last exchange as it was stored; an unread question becomes a draft."""
        last, kept = self.said[-1], self._session.last
        if not read:
            self._give_back(last.question)
            del self.said[-1]
        elif kept and kept.question == last.question:
            self.said[-1] = replace(last, reply=kept.reply, finish=kept.finish)
        else:
            self.said[-1] = replace(last, finish=last.finish or "interrupted")
        self._count()

    def _give_back(self, question: str) -> None:
        self.draft = f"{self.draft} {question}".strip()

    def _count(self) -> None:
        """Update the gauge, the number of attended exchanges and the notice."""
        # The exchange in progress is attended, but is not among the completed ones.
        streams = bool(self._session.chat) and self.status.can_stop
        self.attended = min(len(self.said), len(self._session.exchanges) + streams)
        self.gauge, notice = self._session.gauge, self._session.new_notice()
        if notice is not None and not self.status.alarming:
            self.status.notice = notice

    # --- conversations, models and lists ---

    async def _join(self) -> bool:
        """Open the conversation on the engine; return whether that succeeded."""
        self.status.phase = "loading"
        self.status.say(f"opening {self.name}")
        try:
            self._session.open(self.name, self.window, opening_system(self.model, self.said))
            await self._session.wait()
            self.status.say("")
        except MlxStreamError as error:
            await self._close_chat()
            self.status.alarm(error)
        self.status.phase = "idle"
        self._count()
        self._changed()
        return self._session.chat is not None

    async def _load(self, model: str) -> None:
        """Replace the current model with another, and open the conversation on it."""
        self.model, self.status.phase = model, "loading"
        self.status.say(f"loading {model}")
        await self._close_chat()
        try:
            if not await self._session.load(model, self.status.say):
                return  # the window was closed in the meantime
        except MlxStreamError as error:
            self.status.phase = "failed"
            return self.status.alarm(error)
        if self.name:
            await self._join()
        else:
            self.status.phase = "idle"
            self.status.say("")

    async def _leave(self) -> None:
        before, self.status.phase = self.status.phase, "loading"
        await self._close_chat()
        self.name, self.said, self.status.phase = None, [], before
        self._count()
        self._changed()

    async def _close_chat(self) -> None:
        try:
            await self._session.close_chat()
        except (MlxStreamError, TimeoutError) as error:
            self.status.alarm(error)


def opening_system(model: str, said: Sequence[Message]) -> str | None:
    """Return the system prompt for opening a conversation; None keeps the conversation's own."""
    return STARTER_SYSTEM if model == STARTER and not said[:-1] else None

"""What the window shows and what its buttons do; knows the engine and no widgets.

Everything here runs on one event loop. What may block (a model's loading, disks) is awaited on a
thread; nothing else waits. After any change `changed` is called; the window reads what it needs.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx_stream
from mlx_stream import Engine, Piece
from mlx_stream.chat import manage
from mlx_stream.chat.exchange import Exchange
from mlx_stream.engine import Session
from mlx_stream.errors import MlxStreamError, one_line
from mlx_stream.hub.listing import cached_models
from mlx_stream.hub.starter import STARTER, STARTER_SYSTEM
from mlx_stream_desktop import history
from mlx_stream_desktop.history import Message

STARTER, DEFAULT_WINDOW, MAX_TOKENS = STARTER, 2_048, 512
# The largest leaves room for the system prompt in the 8,192 places that many models know.
WINDOWS = (508, 1_020, DEFAULT_WINDOW, 4_092, 8_000)
SECONDS_TO_CLOSE, SECONDS_BETWEEN = 5.0, 0.03
T = TypeVar("T")


@dataclass(frozen=True)
class Gauge:
    """What the stream holds: in tokens, and bytes; `capacity` is 0 before there is a stream."""

    attended: int = 0
    pinned: int = 0
    capacity: int = 0
    evicted: int = 0
    bytes: int = 0
    tokens_per_second: float = 0.0

    def __str__(self) -> str:
        if not self.capacity:
            return "nothing is attended yet"
        kept = f" ({self.pinned:,} for good)" if self.pinned else ""
        speed = f" · {self.tokens_per_second:.1f} tok/s" if self.tokens_per_second else ""
        return (
            f"{self.attended:,} of {self.capacity:,} tokens attended{kept} · "
            f"{self.evicted:,} evicted · {self.bytes / 1e6:,.1f} MB{speed}"
        )


class ChatController:
    """One conversation at a time, on one model.

    Attributes:
        phase: "loading", "idle", "reading" a question or "replying"; "failed" without a model.
        notice: one line the user should know, or nothing.
        said: of the conversation that is open, oldest first.
        attended: how many of the last of them are attended.
        draft: questions that were not taken, to be put back where they were typed by whoever then
            empties this.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        model: str = STARTER,
        window: int = DEFAULT_WINDOW,
        sampling: mlx_stream.Sampling | None = None,
        max_tokens: int = MAX_TOKENS,
    ):
        self._changed = changed
        self.model, self.window = model, window
        self._max_tokens = max_tokens
        self._sampling = sampling or mlx_stream.Sampling(temperature=0.6, top_p=0.9)
        self.models: list[str] = [model]
        self.conversations: list[manage.SessionSummary] = []
        self.name: str | None = None
        self.said: list[Message] = []
        self.attended, self.gauge = 0, Gauge()
        self.phase, self.notice, self.alarming, self.draft = "loading", "", False, ""
        self._engine: Engine | None = None
        self._chat: Session | None = None
        self._noted = ""
        self._pool = ThreadPoolExecutor(2)
        self._reply: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return self.phase == "idle"

    @property
    def can_stop(self) -> bool:
        return self.phase in ("reading", "replying")

    @property
    def can_choose(self) -> bool:
        return self.phase in ("idle", "failed")

    async def start(self) -> None:
        """Load the model, and list what is history."""
        await asyncio.gather(self._list(), self._load(self.model))

    async def send(self, text: str) -> None:
        """Ask, and show the reply as it comes; returns when it has ended.

        A question that comes while something else goes on is a draft, not lost.
        """
        question = text.strip()
        if not question:
            return
        if not self.idle:
            self._give_back(question)
            return self._changed()
        self.phase = "reading"
        self._say("")
        self.said.append(Message(question))
        self._reply = asyncio.create_task(self._ask(question))
        await asyncio.wait({self._reply})
        self._reply.result()
        await self._list()

    def stop(self) -> None:
        """End the reply within one token."""
        if self._reply and self.can_stop:
            self._reply.cancel()

    async def begin(self) -> None:
        """Leave the conversation for a new one, which gets a name with its first question."""
        if self.can_choose:
            await self._leave()
            self._say("")

    async def open(self, name: str) -> None:
        """Go on with a saved conversation, on its own model and window."""
        if not self.can_choose or name == self.name:
            return
        before, self.phase = self.phase, "loading"
        self._say(f"opening {name}")
        try:
            said, damage = await self._aside(history.transcript, name)
        except MlxStreamError as error:
            self.phase = before
            return self._say(one_line(error), alarming=True)
        await self._leave()
        self.name, self.said = name, said
        header = next((one.header for one in self.conversations if one.name == name), None)
        model = header.model if header else self.model
        self.window = header.window if header else self.window
        await (self._join() if self._engine and model == self.model else self._load(model))
        if damage:
            self._say(damage, alarming=True)

    async def choose_model(self, model: str) -> None:
        """Go on with another model; what is attended of the conversation is read again."""
        if self.can_choose and (model != self.model or not self._engine):
            await self._load(model)

    async def choose_window(self, window: int) -> None:
        """Go on with another window; what is attended of the conversation is read again."""
        if not self.can_choose or window == self.window:
            return
        before, self.window = self.window, window
        if not self._engine or not self.name:
            return self._changed()
        self.phase = "loading"  # nothing is sent to a conversation that is being closed
        self._changed()
        await self._close_chat()
        if not await self._join():
            refused, self.window = self.notice, before
            await self._join()
            self._say(refused, alarming=True)

    async def close(self) -> None:
        """Stop what is going on, save, and give the model's memory back."""
        while self._reply and not self._reply.done():
            self.stop()
            await asyncio.wait({self._reply})
        self.phase = "loading"
        await self._unload()
        self._pool.shutdown()

    # --- one reply ---

    async def _ask(self, question: str) -> None:
        before, heard = self._last_held(), False
        try:
            if self._chat is None:
                self.name = self.name or await self._aside(history.new_name, question)
            chat = self._chat or self._open_chat()
            async with aclosing(chat.areply(question)) as pieces:
                async for piece in pieces:
                    heard = True
                    self._hear(piece)
        except MlxStreamError as error:
            self._say(one_line(error), alarming=True)
            if self._chat and not heard and is_broken(self._chat):
                await self._close_chat()
            if not self._chat and len(self.said) == 1:  # it was not begun: nothing to go on with
                self.name = None
        except asyncio.CancelledError:
            self._hear(Piece("", "interrupted"))
            heard = True
        if heard:  # it is the engine's turn: it stops before its next token, and says what is kept
            await soon(lambda: self._last_held() is not before)
        self.phase = "idle"
        self._settle(self._last_held() is not before)
        self._changed()

    def _hear(self, piece: Piece) -> None:
        last = self.said[-1]
        self.said[-1] = replace(last, reply=last.reply + piece.text, finish=piece.finish)
        if piece.text:
            self.phase = "replying"
        self._count()
        self._changed()

    def _settle(self, read: bool) -> None:
        """Take the last exchange as the conversation has it; a question not read is a draft."""
        last, held = self.said[-1], self._last_held()
        if not read:
            self._give_back(last.question)
            del self.said[-1]
        elif held and held.question == last.question:
            self.said[-1] = Message(held.question, held.reply, held.finish)
        else:
            self.said[-1] = replace(last, finish=last.finish or "interrupted")
        self._count()

    def _give_back(self, question: str) -> None:
        self.draft = f"{self.draft} {question}".strip()

    def _last_held(self) -> Exchange | None:
        return next(reversed(self._chat.exchanges), None) if self._chat else None

    def _count(self) -> None:
        """Read the gauge, and what the conversation has to say."""
        if self._chat is None:
            self.attended, self.gauge = 0, Gauge()
            return
        stats, streams = self._chat.stats, self.can_stop
        # The exchange that is going on is attended, and not among those that are done.
        self.attended = min(len(self.said), len(self._chat.exchanges) + streams)
        self.gauge = Gauge(
            stats.attended,
            min(stats.pinned, stats.attended),
            stats.sinks + stats.window,
            stats.evicted,
            stats.cache_bytes,
            stats.tokens_per_second,
        )
        noted = one_line(next(reversed(stats.notices), ""))
        if noted != self._noted and not self.alarming:
            self.notice = noted
        self._noted = noted

    # --- conversations, models and lists ---

    def _open_chat(self) -> Session:
        assert self._engine, "without a model nothing can be asked or opened"
        begins = not self.said[:-1] and self.model == STARTER
        self._noted = ""
        self._chat = self._engine.session(
            system=STARTER_SYSTEM if begins else None,
            window=self.window,
            sampling=self._sampling,
            max_tokens=self._max_tokens,
            name=self.name,
        )
        return self._chat

    async def _join(self) -> bool:
        """Open the conversation on the engine; return whether that went well."""
        self.phase = "loading"
        self._say(f"opening {self.name}")
        try:
            chat = self._open_chat()
            while not opened(chat):
                await asyncio.sleep(SECONDS_BETWEEN)
            self._say("")
        except MlxStreamError as error:
            await self._close_chat()
            self._say(one_line(error), alarming=True)
        self.phase = "idle"
        self._count()
        self._changed()
        return self._chat is not None

    async def _load(self, model: str) -> None:
        """Put another engine in place of the one there is, and go on with the conversation."""
        self.model, self.phase = model, "loading"
        self._say(f"loading {model}")
        await self._unload()
        try:
            engine = self._engine = Engine(model)
            while engine is self._engine and not (engine.ready or engine.error):
                self._say(one_line((engine.notices or [f"loading {model}"])[-1]))
                await asyncio.sleep(SECONDS_BETWEEN)
            if engine.error:
                raise engine.error
        except MlxStreamError as error:
            await self._unload()
            self.phase = "failed"
            return self._say(one_line(error), alarming=True)
        if engine is not self._engine:  # closed meanwhile
            return
        if self.name:
            await self._join()
        else:
            self.phase = "idle"
            self._say("")

    async def _unload(self) -> None:
        await self._close_chat()
        engine, self._engine = self._engine, None
        if engine:
            await self._aside(engine.close, SECONDS_TO_CLOSE)

    async def _leave(self) -> None:
        before, self.phase = self.phase, "loading"
        await self._close_chat()
        self.name, self.said, self.phase = None, [], before
        self._count()
        self._changed()

    async def _close_chat(self) -> None:
        """Save the conversation; whoever opens it next finds it closed."""
        chat, self._chat = self._chat, None
        if chat:
            try:
                await self._aside(chat.close, SECONDS_TO_CLOSE)
            except (MlxStreamError, TimeoutError) as error:
                self._say(one_line(error), alarming=True)

    async def _list(self) -> None:
        """Read what is saved and which models are here."""
        try:
            self.conversations = await self._aside(manage.session_summaries)
            cached = await self._aside(cached_models)
            self.models = sorted({STARTER, *(one.name for one in cached)})
            self._changed()
        except MlxStreamError as error:
            self._say(one_line(error), alarming=True)

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        """Do what may block, on a thread that is not the window toolkit's."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def _say(self, notice: str, alarming: bool = False) -> None:
        self.notice, self.alarming = notice, alarming
        self._changed()


def opened(chat: Session) -> bool:
    """Return whether a session is open by now.

    Raises:
        MlxStreamError: it cannot be opened.
    """
    try:
        chat.wait(0)
    except TimeoutError:
        return False
    return True


def is_broken(chat: Session) -> bool:
    """Return whether a session could not be opened, and never will be."""
    try:
        opened(chat)
    except MlxStreamError:
        return True
    return False


async def soon(done: Callable[[], bool], seconds: float = 2.0) -> None:
    """Wait until something is so, for so long at most."""
    until = asyncio.get_running_loop().time() + seconds
    while not done() and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(SECONDS_BETWEEN)

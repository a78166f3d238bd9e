"""Ask the starter unanswerable questions, and about changed facts, with recall and without.

    python -m tests.measure.recalled_questions unanswerable [--sample 40]
    python -m tests.measure.recalled_questions changed [--facts 24]

The exchanges are in the index, and the stream reads only the latest of them. `unanswerable` asks
200 questions of small talk, arithmetic and translation after exchanges of facts and documentation,
and 200 after logs and code. It prints the share that gets a quotation, and by how many nats per
token the quotation changes the log-likelihood of a fixed continuation (for a sample of the
questions with a quotation; the others are the same by construction). `changed` tells each fact
twice, with a different value the second time, and prints how often the new value is
likelier than the old one.
"""

import argparse
import inspect
import json
import math
import textwrap
from collections.abc import Sequence
from random import Random

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.chat.session import ChatSession
from mlx_stream.generate.model import Model
from mlx_stream.hub.starter import STARTER_SYSTEM
from mlx_stream.sampling import Sampling
from tests.fakes.recalling import IndexedStore
from tests.long.pinned_facts import KINDS
from tests.measure.recalled_facts import conversation, facts, likelihoods, read

WINDOW, RECALL, LATEST = 252, 96, 3
Exchanges = Sequence[tuple[str, str]]
TALK = (
    *(
        "Hi!",
        "How are you today?",
        "Good morning!",
        "Thanks a lot.",
        "You are funny.",
        "Who are you?",
    ),
    *("Tell me a joke.", "What can you do?", "I am bored.", "Good night!", "That is great news."),
)
MOODS = ("", " I slept well.", " It rains.", " I am tired.", " Nice to see you.", " Let us talk.")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Polish")
PHRASES = (
    *("good morning", "thank you very much", "where is the station", "the bill, please"),
    *("see you tomorrow", "the weather is nice", "I am hungry", "a cup of tea", "happy new year"),
    *("the book is on the table", "how much is it", "I do not know"),
)
SERVICES = ("sshd", "cron", "nginx", "postgres", "kernel", "systemd", "docker", "dhclient")
EVENTS = (
    "connection from 10.0.{}.{} closed",
    "failed password for root from 10.0.{}.{}",
    "request {} took {} ms",
    "disk usage at {} percent of {} GB",
    "started job {} for user {}",
    "timeout after {} s on port {}",
)
ABOUT_LOGS = (
    "Which version of {} was installed last?",
    "Who restarted {} and why?",
    "How much memory does {} need at night?",
    "Is the certificate of {} still valid?",
    "Which team owns the {} service?",
    "What does the setting for retries in {} mean?",
    "Where is the documentation of {}?",
    "Why is {} slower on Mondays?",
)
ABOUT_CODE = (
    "What is the complexity of {}?",
    "Who wrote {} and when?",
    "Which test covers {}?",
    "Could {} be written in Rust?",
    "Is {} thread-safe on Windows?",
)
# The first word of each continuation is given; the log-likelihood covers the others.
CONTINUATIONS = {
    "small talk": "I am glad to hear from you, and I am here to help.",
    "arithmetic": "The result of this calculation is a whole number.",
    "translation": "Here is the translation of this phrase for you.",
    "logs and code": "I do not have enough information to answer this question.",
}


def everyday_questions(random: Random) -> list[tuple[str, str]]:
    """Return 200 pairs of kind and question."""
    talk = [one + mood for mood in MOODS for one in TALK][:60]
    sums = [
        f"What is {random.randrange(10, 99)} {random.choice(['plus', 'minus', 'times'])} "
        f"{random.randrange(10, 99)}?"
        for _ in range(70)
    ]
    translations = [f"Translate into {to}: {text}" for to in LANGUAGES for text in PHRASES][:70]
    named = {"small talk": talk, "arithmetic": sums, "translation": translations}
    return [(kind, question) for kind, questions in named.items() for question in questions]


def functions() -> list[tuple[str, str]]:
    """Return the names and beginnings of standard library functions."""
    modules = argparse, inspect, json.decoder, json.encoder, textwrap
    found = {
        name: inspect.getsource(value)[:500]
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    return sorted(found.items())


def logs_and_code(random: Random) -> list[tuple[str, str]]:
    """Return exchanges made from 1,500 log lines and from pieces of code."""
    lines = [
        f"May {1 + at // 60} {at % 24:02}:{at % 60:02} host {random.choice(SERVICES)}[{at}]: "
        + random.choice(EVENTS).format(random.randrange(256), random.randrange(256))
        for at in range(1_500)
    ]
    logs = [("Read this.", "\n".join(lines[at : at + 5])) for at in range(0, len(lines), 5)]
    return [*logs, *((f"Explain {name}.", source) for name, source in functions())]


def technical_questions() -> list[tuple[str, str]]:
    names = [name for name, _ in functions()]
    logs = [text.format(service) for service in SERVICES for text in ABOUT_LOGS]
    code = [text.format(name) for name in names for text in ABOUT_CODE]
    return [("logs and code", question) for question in [*logs, *code][:200]]


class DatedStore(IndexedStore):
    """A store in which each exchange has a date."""

    def __init__(self, exchanges: Exchanges):
        super().__init__()
        for number, exchange in enumerate(exchanges, 1):
            self.leave(number, *exchange)

    def time_of(self, number: int) -> str:
        return f"2026-{1 + number // 28 % 12:02}-{1 + number % 28:02}T17:03:00Z"


def chat_after(model: Model, exchanges: Exchanges, recall: bool) -> ChatSession:
    """Return a chat that has read the latest exchanges; all others have left."""
    store = DatedStore(exchanges[:-LATEST])
    chat = ChatSession(
        model,
        STARTER_SYSTEM,
        WINDOW,
        sampling=Sampling(0, seed=1),
        recall=store,
        recall_tokens=RECALL if recall else 0,
    )
    chat.number = len(exchanges) - LATEST
    for exchange in exchanges[-LATEST:]:
        read(chat, *exchange)
    return chat


def unanswerable(model: Model, exchanges: Exchanges, asked: Exchanges, sample: int) -> dict:
    """Return the share of each kind of question that gets a quotation, and its effect in nats."""
    chats = [chat_after(model, exchanges, recall) for recall in (True, False)]
    store, end = chats[0].recall, len(exchanges) - LATEST + 1
    assert store
    quoted = [one for one in asked if store.find(one[1], "", 1, end)]
    kinds = {kind: sum(one[0] == kind for one in asked) for kind, _ in asked}
    shares = {kind: sum(one[0] == kind for one in quoted) / n for kind, n in kinds.items()}
    changes = []
    for kind, question in Random(2).sample(quoted, min(sample, len(quoted))):
        begun, _, rest = CONTINUATIONS[kind].partition(" ")
        count = len(model.tokenizer.encode(f" {rest}", special=False))
        (with_it,), (without,) = (likelihoods(c, question, begun, [rest])[0] for c in chats)
        changes.append((with_it - without) / count)
    mean = math.fsum(changes) / len(changes) if changes else 0.0
    share = len(quoted) / len(asked)
    return {
        "n": len(asked),
        "exchanges": len(exchanges),
        "share": share,
        "shares": shares,
        "sampled": len(changes),
        "nats_per_token_if_quoted": round(mean, 4),
        "nats_per_token_over_all": round(mean * share, 4),
    }


def changed(model: Model, count: int) -> dict:
    """Return how often the new value of a fact is likelier, quoted and in the window."""
    asked = facts()[:count]
    others = [*conversation([], 60)]
    ways: dict[str, list[bool]] = {"quoted": [], "in the window": []}
    ordered = 0
    for person, kind, right in asked:
        words = KINDS[kind].split()
        old, new = words[right], words[(right + 3) % 10]
        told = [
            (f"{person}'s {kind} is {old}.", f"Thank you for telling me about {person}."),
            (f"{person}'s {kind} is now {new}.", f"Thank you for telling me about {person}."),
        ]
        question, begun = f"What is {person}'s {kind}?", f"{person}'s {kind} is"
        quoted = chat_after(model, [told[0], *others[:30], told[1], *others[30:]], True)
        window = chat_after(model, [*others, *told], False)
        for way, chat in (("quoted", quoted), ("in the window", window)):
            values, recalled = likelihoods(chat, question, begun, [old, new])
            ways[way].append(values[1] > values[0])
            ordered += way == "quoted" and recalled == [1, 32]
    shares = {way: sum(found) / len(found) for way, found in ways.items()}
    return {"n": len(asked), "both_quoted_in_order": ordered, "new_is_likelier": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["unanswerable", "changed"])
    parser.add_argument("--sample", type=int, default=40, help="questions whose likelihood is read")
    parser.add_argument("--facts", type=int, default=24)
    options = parser.parse_args()
    model, random = mlx_stream.load("starter", dtype="float32", keep_quantized=False), Random(1)
    if options.what == "changed":
        print(json.dumps(changed(model, options.facts)), flush=True)
        return
    told = [*conversation(facts(), 500)]
    for exchanges, asked in (
        (told, everyday_questions(random)),
        (logs_and_code(random), technical_questions()),
    ):
        print(json.dumps(unanswerable(model, exchanges, asked, options.sample)), flush=True)


if __name__ == "__main__":
    main()

"""Tell the starter facts in its system prompt, chat for a long time, and check that it keeps them.

    python -m tests.long.pinned_facts [--tokens 5000] [--window 512]

Asks for each of 24 facts before and after the chat, with the system prompt pinned and not pinned.
Each has ten candidate answers, one of which is in the system prompt. The chat consists of CPython's
documentation, which is read rather than sampled. Prints one line of JSON; exits with 1 unless
pinning clearly helped the model keep the facts. Takes minutes: not collected by pytest.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.session import ChatSession
from mlx_stream.evaluate.streameval import likeliest, log_probability
from mlx_stream.generate import requests
from mlx_stream.generate.model import Model

# What the facts are about, and the answers each may have; `facts` decides which one is right.
KINDS = {
    "dog": "Rufus Max Buddy Charlie Bella Daisy Rocky Toby Ruby Oscar",
    "home town": "London Paris Berlin Madrid Rome Vienna Boston Chicago Dublin Toronto",
    "favourite colour": "red blue green yellow orange purple pink black white brown",
    "job": "baker doctor farmer teacher lawyer nurse pilot painter sailor writer",
    "instrument": "piano guitar violin flute drums cello trumpet harp saxophone clarinet",
    "favourite sport": "tennis football golf hockey swimming rugby boxing cycling baseball skiing",
    "favourite drink": "tea coffee milk water beer wine juice lemonade cider cocoa",
    "favourite fruit": "apples pears grapes cherries bananas oranges lemons plums peaches melons",
    "birthday month": "January February March April May June July August September November",
    "second language": "French German Spanish Italian Russian Chinese Japanese Arabic Greek Dutch",
    "sister": "Alice Emma Helen Julia Laura Maria Nora Ruth Sarah Susan",
    "brother": "David Frank George Henry James John Mark Paul Peter Thomas",
    "favourite flower": "roses tulips lilies daisies violets orchids poppies irises pansies asters",
    "car": "Ford Toyota Honda BMW Audi Volvo Fiat Nissan Tesla Mazda",
    "favourite animal": "dogs cats horses elephants lions tigers bears wolves rabbits owls",
    "favourite subject": "history music physics chemistry biology geography art Latin logic law",
    "hobby": "painting reading cooking gardening fishing dancing singing hiking knitting chess",
    "favourite dish": "pizza pasta soup rice bread salad curry cheese fish steak",
    "favourite tree": "oak pine birch maple willow elm cedar beech ash palm",
    "ring": "gold silver copper iron bronze steel brass platinum glass wood",
    "birth year": "1951 1954 1958 1963 1967 1972 1976 1981 1985 1990",
    "house number": "12 17 23 28 34 39 45 56 67 81",
    "favourite dance": "waltz tango salsa polka ballet swing jazz rumba samba flamenco",
    "favourite country": "France Spain Italy Greece Japan India China Egypt Brazil Canada",
}
WHO = "You are Anna's assistant."
REPLY_TOKENS = 32  # room for the beginning of an answer, and for a candidate
# By how much a pinned fact's right answer must be likelier than an unpinned one's after the chat.
LEAST_GAIN = 1.0  # in nats, on average


@dataclass(frozen=True)
class Fact:
    about: str
    candidates: tuple[str, ...]
    right: int

    @property
    def told(self) -> str:
        return f"{self.begun} {self.candidates[self.right]}."

    @property
    def question(self) -> str:
        return f"What is Anna's {self.about}?"

    @property
    def begun(self) -> str:
        """Return the beginning of the answer, up to the fact itself."""
        return f"Anna's {self.about} is"


def facts() -> list[Fact]:
    """Return all facts; the right answers occur at every position in the lists."""
    kinds = enumerate(KINDS.items())
    return [Fact(about, tuple(words.split()), i * 3 % 10) for i, (about, words) in kinds]


def exchanges() -> Iterator[tuple[str, str]]:
    """Yield questions and replies of ordinary length: paragraphs of CPython's documentation."""
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            if 200 <= len(paragraph) <= 600 and not paragraph.startswith(" "):
                yield f"Tell me more about {topic}.", " ".join(paragraph.split())


def read(chat: ChatSession, question: str, reply: str = "") -> None:
    """Let a session read an exchange as if it had taken place."""
    said = chat.model.tokenizer.encode(reply, special=False)
    exchange = Exchange(question, reply, (), (), tuple(said))
    requests.run_coroutine(chat.replay_steps({chat.number + 1: exchange}))
    chat.evictor.make_room(REPLY_TOKENS, keep=1)


def ask(chat: ChatSession, fact: Fact) -> list[float]:
    """Return the log-probability of each candidate as the answer, then undo the question."""
    read(chat, fact.question)
    tokens, tokenizer = chat.tokens, chat.model.tokenizer
    begun = tokens.length
    logits = tokens.read(tokenizer.encode(fact.begun, special=False)).astype(mx.float32)
    log_p = logits - mx.logsumexp(logits)
    words = (tokenizer.encode(f" {word}", special=False) for word in fact.candidates)
    found = [log_probability(tokens, log_p, ids) for ids in words]
    tokens.rewind(tokens.length - begun)
    chat.undo()
    return found


def answers(chat: ChatSession, asked: Sequence[Fact]) -> dict[str, list[float] | float]:
    """Return how likely each fact's right answer is, and how often it is the likeliest."""
    found = [ask(chat, fact) for fact in asked]
    right = [values[fact.right] for fact, values in zip(asked, found, strict=True)]
    likeliest_right = sum(
        likeliest(values) == fact.right for fact, values in zip(asked, found, strict=True)
    )
    return {
        "accuracy": likeliest_right / len(asked),
        "log_likelihood": math.fsum(right) / len(right),
        "each": right,
    }


def run(model: Model, asked: Sequence[Fact], tokens: int, window: int, pin: bool) -> dict:
    """Ask before and after a chat of at least `tokens` tokens."""
    system = " ".join([WHO, *(fact.told for fact in asked)])
    chat = ChatSession(model, system, window=window, max_tokens=REPLY_TOKENS, pin=pin)
    # This way no question is the first one, which would read the system prompt again.
    read(chat, "Hello!", "Hello! How can I help you today?")
    before, begun, talk = answers(chat, asked), chat.tokens.length, exchanges()
    while chat.tokens.length - begun < tokens:
        read(chat, *next(talk))
    chatted = chat.tokens.length - begun
    after = answers(chat, asked)
    return {
        "pinned": chat.stats.pinned,
        "chatted": chatted,
        "evicted_exchanges": chat.stats.evicted_exchanges,
        "before": before,
        "after": after,
    }


def compare(model: Model, asked: Sequence[Fact], tokens: int, window: int) -> dict:
    """Run both conditions; `likelier` counts what pinning made likelier after the chat."""
    pinned, unpinned = (run(model, asked, tokens, window, pin) for pin in (True, False))
    pairs = zip(pinned["after"].pop("each"), unpinned["after"].pop("each"), strict=True)
    gains = [with_pin - without for with_pin, without in pairs]
    del pinned["before"]["each"], unpinned["before"]["each"]
    return {
        "facts": len(asked),
        "window": window,
        "pinned": pinned,
        "unpinned": unpinned,
        "gain": math.fsum(gains) / len(gains),
        "likelier": sum(gain > 0 for gain in gains),
        "holds": (
            math.fsum(gains) / len(gains) > LEAST_GAIN
            and pinned["after"]["accuracy"] > 2 * unpinned["after"]["accuracy"]
            and unpinned["pinned"] == 0
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5_000)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    model = mlx_stream.load("starter", dtype="float32", keep_quantized=False)
    found = compare(model, facts(), options.tokens, options.window)
    print(json.dumps(found))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

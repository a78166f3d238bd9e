"""Tell the starter facts, read many exchanges about others, and ask for the facts, with recall.

    python -m tests.measure.recalled_facts --log LOG [--facts 48] [--exchanges 500] [--window 252]

Facts about Anna and Peter are told in conversation. Then exchanges follow, a third of which tell
the same kinds of facts about other people; the stream reads all of them. Each fact is then asked
for in a copy of the chat, with ten candidates (chance: 10%), in the fact's own words and in other
words: without recall, with it, and with the fact as the latest exchange. Every answer is a line in
the log; a run that is repeated with the same log asks only what is missing. Prints one line of
JSON. Takes an hour.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.session import ChatSession
from mlx_stream.evaluate.streameval import likeliest, log_probability
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, Want, run_coroutine
from mlx_stream.hub.starter import STARTER_SYSTEM
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said
from tests.fakes.recalling import IndexedStore
from tests.long.pinned_facts import KINDS, exchanges

ASKED_FOR = "Anna", "Peter"
OTHERS = "Ben", "Clara", "Dora", "Erik", "Fiona", "Gus", "Hanna", "Ivan", "Jana", "Karl"
# The questions in other words; {} is the person.
IN_OTHER_WORDS = {
    "dog": "Which animal does {} take for walks?",
    "home town": "Where did {} grow up?",
    "favourite colour": "Which paint would {} choose for a wall?",
    "job": "How does {} earn a living?",
    "instrument": "What does {} play in the orchestra?",
    "favourite sport": "What does {} like to watch in a stadium?",
    "favourite drink": "What should I pour for {}?",
    "favourite fruit": "Which fruit does {} like best?",
    "birthday month": "When was {} born?",
    "second language": "What else does {} speak besides English?",
    "sister": "Who are {}'s siblings?",
    "brother": "Which boy has the same parents as {}?",
    "favourite flower": "What bouquet would please {}?",
    "car": "What does {} drive?",
    "favourite animal": "Which creatures does {} love?",
    "favourite subject": "What did {} like to study at school?",
    "hobby": "How does {} spend free time?",
    "favourite dish": "What should I cook for {}?",
    "favourite tree": "What should I plant for {}?",
    "ring": "What is the jewel on {}'s finger made of?",
    "birth year": "In which year was {} born?",
    "house number": "At which number does {} live?",
    "favourite dance": "What does {} dance best?",
    "favourite country": "Where would {} like to travel?",
}
WAYS = ("without recall", "recalled", "in the window")


def facts() -> list[tuple[str, str, int]]:
    """Return people, kinds and the right candidate's index; each index is right equally often."""
    pairs = ((person, kind) for kind in KINDS for person in ASKED_FOR)
    return [(person, kind, at * 7 % 10) for at, (person, kind) in enumerate(pairs)]


def told(person: str, kind: str, right: int) -> tuple[str, str]:
    fact = f"{person}'s {kind} is {KINDS[kind].split()[right]}."
    return fact, f"Thank you for telling me about {person}."


def conversation(asked: Sequence[tuple[str, str, int]], count: int) -> Iterator[tuple[str, str]]:
    """Yield the facts, each followed by an unrelated exchange, and then `count` exchanges."""
    random, other = Random(1), exchanges()
    for fact in asked:
        yield told(*fact)
        yield next(other)
    for at in range(count):
        confusable = random.choice(OTHERS), random.choice([*KINDS]), random.randrange(10)
        yield told(*confusable) if at % 3 == 0 else next(other)


def read(chat: ChatSession, question: str, reply: str) -> None:
    """Read an exchange as if it had been asked and answered."""
    encode = chat.model.tokenizer.encode
    ids = tuple(encode(chat.template.lead + reply, special=False, behind_text=True))
    exchange = Exchange(question, reply, (), (), ids)
    run_coroutine(chat.replay_steps({chat.number + 1: exchange}))


def likelihoods(
    chat: ChatSession, question: str, begun: str, words: Sequence[str]
) -> tuple[list[float], list[int]]:
    """Return the log-probability of each word after the beginning of an answer; undo the turn.

    Also return the numbers of the exchanges that were quoted.
    """
    steps, tokens, encode = chat.reply_steps(question, 32), chat.tokens, chat.model.tokenizer.encode
    result = None
    while True:
        request = steps.send(result)
        assert isinstance(request, ReadRequest)
        result = request.stream.run(request)
        if request.want is Want.LOGITS and result.logits is not None:
            break
    length = tokens.length
    logits = tokens.read(encode(begun, special=False)).astype(mx.float32)
    log_p = logits - mx.logsumexp(logits)
    found = [log_probability(tokens, log_p, encode(f" {word}", special=False)) for word in words]
    tokens.rewind(tokens.length - length)
    steps.close()
    recalled = [passage.number for passage in chat.recalled]
    chat.undo()
    return found, recalled


def answer(chat: ChatSession, way: str, fact: tuple[str, str, int], free: bool) -> dict:
    """Ask for a fact in both wordings, and freely, in a copy of a chat."""
    person, kind, right = fact
    chat, store = chat.fork(), chat.recall
    if store:
        chat.start_recall(lambda notify: store)
    words, result = KINDS[kind].split(), dict[str, dict]()
    if way == "in the window":
        read(chat, *told(*fact))
    wordings = f"What is {person}'s {kind}?", IN_OTHER_WORDS[kind].format(person)
    for name, question in zip(("same words", "other words"), wordings, strict=True):
        values, recalled = likelihoods(chat, question, f"{person}'s {kind} is", words)
        result[name] = {"right": likeliest(values) == right, "log_likelihood": values[right]}
        result[name]["recalled"] = recalled
        if free and name == "same words":
            text = said(chat.reply(question, 24))
            result["free"] = {"right": words[right].lower() in text.lower(), "text": text}
            chat.undo()
    return result


def summary(rows: Sequence[dict], way: str) -> dict:
    """Return the shares and means for one way of asking."""
    chosen = [row["answers"] for row in rows if row["way"] == way]
    found: dict = {"n": len(chosen)}
    for name in ("same words", "other words", "free"):
        asked = [answers[name] for answers in chosen if name in answers]
        if asked:
            found[name] = {"right": sum(one["right"] for one in asked) / len(asked)}
            values = [one["log_likelihood"] for one in asked if "log_likelihood" in one]
            found[name] |= {"mean": math.fsum(values) / len(values)} if values else {}
    return found


def run(model: Model, options: argparse.Namespace) -> list[dict]:
    asked = facts()[: options.facts]
    rows = [json.loads(line) for line in options.log.read_text().splitlines()]
    done = {(row["way"], row["fact"]) for row in rows}
    for recall in (options.recall, 0):
        ways = [way for way in WAYS if (way == "recalled") == bool(recall)]
        if all((way, at) in done for way in ways for at in range(len(asked))):
            continue
        chat = ChatSession(
            model,
            STARTER_SYSTEM,
            options.window,
            sampling=Sampling(0, seed=1),
            recall=IndexedStore(),
            recall_tokens=recall,
        )
        for number, exchange in enumerate(conversation(asked, options.exchanges), 1):
            read(chat, *exchange)
            if number % 50 == 0:
                print(f"{number} exchanges read, recall {recall}", file=sys.stderr, flush=True)
        for at, way in ((at, way) for at in range(len(asked)) for way in ways):
            if (way, at) not in done:
                answers = answer(chat, way, asked[at], not options.quick)
                rows.append({"way": way, "fact": at, "answers": answers})
                with options.log.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=48)
    parser.add_argument("--exchanges", type=int, default=500)
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--recall", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="no free answers")
    options = parser.parse_args()
    options.log.touch()
    model = mlx_stream.load("starter", dtype="float32", keep_quantized=False)
    rows = run(model, options)
    found = {way: summary(rows, way) for way in WAYS}
    print(json.dumps({"exchanges": options.exchanges, "window": options.window, **found}))


if __name__ == "__main__":
    main()

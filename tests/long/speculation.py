"""Measures what guessing gains, and checks that the text stays the same; run it on a quiet machine.

python -m tests.long.speculation                      four tasks, plain and guessing in turn
python -m tests.long.speculation --equal 5000         greedy ids across the wrap, side by side
"""

import argparse
import statistics
import time

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import numpy as np

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.generate.model import Model
from mlx_stream.generate.speculative import Writer, writer_factory
from mlx_stream.generate.stats import Stats
from mlx_stream.load import load
from mlx_stream.sampling import Sampler, Sampling, as_int
from tests.fakes.replies import write_ids

LETTER = """Dear Mr. Holloway, I am writing to let you know that the delivery of the oak table, \
which was planned for Tuesday the fourth of May, will be late. Our driver, Peter Marsh, broke his \
arm while unloading a piano in Bristol, and the van is still waiting at the depot with two \
flat tyres. We hope to bring the table to your house on Friday the seventh, between nine and \
eleven in the morning. Please keep the side gate open, because the table is too wide for the \
front door. If that day does not suit you, call Mrs. Greene at the office before noon on \
Thursday and she will find another time. We are sorry for the trouble and will not charge \
you for the delivery. With kind regards, Thomas Reed, Reed and Sons."""
CODE = '''import csv
from pathlib import Path


def read_orders(path):
    """Read the orders of a shop from a CSV file."""
    orders = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            price, count = float(row["price"]), int(row["count"])
            orders.append({"name": row["name"], "price": price, "count": count})
    return orders


def total_price(orders):
    """Return what all orders cost together."""
    return sum(order["price"] * order["count"] for order in orders)


def cheapest(orders):
    """Return the order with the lowest price, or None."""
    return min(orders, key=lambda order: order["price"], default=None)


def write_report(orders, path):
    """Write one line for each order, and the total."""
    lines = [f"{order['name']}: {order['count']} x {order['price']:.2f}" for order in orders]
    lines.append(f"total: {total_price(orders):.2f}")
    Path(path).write_text("\\n".join(lines))
'''
TASKS = {
    "edit": "Copy the following letter word for word, but write Wednesday instead of Tuesday."
    f"\n\n{LETTER}",
    "quote": f"Here is a letter:\n\n{LETTER}\n\nWrite a report. First quote the whole letter word "
    'for word, beginning with "Dear Mr. Holloway". Then summarize it in two sentences.',
    "code": "Rename the function `cheapest` to `lowest` in this file and write out the whole file, "
    f"otherwise unchanged.\n\n```python\n{CODE}```",
    "prose": "Write a long story about a lighthouse keeper who finds a door at the bottom of the "
    "sea.",
}


def distinct(ids: list[int], size: int = 4) -> float:
    """Return the share of n-grams that have not occurred before."""
    grams = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
    return len(set(grams)) / max(1, len(grams))


def timed(writer: Writer, model: Model, prompt: list[int], sampling: Sampling, most: int):
    """Return the ids of a reply, its tokens per second after the first, and its statistics."""
    ids, began, stats = [], 0.0, Stats()
    ends = model.tokenizer.eos_ids
    for id in write_ids(writer, prompt, Sampler(sampling), most, ends, stats):
        began = began or time.perf_counter()
        ids.append(id)
    return ids, (len(ids) - 1) / (time.perf_counter() - began), stats


def tasks(model: Model, options: argparse.Namespace) -> None:
    ways = {
        name: writer_factory(model, name == "guessing", None, None)
        for name in ("plain", "guessing")
    }
    assert model.tokenizer.template
    turns = PromptBuilder(
        model.tokenizer, model.tokenizer.template, "You are a helpful assistant.", True
    )
    print(f"{options.model}, {model.dtype}, window {options.window:,}, temperature {options.temp}")
    for name, question in TASKS.items():
        if options.task and name not in options.task:
            continue
        prompt = [*turns.pinned, *turns.question(question, None, first=True)[1]]
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        shown, share, same = [], 0.0, []
        for run in range(options.runs):
            texts = []
            # They run in turn, and each is first as often as the other.
            for way in sorted(ways, reverse=run % 2 == 1):
                writer = ways[way](None, options.window, print)
                sampling = Sampling(options.temp, seed=options.seed + run)
                ids, speed, stats = timed(writer, model, prompt, sampling, options.max_tokens)
                speeds[way].append(speed)
                texts.append(ids)
                if way == "guessing":
                    share = stats.accepted_tokens / max(1, stats.drafted_tokens)
                    shown = ids
            both = zip(*texts, strict=False)
            agreed = next((i for i, (a, b) in enumerate(both) if a != b), len(texts[0]))
            same.append(f"{agreed} of {len(texts[0])}")
        ratios = [b / a for a, b in zip(speeds["plain"], speeds["guessing"], strict=True)]
        print(f"\n== {name}: {statistics.median(ratios):.2f} x", end="")
        print(f" ({min(ratios):.2f} to {max(ratios):.2f}, {options.runs} runs)", end="")
        for way, found in speeds.items():
            print(f"; {way} {statistics.median(found):.1f} tok/s", end=" ")
            print(f"({min(found):.1f} to {max(found):.1f})", end="")
        print(f"; {share:.0%} of guesses right; {distinct(shown):.0%} of 4-grams distinct")
        print(f"the same ids: {', '.join(same)}\n\n{model.tokenizer.decode(shown)}")


def equal(model: Model, options: argparse.Namespace) -> None:
    """Compare greedy ids with plain decoding; after a near tie, both follow the plain one."""
    plain = writer_factory(model, False, None, None)(None, options.window, print).tokens
    writer = writer_factory(model, True, None, None)(None, options.window, print)
    guessing, stats = writer.tokens, Stats()
    prompt = model.tokenizer.encode(TASKS["edit"])
    sampler, ties = Sampler(Sampling(0)), 0
    logits = plain.read(prompt)
    theirs = write_ids(writer, prompt, sampler, options.equal, stats=stats)
    for left in range(options.equal, 0, -1):
        mine, guess = as_int(mx.argmax(logits)), next(theirs)
        if guess != mine:
            theirs.close()
            guessing.rewind(guessing.lookahead)
            assert guessing.length == plain.length
            top = np.sort(np.array(logits))[-2:]
            said = f"token {plain.length:,}: {guess}, not {mine}; the best two logits are {top}"
            assert top[1] - top[0] < 1e-3, said
            print(said, flush=True)
            ties += 1
            theirs = write_ids(writer, [mine], sampler, left, stats=stats)
        logits = plain.read([mine])
        if left % 500 == 0:
            print(f"{left:,} to go, {plain.cache.evicted:,} evicted", flush=True)
    print(
        f"{options.equal:,} greedy tokens in a window of {options.window:,} equal, but for {ties} "
        f"near ties; {stats.accepted_tokens:,} of {stats.drafted_tokens:,} guesses right"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="starter")
    parser.add_argument("--equal", type=int, metavar="TOKENS")
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--window", type=int)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = load(options.model, dtype="float32", keep_quantized=False)
    if options.equal:
        options.window = options.window or 508
        equal(model, options)
    else:
        options.window = options.window or 1_020
        tasks(model, options)


if __name__ == "__main__":
    main()

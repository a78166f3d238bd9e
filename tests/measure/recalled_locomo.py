"""Find the evidence for LoCoMo's questions by their words, and say which questions pass the gate.

    python -m tests.measure.recalled_locomo locomo10.json [--conversations 5]

The file is `data/locomo10.json` of the repository `snap-research/locomo` (CC BY-NC, so it is not
here). An exchange is two turns of a session. Prints one line of JSON: how often an exchange with
evidence is among the first five that a question finds; of the exchanges with evidence among them,
how many pass the gate; and how many questions without an answer do: about another conversation,
and made from this one's words to mislead.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_stream.recall.find import MOST_HITS, find_hits
from mlx_stream.recall.index import WordIndex

MISLEADING = 5  # the category of questions made to mislead


def exchanges(conversation: dict[str, Any]) -> list[tuple[str, set[str]]]:
    """Return the texts of a conversation's exchanges, and the ids of the turns in each."""
    found = []
    for session in range(1, 100):
        turns = conversation.get(f"session_{session}", [])
        for pair in (turns[at : at + 2] for at in range(0, len(turns), 2)):
            text = "\n".join(map(text_of, pair))
            found.append((text, {turn["dia_id"] for turn in pair}))
    return found


def text_of(turn: dict[str, Any]) -> str:
    """Return a turn with its speaker, and the caption of its picture if it has one."""
    caption = f" [{turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return f"{turn['speaker']}: {turn['text']}{caption}"


def indexed(texts: Sequence[str]) -> WordIndex:
    index = WordIndex.in_memory()
    index.add(enumerate(texts, 1), len(texts), "")
    return index


def found(index: WordIndex, question: str, gate: bool) -> set[int]:
    return {hit.number for hit in find_hits(index, question, "", 1, index.last + 1, gate)}


def measure(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the counts and shares over all questions of some conversations."""
    told = [exchanges(sample["conversation"]) for sample in samples]
    indexes = [indexed([text for text, _ in each]) for each in told]
    answerable = with_evidence = right = right_passing = elsewhere = 0
    misleading = misleading_passing = asked = 0
    for at, sample in enumerate(samples):
        index, other = indexes[at], indexes[at - 1]
        for one in sample["qa"]:
            asked += 1
            elsewhere += bool(found(other, one["question"], gate=True))
            passing = found(index, one["question"], gate=True)
            if one["category"] == MISLEADING:
                misleading += 1
                misleading_passing += bool(passing)
            elif evidence := {*one["evidence"]}:
                numbers = {n for n, (_, ids) in enumerate(told[at], 1) if ids & evidence}
                hits = found(index, one["question"], gate=False) & numbers
                answerable += 1
                with_evidence += bool(hits)
                right += len(hits)
                right_passing += len(hits & passing)
    return {
        "questions": answerable,
        f"evidence_in_first_{MOST_HITS}": with_evidence / answerable,
        "right_hits": right,
        "right_hits_passing": right_passing / right,
        "about_another_conversation": asked,
        "of_another_passing": elsewhere / asked,
        "misleading": misleading,
        "misleading_passing": misleading_passing / misleading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--conversations", type=int, default=5, help="how many, from the first")
    options = parser.parse_args()
    samples = json.loads(options.file.read_text(encoding="utf-8"))
    print(json.dumps(measure(samples[: options.conversations])))


if __name__ == "__main__":
    main()

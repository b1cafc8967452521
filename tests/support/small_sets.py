"""Small copies of the named data sets with the hub's field names, both answers being right equally often."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["iron", "zinc", "gold", "lead", "tin"]


def choices(i: int) -> dict:
    texts = [f"{WORDS[(i + k) % 5]} and {WORDS[(i + 2 * k + 1) % 5]}" for k in range(3)]
    return {"choices": {"text": texts, "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]}


RECORDS = {
    "alpaca": lambda i: {
        "instruction": f"Say {i} twice.", "input": "loudly" if i % 2 else "", "output": f"It is {i}, yes, {i}."
    },
    "boolq": lambda i: {
        "question": f"is {i} more than {97 - i % 50}", "passage": f"Number {i // 2} -- About {i}.", "label": i // 3 % 2
    },
    "rte": lambda i: {"sentence1": f"{i} is here.", "sentence2": f"{i} exists.", "label": i // 3 % 2},
    "arc_easy": lambda i: {"question": f"What is {i}?", **choices(i)},
    "arc_challenge": lambda i: {"question": f"Why is {i}?", **choices(i + 1)},
    "openbookqa": lambda i: {"question_stem": f"Thing {i} is", **choices(i + 2)},
    "hellaswag": lambda i: {
        "activity_label": "Act", "ctx_a": f"He did {i}.", "ctx_b": "then", "ctx": f"He did {i}. then",
        "endings": [f"{WORDS[i % 5]} runs.", "it sat.", f"ran {i}.", "end."], "label": str(i % 4), "source_id": f"s{i}",
    },
    "winogrande": lambda i: {
        "sentence": f"Number {i} fits as _ is {WORDS[i % 5]}.", "option1": WORDS[i % 4], "option2": WORDS[i % 4 + 1],
        "answer": str(1 + i // 3 % 2),
    },
    "c4": lambda i: {"text": f"Document {i} is about {WORDS[i % 5]} and {i * i} other things, as everybody knows."},
    "wikitext": lambda i: {
        "text": f" = Title {i} = \n" if i % 3 == 0 else f" Line {i} on {WORDS[i % 5]} and {WORDS[i // 5 % 5]} . \n"
    },
}  # fmt: skip


def write_sets(root: Path, n: int = 120) -> Path:
    """Write every set's splits, ``n`` records each."""
    for name, record in RECORDS.items():
        splits = ("train",) if name in ("alpaca", "c4") else ("train", "validation", "test")
        for offset, split in enumerate(splits):
            (root / name).mkdir(parents=True, exist_ok=True)
            rows = (json.dumps(record(i + 1000 * offset)) for i in range(n if len(splits) > 1 else 3 * n))
            (root / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


ARC = [
    {"id": str(i), "question": f"What is {i}?", "choices": {"text": ["one", "two", "nil"], "label": ["A", "B", "C"]},
     "answerKey": "ABC"[i % 3]} for i in range(5)
]  # fmt: skip

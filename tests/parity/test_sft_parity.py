"""Ids and labels of conversations: what OLMo's tokenizer and the rule of its preparation give."""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from olmo.corpus.documents import documents
from olmo.corpus.instructions import InstructionsSection, instances
from olmo.corpus.tokenizer import trained_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("OLMO_PEER_PYTHON"),
        reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md",
    ),
]

WORDS = [
    "naïve",
    "café",
    "\n",
    "  ",
    "\t",
    "the",
    "end",
    ".",
    "日本語",
    "🙂",
    "e\u0301",
    "<|user|>",
    "x=1",
]
SPECIAL = "<|endoftext|>"


def said(r: random.Random) -> str:
    if r.random() < 0.1:
        return r.choice(["", " ", "\n\n", SPECIAL])
    words = [
        r.choice([*WORDS, SPECIAL] if r.random() < 0.05 else WORDS) for _ in range(r.randint(1, 40))
    ]
    return r.choice(["", " "]).join(words)


def conversation(r: random.Random) -> list[dict]:
    roles = ["system"] * (r.random() < 0.3) + ["user", "assistant"] * r.randint(0, 4)
    roles += ["user"] * (r.random() < 0.3 or not roles)
    return [{"role": role, "content": said(r)} for role in roles]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    r = random.Random(0)
    lines = [json.dumps({"id": str(i), "text": "a text: " + said(r)}) for i in range(400)]
    with gzip.open(folder / "documents.gz", "wt") as file:
        file.write("\n".join(lines))
    trained_tokenizer.build(
        documents=[folder / "documents.gz"], tokenizer=folder / "tokenizer.json", vocab_size=400
    )
    return folder / "tokenizer.json"


def test_ids_and_labels_are_olmo_s(theirs, tokenizer: Path, tmp_path: Path):
    count = int(os.environ.get("OLMO_PARITY_CASES", 8))
    cases = []
    for seed in range(count):
        r = random.Random(seed)
        conversations = [conversation(r) for _ in range(60)]
        cases.append(
            {
                "conversations": conversations,
                "tokenizer": str(tokenizer),
                "length": r.choice([2, 9, 32, 64, 500]),
                "eos": 0,
                "pad": r.choice([0, 1]),
            }
        )
    expected = theirs("peer_sft.py", cases)
    for number, case in enumerate(cases):
        source = tmp_path / "source.gz"
        with gzip.open(source, "wt") as file:
            file.writelines(json.dumps({"messages": m}) + "\n" for m in case["conversations"])
        names = {name: tmp_path / name for name in ("documents", "heldout", "table")}
        documents.build(source=source, name="x", kind="messages", **names)
        out = {name: tmp_path / name for name in ("tokens", "labels", "index")}
        given = {name: names[name] for name in ("documents", "table")}
        facts = instances.build(
            **given, **out, tokenizer=tokenizer,
            config=InstructionsSection(sequence_length=case["length"]),
            eos_token_id=case["eos"], pad_token_id=case["pad"],
        )  # fmt: skip
        ids = np.fromfile(out["tokens"], np.uint16).reshape(-1, case["length"])
        labels = np.fromfile(out["labels"], np.bool_).reshape(-1, case["length"])
        assert np.array_equal(ids, expected[f"{number}/ids"]), number
        assert np.array_equal(labels, expected[f"{number}/labels"]), number
        assert facts["examples"] == len(ids)
        assert facts["examples"] + facts["drops"].get("no-label", 0) == 60

"""Multiple-choice tasks: what is asked, in which tokens, and what comes of it, as OLMo has it."""

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peer_tasks import IDS, MEASURED, metrics_of, tiny_logits

import olmo.eval.tasks
from olmo.distributed.world import World
from olmo.eval.choices import (
    MAX_PROMPT_LENGTH,
    Prompt,
    compute_log_likelihoods,
    compute_score,
    encode_prompts,
)
from olmo.eval.rows import read_requests, read_rows
from olmo.eval.tasks import build_requests, load_tasks

PEER = os.environ.get("OLMO_PEER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEER, reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md"),
]
HERE = Path(__file__).parent
OURS = {"stdlib_docstrings"}  # no task of the peer's
DOCUMENTS = int(os.environ.get("OLMO_PARITY_DOCUMENTS", 10))
ALONE = World(0, 0, 1, torch.device("cpu"), "")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    assert PEER is not None
    subprocess.run(
        [PEER, "-W", "ignore", HERE / "peer_tasks.py", str(DOCUMENTS), folder / "results.json"],
        check=True,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(theirs: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    name = "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
    return Tokenizer.from_file(str(Path(theirs["data"]) / name))


@pytest.fixture(autouse=True)
def first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(label: str, dataset: str, *rest: Any) -> Iterator[dict[str, Any]]:
        most = 5 if rest[2] == "dev" else 1 if "mmlu" in dataset else DOCUMENTS
        return islice(read_rows(label, dataset, *rest), most)

    monkeypatch.setattr(olmo.eval.tasks, "read_rows", rows)
    monkeypatch.setattr(
        olmo.eval.tasks, "read_requests", lambda *of: read_requests(*of)[: 4 * DOCUMENTS]
    )


class Tiny(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=tiny_logits(input_ids))


@pytest.mark.parametrize("label", sorted(load_tasks().keys() - OURS))
def test_the_same_questions_and_answers(label: str, theirs: dict[str, Any], tokenizer: Any) -> None:
    expected, task = theirs["tasks"][label], load_tasks()[label]
    asked = build_requests(task, Path(theirs["data"]))
    given = encode_prompts(
        [(r.context, r.continuation) for r in asked], tokenizer, MAX_PROMPT_LENGTH
    )
    alone = encode_prompts(
        [(r.unconditional, r.continuation) for r in asked], tokenizer, MAX_PROMPT_LENGTH
    )
    ours = [
        [
            r.document,
            r.option,
            r.target,
            prompt.ids[:-1].tolist(),
            prompt.ids[len(prompt.ids) - prompt.scored :].tolist(),
            other.ids[:-1].tolist(),
            len(r.continuation) - 1,
            len(r.continuation[1:].encode()),
        ]
        for r, prompt, other in zip(asked, given, alone, strict=True)
    ]
    assert ours == expected["samples"]
    assert task.metric == expected["metric"]

    def likelihoods(prompts: list[Prompt]) -> torch.Tensor:
        small = [Prompt(prompt.ids % IDS, prompt.scored) for prompt in prompts]
        return compute_log_likelihoods(Tiny(), small, 16, 1, ALONE, torch.no_grad())

    asked = [r for r in asked if r.document < MEASURED]
    by_context, by_nothing = (likelihoods(prompts[: len(asked)]) for prompts in (given, alone))
    for metric, value in expected["values"].items():
        found = compute_score(metric, asked, by_context, by_nothing).value
        assert found == pytest.approx(value, rel=1e-6), metric
    assert metrics_of(max(r.option for r in asked) + 1)[0] in expected["values"]


def test_every_label_is_there(theirs: dict[str, Any]) -> None:
    assert load_tasks().keys() - OURS == theirs["tasks"].keys()

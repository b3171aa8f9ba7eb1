"""Keys and contents of all actions of a project with each kind of run, as they have always been.

Whoever moves or rewrites code may not change one: a changed key makes users' artifacts anew, a
changed content under the same key is an alarm. Where a change is meant, after bumping the version:

    uv run python tests/pipeline/test_golden_project.py
"""

import json
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from project import Project, write_source

IN_PROCESSES = True  # see conftest.py
GOLDEN = Path(__file__).parents[1] / "golden/project.json"
TARGETS = (
    "checkpoints/small/heldout.json",
    "checkpoints/tuned/final",
    "checkpoints/deduped/final",
    "checkpoints/soup/final",
    "data/small/statistics.txt",
    "hf/small",
)
WORDS = ("def", "class", "return", "self", "None", "yield", "the", "of", "0", "1", "naïve", "日本")


def lines(seed: int, count: int = 160) -> list[dict]:
    """Documents that depend on no Python version; every eighth is there twice."""
    drawn = random.Random(seed)
    texts = [
        " ".join(drawn.choice(WORDS) + str(drawn.randrange(500)) for _ in range(60))
        for _ in range(count)
    ]
    texts[::8] = texts[1::8]
    return [{"id": f"{seed}-{i}", "text": text, "source": "x"} for i, text in enumerate(texts)]


def project(root: Path) -> Project:
    """Pretraining, tuning on conversations, a mix without duplicates, a second stage, a soup."""
    made = Project(root)
    for number in range(3):
        write_source(made.root / f"sources/part-{number}.json.gz", lines(number))
    talks = [
        [("user", f"What is 2 x {i}?"), ("assistant", f"twice {i} is {2 * i}")] for i in range(60)
    ]
    text = "".join(
        json.dumps({"messages": [{"role": role, "content": said} for role, said in talk]}) + "\n"
        for talk in talks
    )
    (made.root / "talks").mkdir()
    (made.root / "talks/twice.jsonl").write_text(text)
    small = made.read("config/data/small.yaml")
    made.write("config/data/deduped.yaml", {**small, "dedupe": {"exact": True}})
    talking = {"sources": {"files": ["talks/*.jsonl"]}, "documents": {"heldout_share": 0.2}}
    talking |= {"instructions": {"sequence_length": 64}, "tokenizer": {"dataset": "small"}}
    made.write("config/data/talks.yaml", talking)
    made.change("config/train/small.yaml", max_duration=12, eval_interval=12)
    for name, reset in (("tuned", True), ("stage2", False)):
        shutil.copy(made.root / "config/train/small.yaml", made.root / f"config/train/{name}.yaml")
        made.change(f"config/train/{name}.yaml", reset_trainer_state=True, max_duration=6)
        made.change(f"config/train/{name}.yaml", reset_optimizer_state=reset)
    made.change("config/train/tuned.yaml", data={"drop_last": True})
    runs = {
        "tuned": {"train": "config/train/tuned.yaml", "dataset": "talks", "start_from": "small"},
        "deduped": {"train": "config/train/small.yaml", "dataset": "deduped"},
        "stage2": {"train": "config/train/stage2.yaml", "dataset": "small", "start_from": "small"},
    }
    for name, run in runs.items():
        made.change("config/config.yaml", **{f"runs__{name}": run})
    made.change("config/config.yaml", soups={"soup": ["stage2", "small"]})
    return made


def actions(made: Project) -> dict[str, list[str]]:
    """stage@version → "key content" of each of its actions, sorted.

    A content is that of the outputs without what is not part of it (times, logs).
    """
    from olmo.store.store import Store

    found: dict[str, list[str]] = {}
    for path in (made.store / "actions").glob("*/*.json"):
        record = Store(made.store).record(path.stem)
        assert record is not None
        action = record["action"]
        entry = f"{record['key']} {record['content']}"
        found.setdefault(f"{action['stage']}@{action['version']}", []).append(entry)
    return {stage: sorted(entries) for stage, entries in sorted(found.items())}


def machine() -> str:
    """What the bits of a trained model depend on: the processor's model too, for which MKL has
    kernels of its own."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    processor = "-".join(facts.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    return f"{processor} {torch.backends.cpu.get_cpu_capability()} {torch.__version__}"


def test_no_key_and_no_content_has_changed(tmp_path: Path):
    made = project(tmp_path / "project")
    made.run(*TARGETS, timeout=900)
    wanted = json.loads(GOLDEN.read_text())
    found = actions(made)
    if (here := machine()) in wanted["machines"]:
        assert found == wanted["machines"][here]
    else:  # keys and contents up to the order are those of every machine; later ones follow bits
        other = next(iter(wanted["machines"].values()))
        assert found.keys() == other.keys()
        trained = [stage for stage, entries in found.items() if entries != other[stage]]
        print("other bits, as by another processor:", *trained)
        assert not {t.split("@")[0] for t in trained} & set(wanted["anywhere"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        remade = project(Path(folder) / "project")
        remade.run(*TARGETS, timeout=900)
        golden = json.loads(GOLDEN.read_text())
        golden["machines"][machine()] = actions(remade)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")

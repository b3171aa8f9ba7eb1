"""What finding and taking out duplicates costs: MB of text per CPU-second, for each kind.

    python bench/dedupe.py --environment environments/dolma.json [--copies 3]

The text is the Python's own standard library, so many times over, in as many files. The toolkit's
start-up is the first, tiny call and not counted; its process's CPU time and ours are added up.
"""

import argparse
import gzip
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokens import REQUIREMENTS, of, own, prepare

from olmo.corpus.attributes import attributes
from olmo.corpus.dolma import Dolma, pinned_toolkit
from olmo.corpus.environments import interpreter_path
from olmo.corpus.mixed import mixed
from olmo.corpus.stdlib import stdlib

KINDS: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "paragraphs": {"paragraphs": True},
    "overlap": {"ngram": 13},
    "all": {"exact": True, "paragraphs": True, "ngram": 13},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=3)
    args = parser.parse_args()
    python = interpreter_path(args.environment)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {pinned_toolkit(REQUIREMENTS)}"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Dolma(python, pinned_toolkit(REQUIREMENTS)) as dolma,
    ):
        root = Path(folder)
        tiny = root / "tiny.gz"
        tiny.write_bytes(gzip.compress(json.dumps({"id": "a", "text": "b"}).encode()))
        run(dolma, [prepare(root, "tiny", tiny)], root, {"exact": True})
        stdlib.build(folder=root / "stdlib", shards=2)
        big, against = (
            prepare(root, name, root / "stdlib" / f"stdlib-{number:02d}.json.gz")
            for number, name in enumerate(("big", "against"))
        )
        megabytes = float((big / "bytes").read_text()) * args.copies
        for name, asked in KINDS.items():
            shutil.rmtree(root / "out", ignore_errors=True)
            seconds, facts = run(dolma, [big] * args.copies, root / "out", asked, against)
            print(
                f"{name:10} {megabytes / seconds:6.1f} MB/CPU-s, filters "
                f"{facts['filter_bytes']} for {facts['documents']:,} documents"
            )
        before = own() + of(dolma)
        for number in range(args.copies):
            mixed.build(
                documents=big / "documents.gz",
                table=big / "table",
                attributes=root / f"out/attributes/{number:05d}.gz",
                mixed=root / "mixed",
                mixed_table=root / "mixed-table",
                toolkit=dolma.toolkit,
                dolma=dolma,
            )
        print(f"{'mixed':10} {megabytes / (own() + of(dolma) - before):6.1f} MB/CPU-s")


def run(
    dolma: Dolma, folders: list[Path], out: Path, asked: dict[str, Any], against: Path | None = None
) -> tuple[float, dict[str, Any]]:
    """CPU seconds of the stage, the toolkit's process included, and its facts."""
    before = own() + of(dolma)
    facts = attributes.build(
        documents=[folder / "documents.gz" for folder in folders],
        tables=[folder / "table" for folder in folders],
        heldout=[],
        against=[against / "documents.gz"] if against and "ngram" in asked else [],
        attributes=out / "attributes",
        progress=out / "progress",
        toolkit=dolma.toolkit,
        dolma=dolma,
        **asked,
    )
    return own() + of(dolma) - before, dict(facts)


if __name__ == "__main__":
    main()

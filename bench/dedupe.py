"""The cost of finding and removing duplicates: MB of text per CPU-second, for each kind.

    python bench/dedupe.py --environment environments/dolma.json [--copies 3]

The text is the Python's standard library in --copies files. The toolkit starts up in a first, short
call that is not timed; the CPU time of its process is added to ours.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokens import REQUIREMENTS, cpu_with_toolkit, prepare_documents, prepare_short

from olmo.bench.script import describe_run, parse_options
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
    options = parse_options(__doc__, environment=Path, copies=3)
    python = interpreter_path(options.environment)
    print(describe_run(pinned_toolkit(REQUIREMENTS)))
    with (
        tempfile.TemporaryDirectory() as folder,
        Dolma(python, pinned_toolkit(REQUIREMENTS)) as dolma,
    ):
        root = Path(folder)
        find_duplicates(dolma, [prepare_short(root)], root, KINDS["exact"])
        stdlib.build(folder=root / "stdlib", shards=2)
        large, against = (
            prepare_documents(root, name, root / "stdlib" / f"stdlib-{number:02d}.json.gz")
            for number, name in enumerate(("large", "against"))
        )
        megabytes = float((large / "megabytes").read_text()) * options.copies
        for name, kinds in KINDS.items():
            shutil.rmtree(root / "out", ignore_errors=True)
            files = [large] * options.copies
            seconds, facts = find_duplicates(dolma, files, root / "out", kinds, against)
            print(
                f"{name:10} {megabytes / seconds:6.1f} MB/CPU-s, filters "
                f"{facts['filter_bytes']} for {facts['documents']:,} documents"
            )
        before = cpu_with_toolkit(dolma)
        for number in range(options.copies):
            mixed.build(
                documents=large / "documents.gz",
                table=large / "table",
                attributes=root / f"out/attributes/{number:05d}.gz",
                mixed=root / "mixed",
                mixed_table=root / "mixed-table",
                toolkit=dolma.toolkit,
                dolma=dolma,
            )
        print(f"{'mixed':10} {megabytes / (cpu_with_toolkit(dolma) - before):6.1f} MB/CPU-s")


def find_duplicates(
    dolma: Dolma, folders: list[Path], out: Path, kinds: dict[str, Any], against: Path | None = None
) -> tuple[float, dict[str, Any]]:
    """CPU seconds of the stage `attributes`, and its facts."""
    before = cpu_with_toolkit(dolma)
    facts = attributes.build(
        documents=[folder / "documents.gz" for folder in folders],
        tables=[folder / "table" for folder in folders],
        heldout=[],
        against=[against / "documents.gz"] if against and "ngram" in kinds else [],
        attributes=out / "attributes",
        progress=out / "progress",
        toolkit=dolma.toolkit,
        dolma=dolma,
        **kinds,
    )
    return cpu_with_toolkit(dolma) - before, dict(facts)


if __name__ == "__main__":
    main()

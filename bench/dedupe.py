"""The cost of deduplication: CPU seconds of each of its stages, in one part and in several.

    python bench/dedupe.py --environment environments/dolma.json [--gigabytes 0.2] [--files 8]
        [--parts 8] [--toolkit]

The corpus is made here: documents of lines that nothing else has, but a tenth of the documents are
copies, and a twentieth of the lines. With --toolkit also what the toolkit does, overlaps and the
removal, and its own command on the same files, in one process; it starts up in a first, short call
that is not timed, and its CPU time is added to ours. Memory is the peak of this process so far.
"""

import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokens import REQUIREMENTS, cpu_with_toolkit, prepare_documents, prepare_short

from olmo.bench.script import describe_run, parse_options
from olmo.corpus import bloom
from olmo.corpus.dedupe import DUPLICATE, PARAGRAPH
from olmo.corpus.digests import copies, digests
from olmo.corpus.dolma import Dolma, pinned_toolkit
from olmo.corpus.duplicates import OUTPUTS, duplicates, places
from olmo.corpus.environments import interpreter_path
from olmo.corpus.marks import marks
from olmo.corpus.mixed import mixed
from olmo.corpus.overlaps import overlap_filter, overlaps
from olmo.io import gz

DOCUMENT_LINES, WORDS = 25, "the words of a line"
DIGESTS = ("document_digests", "line_digests", "near_digests", "line_starts")
COPIED_DOCUMENTS, COPIED_LINES = 0.1, 0.05


def main() -> None:
    options = parse_options(
        __doc__,
        environment=Path,
        gigabytes=0.2,
        files=8,
        parts=8,
        toolkit={"action": "store_true"},
    )
    python = interpreter_path(options.environment)
    with (
        tempfile.TemporaryDirectory() as folder,
        Dolma(python, pinned_toolkit(REQUIREMENTS)) as dolma,
    ):
        root = Path(folder)
        chance = random.Random(0)
        size = int(options.gigabytes * 1e9 / options.files)
        corpus = [make_file(root, f"part-{n}", size, chance) for n in range(options.files)]
        megabytes = sum(float((part / "megabytes").read_text()) for part in corpus)
        print(describe_run(pinned_toolkit(REQUIREMENTS)))
        print(f"{megabytes:,.0f} MB of text in {len(corpus)} files")
        total: dict[int, float] = {}
        shared = measure("digests", megabytes, dolma, lambda: digest_all(corpus))
        for parts in (1, options.parts):
            name = f"duplicates, {parts} parts"
            total[parts] = shared + measure(name, megabytes, dolma, lambda p=parts: find(corpus, p))
        total[1] += (
            last := measure("marks", megabytes, dolma, lambda: mark(corpus, options.parts))
        )
        total[options.parts] += last
        print(f"{options.parts} parts cost {total[options.parts] / total[1]:.3f} of one")
        if options.toolkit:
            short = prepare_short(root)
            find_overlaps([short], short, dolma)
            measure("overlap", megabytes, dolma, lambda: find_overlaps(corpus, corpus[0], dolma))
            measure("mixed", megabytes, dolma, lambda: mix(corpus, dolma))
            for kind in (DUPLICATE, PARAGRAPH):
                run = lambda kind=kind: run_toolkit(corpus, root, dolma, kind)  # noqa: E731
                measure(f"toolkit, {kind}", megabytes, dolma, run)


def measure(name: str, megabytes: float, dolma: Dolma, work: Callable[[], object]) -> float:
    """CPU seconds of some work, printed."""
    before = cpu_with_toolkit(dolma)
    work()
    seconds = cpu_with_toolkit(dolma) - before
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{name:28} {seconds:8.2f} CPU-s {megabytes / seconds:8.1f} MB/CPU-s, {memory:.2f} GB",
        flush=True,
    )
    return seconds


def make_file(root: Path, name: str, size: int, chance: random.Random) -> Path:
    source = root / "source.gz"
    with gz.writing(source) as file:
        for number, text in enumerate(texts(size, chance)):
            file.write(f'{{"id": "{name}-{number}", "text": "{text}"}}\n'.encode())
    return prepare_documents(root, name, source)


def texts(size: int, chance: random.Random) -> Iterator[str]:
    """Documents of `size` bytes in all, as they stand in JSON."""
    known: list[str] = ["word"]
    while size > 0:
        if chance.random() < COPIED_DOCUMENTS:
            text = chance.choice(known)
        else:
            old = chance.choice(known).split("\\n")[0]
            lines = [
                old if chance.random() < COPIED_LINES else f"{WORDS} {chance.getrandbits(300):x}"
                for _ in range(DOCUMENT_LINES)
            ]
            text = "\\n".join(lines)
            known.append(text)
            del known[:-1000]
        size -= len(text)
        yield text


def digest_all(corpus: list[Path]) -> None:
    for part in corpus:
        made = {name: part / name for name in DIGESTS}
        given = {"documents": part / "documents.gz", "overlaps": []}
        digests.build(**given, exact=True, paragraphs=True, **made)
        found = part / "document_digests"
        copies.build(document_digests=found, heldout=[], copies=part / "copies")


def find(corpus: list[Path], parts: int) -> None:
    for number in range(parts):
        duplicates.build(
            **{name: [part / name for part in corpus] for name in (*DIGESTS, "copies")},
            **{name: corpus[0] / f"{name}-{number}" for name in OUTPUTS},
            names=[part.name for part in corpus],
            part=number,
            parts=parts,
        )


def mark(corpus: list[Path], parts: int) -> None:
    for part in corpus:
        names = ("shards", "document_repeats", "line_repeats")
        given = {name: [corpus[0] / f"{name}-{n}" for n in range(parts)] for name in names}
        places.build(**given, near=[], places=part / "places", shard=part.name)
        marks.build(
            documents=part / "documents.gz",
            table=part / "table",
            overlaps=[],
            copies=[part / "copies"],
            places=[part / "places"],
            marks=part / "marks",
        )


def find_overlaps(corpus: list[Path], against: Path, dolma: Dolma) -> None:
    given: dict[str, Any] = {"ngram": 13, "dolma": dolma, "toolkit": dolma.toolkit}
    made = against / "filter"
    overlap_filter.build(against=[against / "documents.gz"], overlap_filter=made, **given)
    for part in corpus:
        overlaps.build(
            documents=part / "documents.gz",
            table=part / "table",
            overlap_filter=made,
            overlaps=part / "overlaps",
            overlap=0.0,
            **given,
        )


def mix(corpus: list[Path], dolma: Dolma) -> None:
    for part in corpus:
        mixed.build(
            documents=part / "documents.gz",
            table=part / "table",
            attributes=part / "marks",
            mixed=part / "mixed",
            mixed_table=part / "mixed_table",
            toolkit=dolma.toolkit,
            dolma=dolma,
        )


def run_toolkit(corpus: list[Path], root: Path, dolma: Dolma, kind: str) -> None:
    """`dolma dedupe` on all files, as one process must."""
    folder = root / kind
    (folder / "in/documents").mkdir(parents=True)
    names = [f"in/documents/{part.name}.gz" for part in corpus]
    for part, name in zip(corpus, names, strict=True):
        (folder / name).symlink_to(part / "documents.gz")
    bloom.write_filter(folder / kind, 20_000_000, 1e-6)
    by = "text" if kind == DUPLICATE else "paragraphs"
    request = {"by": by, "documents": names, "name": kind, "bloom_filter": kind}
    dolma.request("dedupe", 1e5, folder=str(folder), read_only=False, **request)


if __name__ == "__main__":
    main()

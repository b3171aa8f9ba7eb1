"""Change bytes of the small files that steer everything: it is noticed, or it changes nothing.

    python tests/faults.py --flip          # a table: kind, changes, what came of them

Of each kind of file in a finished project some are taken, and of each of these: single bits at
drawn places, every shorter length of a small one, no bytes at all. What reads such a file then says
in a sentence that it is damaged, or makes it again, or gives what it gave before.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from project import Project

FINE = ("noticed", "unchanged", "by design")
FLIPS = 60  # of a file
FILES = 3  # of a kind
SMALL = 700  # bytes, up to which every length is tried


@dataclass(frozen=True)
class Kind:
    """A kind of small file: where they are, and what is taken from one; None: it is made again.

    `seal`: whether every byte is covered. Where not, another value is what the file says now, by
    design: a table that people edit, a log that other programs read.
    """

    name: str
    pattern: str
    read: Callable[[Project, Path], Any]
    seal: bool = True


def record(project: Project, path: Path) -> Any:
    from olmo.store.store import Store

    return Store(project.store).record(path.stem)


def name(project: Project, path: Path) -> Any:
    from olmo.store import naming
    from olmo.store.store import Store

    store = Store(project.store)
    found, lost = naming.read_names(store)
    assert lost == [], "every name of this project has its link"
    return found[path]


def listing(project: Project, path: Path) -> Any:
    from olmo.corpus.listing import read_listing

    return read_listing([path])


def manifest(project: Project, path: Path) -> Any:
    from olmo.checkpoint import layout

    layout.verify_checkpoint(path.parent)
    return layout.parse_manifest(path.read_bytes(), layout.MANIFEST)


def segments(project: Project, path: Path) -> Any:
    from olmo.train.segments import read_segments

    found = read_segments(path.parent)
    return None if any("damaged" in segment for segment in found) else found


def marker(project: Project, path: Path) -> Any:
    from olmo.io import sealed

    return sealed.load_file(path)


def told(project: Project, path: Path) -> Any:
    from olmo.io.downloads import Download, ignore_progress

    return Download("http://127.0.0.1/x", path.parent, ignore_progress).metadata or None


def metrics(project: Project, path: Path) -> Any:
    from olmo.train.sinks import read_metrics

    return read_metrics(path)


def environment(project: Project, path: Path) -> Any:
    from olmo.corpus.environments import interpreter_path

    return interpreter_path(path)


def source_table(project: Project, path: Path) -> Any:
    from olmo.corpus.source_table import read_stashing_secrets

    return read_stashing_secrets(path)


KINDS = [
    Kind("record", "store/actions/*/*.json", record),
    Kind("name", "store/links/*", name),
    Kind("listing", "data/small/*/0*.tsv", listing),
    Kind("manifest", "store/work/*/attempt/step*/manifest.json", manifest),
    Kind("segments.jsonl", "store/work/*/attempt/segments.jsonl", segments),
    Kind("finished.json", "store/work/*/attempt/finished.json", marker),
    Kind("paused.json", "small-files/paused.json", marker),
    Kind("progress.json", "small-files/progress.json", told),
    Kind("environment", "small-files/dolma.json", environment),
    Kind("metrics.jsonl", "store/work/*/attempt/metrics.jsonl", metrics, seal=False),
    Kind("sources.tsv", "small-files/sources.tsv", source_table, seal=False),
]


def more_small_files(project: Project) -> None:
    """Those that a finished project has no more, or has elsewhere."""
    from olmo.io import sealed

    folder = project.root / "small-files"
    left = {"step": 3, "by": "SIGTERM", "checkpoint": "step3-unsharded"}
    sealed.write_atomic(folder / "paused.json", sealed.dumps(left))
    sealed.write_atomic(folder / "progress.json", sealed.dumps({"validator": '"abc"', "bytes": 12}))
    (folder / "body").write_bytes(b"123")
    shutil.copy(project.root / "environments/dolma.json", folder)
    for made in (project.root / "environments").glob("dolma-*"):
        (folder / made.name).symlink_to(made)
    rows = [("url", "bytes", "sha256", "licence"), ("https://x/a.json.gz", "12", "a" * 64, "odc")]
    (folder / "sources.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))


def changes(content: bytes) -> Iterator[bytes]:
    """Other contents of a file: a bit changed, cut off, empty."""
    for place in random.sample(range(len(content)), min(FLIPS, len(content))):
        changed = bytearray(content)
        changed[place] ^= 1 << random.randrange(8)
        yield bytes(changed)
    lengths = range(len(content)) if len(content) <= SMALL else ()
    yield from (content[:length] for length in lengths)
    yield b""


def outcome(project: Project, kind: Kind, path: Path, wanted: Any) -> str:
    """What comes of a changed file: noticed, unchanged, by design; or silent or a crash."""
    with chdir(project.root), redirect_stderr(StringIO()) as said:
        try:
            found = kind.read(project, path)
        except ValueError as error:
            sentence = str(error)
            tells = path.name in sentence or path.parent.name in sentence
            return "noticed" if tells and "Traceback" not in sentence else f"crash: {error!r}"
        except Exception as error:
            return f"crash: {error!r}"
    if found is None or "damaged" in said.getvalue():
        return "noticed"
    if found == wanted:
        return "unchanged"
    return "silent" if kind.seal else "by design"


def sweep(project: Project) -> Iterator[tuple[Kind, Counter[str]]]:
    """For each kind, how many changes came to what."""
    more_small_files(project)
    os.environ["OLMO_STORE"] = str(project.store)
    for kind in KINDS:
        files = sorted(project.root.glob(kind.pattern))
        found: Counter[str] = Counter()
        for path in random.sample(files, min(FILES, len(files))):
            content = path.read_bytes()
            with chdir(project.root):
                wanted = kind.read(project, path)
            for changed in changes(content):
                path.unlink(missing_ok=True)
                path.write_bytes(changed)
                found[outcome(project, kind, path, wanted)] += 1
            path.unlink(missing_ok=True)
            path.write_bytes(content)
        yield kind, found

"""How long `olmo store affected` takes: `uv run python bench/affected.py [--records 100000]`.

A store of records alone, as of data sets with a source, documents, tokens and a run in ten. Timed
are the first index, one that nothing has changed since, and one after a run has ended; each with
the answer, in a new process.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from olmo.io import sealed
from olmo.store import naming
from olmo.store.action import Action
from olmo.store.record import Record, content
from olmo.store.store import Store

SHARDS = 30  # of a data set; each is of three actions, and one trains


def write_record(store: Store, stage: str, params: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Write a record of one output, and its name; the output's digest."""
    action = Action(stage, 1, params, inputs)
    digest = hashlib.sha256(action.key.encode()).hexdigest()
    made = {"out": {"sha256": digest, "size": 1000}}
    run = {"started": "2026-12-01T00:00:00Z", "wall_s": 1.0, "cpu_s": 1.0}
    record = Record(
        key=action.key,
        action=action.as_dict(),
        content=content(made),
        outputs=made,
        facts={},
        conditions={},
        run=run,
    )
    path = store.record_path(action.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sealed.dumps(record, 1))
    place = f"../data/{action.key[:32]}"
    name = {"path": place, "project": "..", "key": action.key, "output": "out"}
    file = naming.name_file(store, store.root / place)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(sealed.dumps(name))
    return digest


def write_dataset(store: Store, number: int) -> str:
    """Write the records of a data set and its run; the digest of its first source."""
    sources = [
        write_record(store, "download", {"url": f"http://host/{number}/{shard}.gz"}, {})
        for shard in range(SHARDS)
    ]
    documents = [write_record(store, "documents", {}, {"source": source}) for source in sources]
    tokens = [write_record(store, "tokens", {}, {"documents": one}) for one in documents]
    write_record(store, "training", {}, {"tokens": tokens})
    return sources[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    options = parser.parse_args()
    count = -(-options.records // (3 * SHARDS + 1))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder, "store"))
        (store.root / "objects").mkdir(parents=True)
        digests = [write_dataset(store, number) for number in range(count)]

        def answer(what: str, subject: str) -> None:
            start = time.monotonic()
            command = [sys.executable, "-m", "olmo.cli", "store", "affected", subject]
            done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            found = len(done.stdout.splitlines())
            print(f"{what}: {time.monotonic() - start:.2f} s, {found} lines", flush=True)

        print(f"{count * (3 * SHARDS + 1):,} records")
        answer("first index", digests[0])
        print(f"index: {(store.root / 'index/lineage').stat().st_size / 1e6:.0f} MB")
        time.sleep(3)  # until all folders are settled
        answer("after 3 s", digests[1])
        for what in ("unchanged", "unchanged"):
            answer(what, digests[1])
        write_dataset(store, count)
        answer("after 91 new records", digests[2])
        answer("stage, 1 in 3 records", "download@1")


if __name__ == "__main__":
    main()

"""Both tokenizing engines beside the bare toolkit, per CPU-second, gz in, shard and table out.

    python bench/tokens.py --environment environments/dolma.json [--tokenizer FILE] [--rounds 3]
        [--copies 1]

The environment is the pipeline's (`snakemake environments/dolma.json`). The text is the Python's
own standard library, --copies times over. `bare` is the toolkit's own command, one process a file,
its start-up (the same command on one short document) taken off; the engines' start-up is their
first file, not counted. Rounds are interleaved; CPU seconds are medians; outputs of the engines are
compared.
"""

import argparse
import gzip
import json
import platform
import resource
import statistics
import subprocess
import tempfile
from pathlib import Path

from olmo.corpus.documents import documents
from olmo.corpus.dolma import Dolma, pinned_toolkit
from olmo.corpus.environments import interpreter_path
from olmo.corpus.fast import Fast
from olmo.corpus.stdlib import stdlib
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import Engine, tokens

REQUIREMENTS = Path(__file__).parent.parent / "envs" / "dolma.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="default: trained here, 32,768 tokens")
    parser.add_argument("--eos-token-id", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1)
    args = parser.parse_args()
    python = interpreter_path(args.environment)
    with (
        tempfile.TemporaryDirectory() as folder,
        Dolma(python, pinned_toolkit(REQUIREMENTS)) as dolma,
    ):
        root = Path(folder)
        stdlib.build(folder=root / "stdlib", shards=1)
        text = root / "text.gz"
        text.write_bytes((root / "stdlib" / "stdlib-00.json.gz").read_bytes() * args.copies)
        big = prepare(root, "big", text)
        tiny = root / "tiny.gz"
        tiny.write_bytes(gzip.compress(json.dumps({"id": "a", "text": "b"}).encode()))
        small = prepare(root, "small", tiny)
        tokenizer = args.tokenizer or root / "tokenizer.json"
        if args.tokenizer is None:
            trained_tokenizer.build(
                documents=[big / "documents.gz"], tokenizer=tokenizer, vocab_size=32_768
            )
        given = (tokenizer, args.eos_token_id)
        engines: dict[str, Engine] = {"dolma": dolma, "fast": Fast(dolma, audit_share=0)}
        for engine in engines.values():
            by_engine(small, engine, dolma, *given)
        seconds: dict[str, list[float]] = {"bare": [], **{name: [] for name in engines}}
        for _ in range(args.rounds):
            start_up = bare(small, python, *given)
            seconds["bare"].append(bare(big, python, *given) - start_up)
            made = set()
            for name, engine in engines.items():
                seconds[name].append(by_engine(big, engine, dolma, *given))
                made.add((big / "tokens").read_bytes() + (big / "index").read_bytes())
            assert len(made) == 1, "expected the engines to give the same bytes"
        megabytes = (big / "bytes").read_text()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {pinned_toolkit(REQUIREMENTS)}"
    )
    cpu = {name: statistics.median(times) for name, times in seconds.items()}
    for name, time in cpu.items():
        rate = float(megabytes) / time
        print(f"{name:5} {time:7.2f} CPU-s {rate:6.2f} MB/CPU-s, {cpu['bare'] / time:.2f} of bare")


def prepare(root: Path, name: str, source: Path) -> Path:
    """A folder with a file of documents and its table."""
    folder = root / name
    folder.mkdir()
    facts = documents.build(
        source=source,
        documents=folder / "documents.gz",
        heldout=folder / "heldout.gz",
        table=folder / "table",
        name=name,
    )
    (folder / "bytes").write_text(str(facts["text_bytes"] / 1e6))
    return folder


def by_engine(
    folder: Path, engine: Engine, dolma: Dolma, tokenizer: Path, eos_token_id: int
) -> float:
    """CPU seconds of the whole stage, the toolkit's process included."""
    before = own() + of(dolma)
    tokens.build(
        documents=folder / "documents.gz",
        table=folder / "table",
        tokenizer=tokenizer,
        tokens=folder / "tokens",
        index=folder / "index",
        eos_token_id=eos_token_id,
        pad_token_id=1,
        toolkit=engine.toolkit,
        engine=engine,
    )
    return own() + of(dolma) - before


def bare(folder: Path, python: Path, tokenizer: Path, eos_token_id: int) -> float:
    """CPU seconds of the toolkit's command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as destination:
        subprocess.run(
            [
                python.parent / "dolma",
                "tokens",
                f"--documents={folder / 'documents.gz'}",
                f"--destination={destination}",
                f"--tokenizer.name_or_path={tokenizer}",
                f"--tokenizer.eos_token_id={eos_token_id}",
                "--tokenizer.pad_token_id=1",
                "--processes=1",
                "--max_size=50000000",
            ],
            check=True,
            capture_output=True,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def own() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def of(dolma: Dolma) -> float:
    """CPU seconds of the toolkit's running process so far (Linux)."""
    if dolma.process is None:
        return 0.0
    stat = Path(f"/proc/{dolma.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / 100


if __name__ == "__main__":
    main()

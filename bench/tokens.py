"""Both tokenizing engines beside the bare toolkit, per CPU-second, gz in, shard and table out.

    python bench/tokens.py --environment environments/dolma.json [--tokenizer FILE] [--rounds 3]
        [--text FILE.gz]

The environment is the pipeline's (`snakemake environments/dolma.json`). The text is the Python's
standard library, or a gz file of documents. `bare` is the toolkit's own command, one process a
file, without its start-up (the same command on one short document); the engines, `fast` with each
of its encoders, start up on a first file that is not timed. Each round has a fresh encoder, for
gigatoken remembers the words that it has seen. CPU seconds are medians of interleaved rounds; the
engines' outputs are compared.
"""

import gzip
import json
import resource
import subprocess
import tempfile
from pathlib import Path

from olmo.bench.script import (
    cpu_time,
    describe_run,
    measure_interleaved,
    medians,
    parse_options,
    process_cpu_time,
)
from olmo.corpus.documents import documents
from olmo.corpus.dolma import Dolma, pinned_toolkit
from olmo.corpus.encoding import ENCODERS, make_encoder
from olmo.corpus.environments import interpreter_path
from olmo.corpus.fast import Fast
from olmo.corpus.stdlib import stdlib
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import Engine, tokens

REQUIREMENTS = Path(__file__).parent.parent / "envs" / "dolma.txt"


def main() -> None:
    options = parse_options(
        __doc__,
        environment=Path,
        tokenizer={"type": Path, "help": "default: trained here, 32,768 tokens"},
        eos_token_id=0,
        rounds=3,
        text={"type": Path, "help": "default: the standard library"},
    )
    python = interpreter_path(options.environment)
    with (
        tempfile.TemporaryDirectory() as folder,
        Dolma(python, pinned_toolkit(REQUIREMENTS)) as dolma,
    ):
        root = Path(folder)
        text = options.text
        if text is None:
            stdlib.build(folder=root / "stdlib", shards=1)
            text = root / "stdlib" / "stdlib-00.json.gz"
        large, short = prepare_documents(root, "large", text), prepare_short(root)
        tokenizer = options.tokenizer or root / "tokenizer.json"
        if options.tokenizer is None:
            trained_tokenizer.build(
                documents=[large / "documents.gz"], tokenizer=tokenizer, vocab_size=32_768
            )
        settings = (tokenizer, options.eos_token_id)
        engines: dict[str, Engine] = {"dolma": dolma}
        engines |= {name: Fast(dolma, audit_share=0, encoder=name) for name in ENCODERS}
        outputs = set()

        def run_engine(name: str) -> float:
            make_encoder.cache_clear()
            time_engine(short, engines[name], dolma, *settings)
            seconds = time_engine(large, engines[name], dolma, *settings)
            outputs.add((large / "tokens").read_bytes() + (large / "index").read_bytes())
            return seconds

        def run_bare() -> float:
            start_up = time_dolma_command(short, python, *settings)
            return time_dolma_command(large, python, *settings) - start_up

        programs = {name: lambda name=name: run_engine(name) for name in engines}
        cpu = medians(measure_interleaved(options.rounds, {"bare": run_bare, **programs}))
        assert len(outputs) == 1, "expected equal outputs of the engines"
        megabytes = float((large / "megabytes").read_text())
    print(describe_run(pinned_toolkit(REQUIREMENTS)))
    for name, seconds in cpu.items():
        rate = f"{megabytes / seconds:6.2f} MB/CPU-s, {cpu['bare'] / seconds:.2f} of bare"
        print(f"{name:10} {seconds:7.3f} CPU-s {rate}")


def prepare_documents(root: Path, name: str, source: Path) -> Path:
    """A folder with a file of documents, its table, and its size in MB of text."""
    folder = root / name
    folder.mkdir()
    facts = documents.build(
        source=source,
        documents=folder / "documents.gz",
        heldout=folder / "heldout.gz",
        table=folder / "table",
        name=name,
    )
    (folder / "megabytes").write_text(str(facts["text_bytes"] / 1e6))
    return folder


def prepare_short(root: Path) -> Path:
    """`prepare_documents` of one short document, for the start-up."""
    source = root / "short.gz"
    source.write_bytes(gzip.compress(json.dumps({"id": "a", "text": "b"}).encode()))
    return prepare_documents(root, "short", source)


def cpu_with_toolkit(dolma: Dolma) -> float:
    """CPU seconds so far of this process and the toolkit's."""
    return cpu_time() + (process_cpu_time(dolma.process.pid) if dolma.process else 0.0)


def time_engine(
    folder: Path, engine: Engine, dolma: Dolma, tokenizer: Path, eos_token_id: int
) -> float:
    """CPU seconds of the stage `tokens`."""
    before = cpu_with_toolkit(dolma)
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
    return cpu_with_toolkit(dolma) - before


def time_dolma_command(folder: Path, python: Path, tokenizer: Path, eos_token_id: int) -> float:
    """CPU seconds of the toolkit's own command."""
    before = cpu_time(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as destination:
        options = {
            "documents": folder / "documents.gz",
            "destination": destination,
            "tokenizer.name_or_path": tokenizer,
            "tokenizer.eos_token_id": eos_token_id,
            "tokenizer.pad_token_id": 1,
            "processes": 1,
            "max_size": 50_000_000,
        }
        command = [python.parent / "dolma", "tokens", *(f"--{k}={v}" for k, v in options.items())]
        subprocess.run(command, check=True, capture_output=True)
    return cpu_time(resource.RUSAGE_CHILDREN) - before


if __name__ == "__main__":
    main()

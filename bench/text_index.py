"""Text indexes: what they cost, and how fast `olmo seen --text` answers with and without one.

    python bench/text_index.py [--megabytes 40] [--shards 3] [--fragments 1000]

The text is the Python's standard library, repeated with other numbers and names until there is so
much of it; a small model is trained on a fifth of it. Each fragment, 1 to 200 bytes of a random
document, is asked for as `olmo seen --text` asks (the first 20 occurrences: documents, tokens,
steps, checkpoints). Then all occurrences are found, without tokens and steps, and compared with a
search of all texts. Times are wall seconds in one process; the build's are CPU seconds.
"""

import json
import os
import random
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit"))

from small_run import SETTINGS
from small_run import run as train

from olmo.bench.script import describe_run, parse_options
from olmo.corpus.documents import documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.fast import Fast
from olmo.corpus.text_index import GRAM_BYTES, text_index
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import tokens
from olmo.inspect.documents import find_token_shards, require_shard
from olmo.inspect.passages import DocumentSearch, describe_passages
from olmo.inspect.run import TrainedRun
from olmo.io import gz
from olmo.store.lineage import records_by_content
from olmo.store.stage import current_store

LENGTH, BATCH = 1024, 64  # tokens of an instance, instances of a step
LIMIT = 20  # occurrences that `olmo seen` prints


def make_texts(size: int) -> list[str]:
    """Modules of the standard library, each repeat with its own words."""
    root, rng = Path(sysconfig.get_path("stdlib")), random.Random(0)
    modules = [path.read_text(errors="ignore") for path in sorted(root.glob("*.py"))]
    words, texts, made = [f"name{n}" for n in range(10_000)], [], 0
    while made < size:
        for module in modules:
            changed = re.sub(r"\b(self|return|if|\d+)\b", lambda _: rng.choice(words), module)
            cut = rng.randrange(500, 8000)
            parts = (changed[at : at + cut].strip() for at in range(0, len(changed), cut))
            texts += [part for part in parts if part]
            made += len(changed)
            if made >= size:
                break
    return texts


def make_run(folder: Path, texts: list[str], shards: int) -> tuple[TrainedRun, float, int]:
    """A run of a fifth of an epoch in `folder`; CPU seconds and bytes of its text indexes."""
    os.chdir(folder)
    current_store().create()
    tokenizer, engine = folder / "tokenizer.json", Fast(Dolma(Path("never started"), ""), 0)
    paths, size, cpu = [], 0, 0.0
    for shard in range(shards):
        made = {name: folder / f"{shard}.{name}" for name in ("documents", "heldout", "table")}
        with gz.writing(folder / f"{shard}.gz") as file:
            for number, text in list(enumerate(texts))[shard::shards]:
                file.write(json.dumps({"id": str(number), "text": text}).encode() + b"\n")
        documents(source=folder / f"{shard}.gz", name=f"{shard}.gz", **made)
        if not shard:
            trained_tokenizer(documents=[made["documents"]], tokenizer=tokenizer, vocab_size=8000)
        outputs = {name: folder / f"{shard}.{name}" for name in ("tokens", "index")}
        tokens(
            documents=made["documents"],
            table=made["table"],
            tokenizer=tokenizer,
            eos_token_id=0,
            pad_token_id=1,
            toolkit=engine.toolkit,
            engine=engine,
            **outputs,
        )
        paths.append(str(outputs["tokens"].resolve()))
        index = {name: folder / f"{shard}.{name}" for name in ("grams", "blocks")}
        began = time.process_time()
        text_index(documents=made["documents"], **index)
        cpu += time.process_time() - began
        size += sum(path.stat().st_size for path in index.values())
    model = {"d_model": 8, "n_layers": 1, "max_sequence_length": LENGTH}
    steps = sum(Path(path).stat().st_size // (2 * LENGTH) for path in paths) // BATCH // 5
    train(
        folder,
        model=SETTINGS["model"] | model | {"vocab_size": 8000, "embedding_size": 8000},
        data={"paths": paths},
        evaluators=[],
        max_duration=steps,
        global_train_batch_size=BATCH,
        device_train_microbatch_size=4,
        save_interval_unsharded=steps,
    )
    return TrainedRun(str(folder / "run")), cpu, size


def choose(texts: list[str], rng: random.Random) -> str:
    """A random part of a random document: at most as many bytes as asked for."""
    length = rng.choice((1, 3, 6, 10, 16, 30, 60, 100, 200))
    text = rng.choice(texts)
    at = rng.randrange(max(len(text) - length, 1))
    return text[at : at + length].encode()[:length].decode(errors="ignore")


def main() -> None:
    options = parse_options(__doc__, megabytes=40, shards=3, fragments=1000)
    print(describe_run(), flush=True)
    texts, rng = make_texts(options.megabytes * 10**6), random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        with redirect_stdout(sys.stderr):
            run, cpu, index = make_run(Path(name), texts, options.shards)
        size, count = sum(len(text.encode()) for text in texts), run.dataset.offsets[-1][1] * LENGTH
        print(f"text: {size / 1e6:.1f} MB in {len(texts):,} documents, {count / 1e6:.1f} M tokens")
        print(f"build: {1e6 * cpu / size:.3f} CPU-s/MB")
        print(f"index: {index / size:.3f} bytes/byte, {index / count:.2f}/token", flush=True)
        made_by = records_by_content(current_store())
        known = find_token_shards(current_store(), made_by)
        shards = [require_shard(path, known) for path in run.dataset.paths]
        taken: dict[tuple[int, str], list[float]] = {}
        asked = 0
        while asked < options.fragments:
            wanted = choose(texts, rng)
            size = len(wanted.encode())
            if not wanted or (size < GRAM_BYTES and rng.randrange(20)):
                continue  # all is read and compared for these: fewer of them
            asked += 1
            kind = next(most for most in (5, 6, 10, 16, 30, 60, 100, 200) if size <= most)
            began = time.perf_counter()
            list(describe_passages(run, wanted, LIMIT))
            taken.setdefault((kind, "first 20"), []).append(time.perf_counter() - began)
            began = time.perf_counter()
            found = [
                (int(document.id), place)
                for shard in shards
                for document, _, places in DocumentSearch(wanted, made_by).find(shard)
                for place in places
            ]
            taken.setdefault((kind, "all, without tokens"), []).append(time.perf_counter() - began)
            places = re.compile(f"(?={re.escape(wanted)})")
            expected = [
                (number, match.start())
                for number, text in enumerate(texts)
                if wanted in text
                for match in places.finditer(text)
            ]
            assert sorted(found) == expected, wanted
        print(f"{asked} fragments: all occurrences equal")
        for (kind, what), seconds in sorted(taken.items()):
            within = sum(second < 0.2 for second in seconds)
            print(f"to {kind} bytes, {what}: {len(seconds)} texts, {within} under 0.2 s, median "
                  f"{statistics.median(seconds):.3f} s, longest {max(seconds):.3f} s")  # fmt: skip


if __name__ == "__main__":
    main()

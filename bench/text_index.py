"""Text indexes: what they cost, and how fast `olmo seen --text` finds with and without one.

    python bench/text_index.py [--megabytes 40] [--shards 3] [--fragments 1000]

The text is the Python's standard library, repeated with other numbers and names until there is so
much of it. Each fragment, 1 to 200 bytes of a random document, is looked up, and what is found is
compared with a search of all texts. Times are wall seconds of one process; the build's CPU seconds.
"""

import json
import random
import re
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

from olmo.bench.script import describe_run, parse_options
from olmo.corpus.text_index import find_lines, find_texts, text_index
from olmo.io import gz

BYTES_A_TOKEN = 4  # of English and code with a vocabulary of 50,000 tokens


def make_texts(size: int) -> list[str]:
    """Modules of the standard library, each repeat with its own words."""
    root, rng = Path(sysconfig.get_path("stdlib")), random.Random(0)
    modules = [path.read_text(errors="ignore") for path in sorted(root.glob("*.py"))]
    words, texts, made = [f"name{n}" for n in range(10_000)], [], 0
    while made < size:
        for module in modules:
            changed = re.sub(r"\b(self|return|if|\d+)\b", lambda _: rng.choice(words), module)
            cut = rng.randrange(500, 8000)
            texts += [changed[at : at + cut] for at in range(0, len(changed), cut)]
            made += len(changed)
            if made >= size:
                break
    return texts


def main() -> None:
    options = parse_options(__doc__, megabytes=40, shards=3, fragments=1000)
    print(describe_run())
    texts, rng = make_texts(options.megabytes * 10**6), random.Random(1)
    parts = [texts[number :: options.shards] for number in range(options.shards)]
    with tempfile.TemporaryDirectory() as name:
        shards, cpu = [], 0.0
        for number, part in enumerate(parts):
            files = [Path(name, f"{number}.{kind}") for kind in ("gz", "grams", "blocks")]
            with gz.writing(files[0]) as lines:
                for at, text in enumerate(part):
                    lines.write(json.dumps({"id": str(at), "text": text}).encode() + b"\n")
            began = time.process_time()
            text_index.build(documents=files[0], grams=files[1], blocks=files[2])
            cpu += time.process_time() - began
            shards.append(files)
        size = sum(len(text.encode()) for text in texts)
        index = sum(path.stat().st_size for _, *made in shards for path in made)
        print(f"text: {size / 1e6:.1f} MB in {len(texts):,} documents")
        print(f"build: {1e6 * cpu / size:.3f} CPU-s/MB")
        print(f"index: {index / size:.3f} bytes/byte, {BYTES_A_TOKEN * index / size:.2f}/token")
        taken: dict[str, list[float]] = {}
        for number in range(options.fragments):
            length = rng.choice((1, 3, 6, 10, 16, 30, 60, 100, 200))
            text = rng.choice(texts)
            at = rng.randrange(max(len(text) - length, 1))
            wanted = text[at : at + length].encode()[:length].decode(errors="ignore")
            if not wanted or (length < 6 and number % 20):  # these read all: fewer of them
                continue
            began = time.perf_counter()
            found = [
                [(line, places) for line, _, places in find_texts(files[0], wanted, lines)]
                for files in shards
                for lines in [find_lines(wanted, *files[1:])]
            ]
            kind = "under 6 bytes" if len(wanted.encode()) < 6 else f"{length} bytes"
            taken.setdefault(kind, []).append(time.perf_counter() - began)
            for part, places in zip(parts, found, strict=True):
                expected = [
                    (line, [m.start() for m in re.finditer(f"(?={re.escape(wanted)})", text)])
                    for line, text in enumerate(part)
                    if wanted in text
                ]
                assert places == expected, wanted
        for kind, seconds in taken.items():
            most = max(seconds)
            print(f"{kind}: {len(seconds)} texts, median {statistics.median(seconds):.3f} s, "
                  f"longest {most:.3f} s")  # fmt: skip
        began = time.perf_counter()
        for files in shards:
            list(find_texts(files[0], "nowhere at all"))
        print(f"without an index: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()

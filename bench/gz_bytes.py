"""Whether gz.writing gives the same bytes on every processor: digests of fixed lines, compressed.

    python bench/gz_bytes.py                                  # this processor
    qemu-x86_64 -cpu Nehalem python bench/gz_bytes.py         # SSE4.2, no AVX
    qemu-x86_64 -cpu Haswell python bench/gz_bytes.py         # AVX2, no AVX-512
    qemu-aarch64 … python bench/gz_bytes.py --text FOLDER     # ARM

isal chooses its code by the processor's features, so an emulated one shows what another machine
would write. The lines: the standard library's modules, as lines and as JSON documents; a few words
over and over; random text, which hardly compresses.
"""

import hashlib
import json
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isal import igzip

from olmo.bench.script import describe_run, parse_options
from olmo.io import gz

LEVELS = (0, 1, 2, 3)


def texts(root: Path, size: int) -> Iterator[tuple[str, list[bytes]]]:
    """Kinds of text, about `size` bytes each; equal wherever the modules are equal."""
    modules = [p.read_text("utf-8", "replace") for p in sorted(root.glob("*.py"))]
    yield "lines", "".join(modules)[:size].encode().splitlines(keepends=True)
    yield "documents", [json.dumps({"id": m[:9], "text": m}).encode() + b"\n" for m in modules]
    chance = random.Random(0)
    words = [b"the ", b"of ", b"model ", "naïve ".encode(), b"\n"]
    yield "repeats", [b"".join(chance.choices(words, k=size // 4))]
    yield "random", [chance.randbytes(size // 2).hex().encode() + b"\n"]


def gz_digest(content: bytes) -> str:
    """Of a gz file without its header, which may contain the time."""
    return hashlib.sha256(content[10:]).hexdigest()[:12]


def main() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    options = parse_options(
        __doc__,
        size={"default": 4_000_000, "help": "bytes of each kind"},
        text={"default": library, "help": "a folder of *.py"},
    )
    print(describe_run())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.gz")
        for name, lines in texts(options.text, options.size):
            with gz.writing(path) as file:
                file.writelines(lines)
            digests = {"as we write": gz_digest(path.read_bytes())}
            for level in LEVELS:
                digests[f"level {level}"] = gz_digest(igzip.compress(b"".join(lines), level))
            print(f"{name:10}", *(f"{how} {digest}" for how, digest in digests.items()), sep="  ")


if __name__ == "__main__":
    main()

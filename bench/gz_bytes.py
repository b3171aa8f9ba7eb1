"""Does gz.writing give the same bytes on every processor? Digests of fixed lines, compressed here.

    python bench/gz_bytes.py                                  # what this processor has
    qemu-x86_64 -cpu Nehalem python bench/gz_bytes.py         # SSE4.2, no AVX
    qemu-x86_64 -cpu Haswell python bench/gz_bytes.py         # AVX2, no AVX-512
    qemu-aarch64 … python bench/gz_bytes.py --text FOLDER     # ARM

isal chooses its code by what the processor says it has, so an emulated one shows what another
machine would write. The lines: the standard library's modules, a line each and a file each as
JSON; a few words over and over; random text, which hardly compresses.
"""

import argparse
import hashlib
import json
import platform
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isal import igzip

from olmo.io import gz

LEVELS = (0, 1, 2, 3)


def lines(root: Path, size: int) -> Iterator[tuple[str, list[bytes]]]:
    """Kinds of text, of about so many bytes each: the same wherever the modules are the same."""
    modules = [p.read_text("utf-8", "replace") for p in sorted(root.glob("*.py"))]
    text = "".join(modules)[:size]
    yield "lines", text.encode().splitlines(keepends=True)
    yield "documents", [json.dumps({"id": m[:9], "text": m}).encode() + b"\n" for m in modules]
    chance = random.Random(0)
    words = [b"the ", b"of ", b"model ", "naïve ".encode(), b"\n"]
    yield "repeats", [b"".join(chance.choices(words, k=size // 4))]
    yield "random", [chance.randbytes(size // 2).hex().encode() + b"\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4_000_000, help="bytes of each kind")
    standard = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--text", type=Path, default=standard, help="a folder of *.py")
    args = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.gz")
        for name, content in lines(args.text, args.size):
            with gz.writing(path) as file:
                file.writelines(content)
            print(f"{name:10} as we write {digest(path.read_bytes())}", end="")
            for level in LEVELS:
                print(f"  level {level} {digest(igzip.compress(b''.join(content), level))}", end="")
            print()


def digest(content: bytes) -> str:
    """Of a gz file without its head, which may hold the time."""
    return hashlib.sha256(content[10:]).hexdigest()[:12]


if __name__ == "__main__":
    main()

"""The source that every machine already has: the running Python's own standard library.

Its modules and its documentation, cut into documents: one for each top-level function or class,
one for the rest of each module, one for each topic of `help()`. They come out as gz files of
JSON lines in Dolma's schema, as if they had been downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from olmo.io import gz
from olmo.store.stage import Facts, Folder, stage

# Tests, demonstrations, character tables and files that differ between two builds of one Python.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "encodings",
    "site-packages",
    "dist-packages",
}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "__pycache__")
TOPICS = PurePosixPath("pydoc_data/topics.py")


@stage(version=1, conditions=gz.conditions)
def stdlib(folder: Folder, shards: int, library: str | None = None) -> Facts:
    """Write the running Python's standard library as text in Dolma's schema.

    The folder gets `stdlib-00.json.gz` and so on, and `manifest.tsv`, a table of the source files:
    path, bytes, sha256, shard. A package's documents stay together; packages are dealt to the
    shards, largest first, so that the shards come out about equally large. `library` is what
    `library_digest` tells: it makes the sources, which are no file of ours, part of the action.
    """
    if not 1 <= shards <= 100:
        raise ValueError(f"expected 1 to 100 shards, found {shards}")
    root = Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[PurePosixPath]] = {}
    for path in source_files(root):
        packages.setdefault(path.parts[0], []).append(path)
    if not packages:
        raise ValueError(
            f"expected the sources of Python's standard library in {root}, found none. Use a "
            "Python that has them (uv's or python.org's), or name another source."
        )

    def size(package: str) -> int:
        return sum((root / path).stat().st_size for path in packages[package])

    dealt: list[list[str]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for package in sorted(packages, key=lambda package: (-size(package), package)):
        lightest = loads.index(min(loads))
        dealt[lightest].append(package)
        loads[lightest] += size(package)

    folder.mkdir()
    documents = 0
    rows = []
    for number, chosen in enumerate(dealt):
        with gz.writing(folder / f"stdlib-{number:02d}.json.gz") as lines:
            for path in sorted(path for package in chosen for path in packages[package]):
                content = (root / path).read_bytes()
                rows.append((path, len(content), hashlib.sha256(content).hexdigest(), number))
                for document in documents_of(path, content):
                    lines.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
                    documents += 1
    rows.sort()
    (folder / "manifest.tsv").write_text(
        "path\tbytes\tsha256\tshard\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows)
    )
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "files": len(rows),
        "bytes": sum(loads),
        "documents": documents,
        "licence": "PSF-2.0",
    }


def library_digest() -> str:
    """Names the running Python and the bytes of its library: the sha256 of every source's."""
    root = Path(sysconfig.get_path("stdlib"))
    lines = [f"{platform.python_implementation()} {platform.python_version()}"]
    for path in source_files(root):
        lines.append(f"{path} {hashlib.sha256((root / path).read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def source_files(root: Path) -> Iterator[PurePosixPath]:
    """The library's module files, relative to its root, without those that are left out."""
    for path in sorted(root.rglob("*.py")):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if not any(
            part in LEFT_OUT or part.startswith(LEFT_OUT_PREFIXES) for part in relative.parts
        ):
            yield relative


def documents_of(path: PurePosixPath, content: bytes) -> Iterator[dict]:
    """The documents of one source file, in the order of its lines, the remainder last."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    source = io.TextIOWrapper(io.BytesIO(content), encoding).read()  # all line ends become \n
    texts = topics(source) if path == TOPICS else definitions(source)
    seen: dict[str, int] = {}
    for name, text in texts:
        seen[name] = seen.get(name, 0) + 1
        again = f":{seen[name]}" if seen[name] > 1 else ""
        if text.strip():
            yield {
                "id": f"stdlib/{path}#{name}{again}",
                "text": text,
                "source": "python-stdlib",
                "metadata": {"path": str(path), "python": platform.python_version()},
            }


def definitions(source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each top-level function and class, then ("", text) of what is left."""
    lines = io.StringIO(source).readlines()  # str.splitlines would also split at form feeds
    rest = list(lines)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            last = node.end_lineno
            assert last is not None
            yield node.name, "".join(lines[first - 1 : last])
            rest[first - 1 : last] = [""] * (last - first + 1)
    yield "", "".join(rest)


def topics(source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each topic in the module that `help()` reads its topics from."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            yield from ast.literal_eval(node.value).items()

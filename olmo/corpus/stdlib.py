"""A source that every machine has: the running Python's standard library.

Its modules and its documentation, split into documents: one for each top-level function or class,
one for the rest of each module, one for each topic of `help()`. The output is gz files of JSON
lines in Dolma's schema, like that of a download.
"""

from __future__ import annotations

import ast
import hashlib
import io
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from olmo.config.strict import check_range
from olmo.corpus.json_lines import dump_line
from olmo.io import gz
from olmo.store.stage import Facts, Folder, stage

# Tests, demonstrations, character tables, and files that differ between builds of one Python.
EXCLUDED = {"test", "tests", "idlelib", "turtledemo", "encodings", "site-packages", "dist-packages"}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "__pycache__")
TOPICS = PurePosixPath("pydoc_data/topics.py")
MAX_SHARDS = 100  # their names have two digits


@stage(version=1, conditions=gz.conditions)
def stdlib(folder: Folder, shards: int, library: str | None = None) -> Facts:
    """Write the running Python's standard library as text in Dolma's schema.

    The folder gets `stdlib-00.json.gz` and so on, and `manifest.tsv`, a table of the source files:
    path, bytes, sha256, shard. A package's documents stay together; each package, largest first,
    goes to the smallest shard, so that shards are about equally large. `library` is
    `library_digest()`, which makes the library's sources part of the action's key.
    """
    check_range("shards", shards, 1, MAX_SHARDS)
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

    parts: list[list[str]] = [[] for _ in range(shards)]
    sizes = [0] * shards
    for package in sorted(packages, key=lambda package: (-size(package), package)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(package)
        sizes[smallest] += size(package)

    folder.mkdir()
    documents = 0
    rows = []
    for number, part in enumerate(parts):
        with gz.writing(folder / f"stdlib-{number:02d}.json.gz") as lines:
            for path in sorted(path for package in part for path in packages[package]):
                content = (root / path).read_bytes()
                rows.append((path, len(content), hashlib.sha256(content).hexdigest(), number))
                for document in split_into_documents(path, content):
                    lines.write(dump_line(document))
                    documents += 1
    rows.sort()
    (folder / "manifest.tsv").write_text(
        "path\tbytes\tsha256\tshard\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows)
    )
    return {**python_facts(), "files": len(rows), "bytes": sum(sizes), "documents": documents}


def python_facts() -> dict[str, str]:
    """The running Python and the licence of its library, for a record."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "licence": "PSF-2.0",
    }


def library_digest() -> str:
    """A sha256 of the running Python's version and of all sources of its library."""
    root = Path(sysconfig.get_path("stdlib"))
    lines = [f"{platform.python_implementation()} {platform.python_version()}"]
    for path in source_files(root):
        lines.append(f"{path} {hashlib.sha256((root / path).read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def source_files(root: Path) -> Iterator[PurePosixPath]:
    """The library's modules, relative to its root, without the excluded ones."""
    for path in sorted(root.rglob("*.py")):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if not any(
            part in EXCLUDED or part.startswith(EXCLUDED_PREFIXES) for part in relative.parts
        ):
            yield relative


def split_into_documents(path: PurePosixPath, content: bytes) -> Iterator[dict]:
    """The documents of one source file, in the order of its lines, the remainder last."""
    source = decode_source(content)
    texts = split_topics(source) if path == TOPICS else split_definitions(source)
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


def decode_source(content: bytes) -> str:
    """The text of a Python file, in the encoding that it declares, with line ends \\n."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return io.TextIOWrapper(io.BytesIO(content), encoding).read()


def split_definitions(source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each top-level function and class, then ("", text) of the rest."""
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


def split_topics(source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each topic in the module that `help()` reads."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            yield from ast.literal_eval(node.value).items()

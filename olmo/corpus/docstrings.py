"""A choice task that every machine already has: which line documents which function?

Made of the running Python's standard library. A model that was trained on it may have read the
answers: this shows that evaluation works, and which of two runs learned more, not what a model
can do.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from olmo.corpus.stdlib import TOPICS, source_files
from olmo.store.stage import Facts, Folder, stage

DATASET, SPLIT = "stdlib_docstrings", "test"
OPTIONS = 4
SHORTEST, LONGEST = 20, 80  # characters of a line that documents; of a signature, twice as many


@stage(version=1)
def stdlib_docstrings(folder: Folder, questions: int = 200, library: str | None = None) -> Facts:
    """Write the task's documents as `hf_datasets_cache_dir` has them.

    hf_datasets/stdlib_docstrings/none/test/documents.jsonl: signature, options, answer (from 0),
    path. The options are the first lines of four functions' documentation. Which functions, and
    where the right line stands, goes by the sha256 of their names: the same on every machine.
    `library` is what `olmo.corpus.stdlib.library_digest` tells.

    Raises ValueError where the library has too few documented functions.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for path, signature, line in documented():
        found.setdefault(line, (path, signature, line))  # of equal lines the first

    def place(item: tuple[str, str, str]) -> str:
        return hashlib.sha256(f"{item[0]} {item[1]}".encode()).hexdigest()

    dealt = sorted(found.values(), key=place)
    if len(dealt) < max(questions, OPTIONS):
        raise ValueError(
            f"expected {max(questions, OPTIONS)} functions with a line of documentation in "
            f"{sysconfig.get_path('stdlib')}, found {len(dealt)}; ask for fewer questions"
        )
    file = folder / "hf_datasets" / DATASET / "none" / SPLIT / "documents.jsonl"
    file.parent.mkdir(parents=True)
    with file.open("w", encoding="utf-8") as lines:
        for number, (path, signature, line) in enumerate(dealt[:questions]):
            others = [dealt[(number + i) % len(dealt)][2] for i in range(1, OPTIONS)]
            answer = int(place(dealt[number])[:8], 16) % OPTIONS
            row = {
                "signature": signature,
                "options": [*others[:answer], line, *others[answer:]],
                "answer": answer,
                "path": path,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"questions": questions, "functions": len(dealt), "licence": "PSF-2.0"}


def documented() -> Iterator[tuple[str, str, str]]:
    """(file, signature, first line of its documentation) of functions and methods."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in source_files(root):
        if path == TOPICS:
            continue
        content = (root / path).read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        for node in ast.walk(ast.parse(content.decode(encoding))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            # A line that names the function needs no understanding.
            named = node.name.lower() in line.lower() or "(" in line
            if SHORTEST <= len(line) <= LONGEST and len(signature) <= 2 * LONGEST and not named:
                yield str(path), signature, line

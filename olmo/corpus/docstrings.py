"""A multiple-choice task that every machine has: which line documents a function?

Made of the running Python's standard library. A model trained on that library may have read the
answers: the task tests the evaluation, and compares two runs, but does not measure what a model can
do.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from olmo.corpus.stdlib import TOPICS, decode_source, source_files
from olmo.store.stage import Facts, Folder, stage

DATASET, SPLIT = "stdlib_docstrings", "test"
OPTIONS = 4
SHORTEST, LONGEST = 20, 80  # characters of a docstring's line; a signature may have twice as many


@stage(version=1)
def stdlib_docstrings(folder: Folder, questions: int = 200, library: str | None = None) -> Facts:
    """Write the task's documents as `hf_datasets_cache_dir` has them.

    hf_datasets/stdlib_docstrings/none/test/documents.jsonl: signature, options, answer (from 0),
    path. The options are the first lines of four functions' documentation. The sha256 of their
    names selects the functions and the place of the right line: the same on every machine.
    `library` is `olmo.corpus.stdlib.library_digest()`.

    Raises ValueError where the library has too few documented functions.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for path, signature, line in find_documented():
        found.setdefault(line, (path, signature, line))  # the first of equal lines

    def hash_of(item: tuple[str, str, str]) -> str:
        return hashlib.sha256(f"{item[0]} {item[1]}".encode()).hexdigest()

    shuffled = sorted(found.values(), key=hash_of)
    if len(shuffled) < max(questions, OPTIONS):
        raise ValueError(
            f"expected {max(questions, OPTIONS)} functions with a line of documentation in "
            f"{sysconfig.get_path('stdlib')}, found {len(shuffled)}; set fewer questions"
        )
    file = folder / "hf_datasets" / DATASET / "none" / SPLIT / "documents.jsonl"
    file.parent.mkdir(parents=True)
    with file.open("w", encoding="utf-8") as lines:
        for number, (path, signature, line) in enumerate(shuffled[:questions]):
            others = [shuffled[(number + i) % len(shuffled)][2] for i in range(1, OPTIONS)]
            answer = int(hash_of(shuffled[number])[:8], 16) % OPTIONS
            row = {
                "signature": signature,
                "options": [*others[:answer], line, *others[answer:]],
                "answer": answer,
                "path": path,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"questions": questions, "functions": len(shuffled), "licence": "PSF-2.0"}


def find_documented() -> Iterator[tuple[str, str, str]]:
    """(file, signature, first line of its documentation) of functions and methods."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in source_files(root):
        if path == TOPICS:
            continue
        for node in ast.walk(ast.parse(decode_source((root / path).read_bytes()))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            # A line with the function's name would be too easy.
            is_easy = node.name.lower() in line.lower() or "(" in line
            if SHORTEST <= len(line) <= LONGEST and len(signature) <= 2 * LONGEST and not is_easy:
                yield str(path), signature, line

"""Instruction data that every machine has: the standard library's documentation, asked for.

Each module, class and function with a docstring becomes a conversation in Tulu v2's format: a
question about it, and the docstring as the answer. A class is asked about once more, for one of
its methods.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from olmo.corpus.stdlib import source_files
from olmo.io import gz
from olmo.store.stage import Facts, Folder, stage

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

QUESTIONS = {
    "module": ("What is the module {} for?", "Tell me about Python's module {}."),
    "class": ("What is {} in Python?", "Explain the class {}.", "When would I use {}?"),
    "function": ("What does {} do?", "Explain the function {}.", "How does {} work?"),
    "method": ("And its method {}?", "What does its {} do?"),
}
SYSTEM = "You answer questions about Python's standard library."
SYSTEM_ONE_IN = 8  # conversations begin with it


@stage(version=1, conditions=gz.conditions)
def stdlib_questions(folder: Folder, shards: int, library: str | None = None) -> Facts:
    """Write questions and answers about the running Python's standard library.

    The folder gets `questions-00.json.gz` and so on; a conversation goes by the hash of its id.
    `library` is what `olmo.corpus.stdlib.library_digest` tells: it makes the sources, which are no
    file of ours, part of the action.
    """
    if not 1 <= shards <= 100:
        raise ValueError(f"expected 1 to 100 shards, found {shards}")
    root = Path(sysconfig.get_path("stdlib"))
    dealt: list[list[dict]] = [[] for _ in range(shards)]
    files = 0
    for path in source_files(root):
        files += 1
        for conversation in conversations_of(path, (root / path).read_bytes()):
            dealt[number(conversation["id"], shards)].append(conversation)
    if not all(dealt):
        raise ValueError(
            f"expected documentation for {shards} files in {root}, found "
            f"{sum(map(len, dealt))} conversations. Use a Python that has its library's sources "
            "(uv's or python.org's), or fewer files"
        )
    folder.mkdir()
    for shard, conversations in enumerate(dealt):
        with gz.writing(folder / f"questions-{shard:02d}.json.gz") as lines:
            for conversation in conversations:
                lines.write(json.dumps(conversation, ensure_ascii=False).encode() + b"\n")
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "files": files,
        "conversations": sum(map(len, dealt)),
        "licence": "PSF-2.0",
    }


def conversations_of(path: PurePosixPath, content: bytes) -> Iterator[dict]:
    """The conversations about one module, in the order of its lines."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    tree = ast.parse(io.TextIOWrapper(io.BytesIO(content), encoding).read())
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    Asked = tuple[str, str, str | None, tuple[str, str] | None]  # kind, name, answer, method
    about: list[Asked] = [("module", module, answer(tree), None)]
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            method = first_method(node) if isinstance(node, ast.ClassDef) else None
            about.append((kind, f"{module}.{node.name}", answer(node), method))
    seen: dict[str, int] = {}
    for kind, name, text, method in about:
        if text is None:
            continue
        seen[name] = seen.get(name, 0) + 1
        again = f":{seen[name]}" if seen[name] > 1 else ""
        identity = f"stdlib-questions/{name}{again}"
        messages = [("user", question(kind, name)), ("assistant", text)]
        if number(identity, SYSTEM_ONE_IN) == 0:
            messages.insert(0, ("system", SYSTEM))
        if method is not None:
            messages += [("user", question("method", method[0])), ("assistant", method[1])]
        yield {
            "id": identity,
            "dataset": "python-stdlib",
            "messages": [{"role": role, "content": text} for role, text in messages],
        }


def answer(node: Definition | ast.Module) -> str | None:
    """A docstring as a reader has it, without its indentation; None where there is none."""
    text = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(text).strip() or None if text else None


def first_method(node: ast.ClassDef) -> tuple[str, str] | None:
    """(name, docstring) of a class's first public method that has one."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_":
            text = answer(inner)
            if text is not None:
                return inner.name, text
    return None


def question(kind: str, name: str) -> str:
    """One of the ways to ask, always the same one for a name."""
    ways = QUESTIONS[kind]
    return ways[number(name, len(ways))].format(f"`{name}`")


def number(name: str, below: int) -> int:
    """A number from 0 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % below

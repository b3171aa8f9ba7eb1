"""Instruction data that every machine has: questions on the standard library's documentation.

Each module, class and function with a docstring becomes a conversation in Tulu v2's format: a
question about it, and the docstring as the answer. For a class, a second question asks for one of
its methods.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from olmo.config.strict import check_range
from olmo.corpus.documents import hash_number
from olmo.corpus.json_lines import dump_line
from olmo.corpus.stdlib import MAX_SHARDS, decode_source, python_facts, source_files
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
SYSTEM_ONE_IN = 8  # one conversation in 8 begins with it


@stage(version=1, conditions=gz.conditions)
def stdlib_questions(folder: Folder, shards: int, library: str | None = None) -> Facts:
    """Write questions and answers about the running Python's standard library.

    The folder gets `questions-00.json.gz` and so on; the hash of a conversation's id selects its
    file. `library` is `olmo.corpus.stdlib.library_digest()`, which makes the library's sources part
    of the action's key.
    """
    check_range("shards", shards, 1, MAX_SHARDS)
    root = Path(sysconfig.get_path("stdlib"))
    conversations: list[list[dict]] = [[] for _ in range(shards)]
    files = 0
    for path in source_files(root):
        files += 1
        for conversation in make_conversations(path, (root / path).read_bytes()):
            conversations[hash_below(conversation["id"], shards)].append(conversation)
    if not all(conversations):
        raise ValueError(
            f"expected documentation for {shards} files in {root}, found "
            f"{sum(map(len, conversations))} conversations. Use a Python that has its library's "
            "sources (uv's or python.org's), or fewer files"
        )
    folder.mkdir()
    for shard, rows in enumerate(conversations):
        with gz.writing(folder / f"questions-{shard:02d}.json.gz") as lines:
            lines.writelines(map(dump_line, rows))
    return {**python_facts(), "files": files, "conversations": sum(map(len, conversations))}


def make_conversations(path: PurePosixPath, content: bytes) -> Iterator[dict]:
    """The conversations about one module, in the order of its lines."""
    tree = ast.parse(decode_source(content))
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    Topic = tuple[str, str, str | None, tuple[str, str] | None]  # kind, name, answer, method
    topics: list[Topic] = [("module", module, clean_docstring(tree), None)]
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            method = first_method(node) if isinstance(node, ast.ClassDef) else None
            topics.append((kind, f"{module}.{node.name}", clean_docstring(node), method))
    seen: dict[str, int] = {}
    for kind, name, text, method in topics:
        if text is None:
            continue
        seen[name] = seen.get(name, 0) + 1
        again = f":{seen[name]}" if seen[name] > 1 else ""
        identity = f"stdlib-questions/{name}{again}"
        messages = [("user", format_question(kind, name)), ("assistant", text)]
        if hash_below(identity, SYSTEM_ONE_IN) == 0:
            messages.insert(0, ("system", SYSTEM))
        if method is not None:
            messages += [("user", format_question("method", method[0])), ("assistant", method[1])]
        yield {
            "id": identity,
            "dataset": "python-stdlib",
            "messages": [{"role": role, "content": text} for role, text in messages],
        }


def clean_docstring(node: Definition | ast.Module) -> str | None:
    """A docstring without its indentation; None if there is none."""
    text = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(text).strip() or None if text else None


def first_method(node: ast.ClassDef) -> tuple[str, str] | None:
    """(name, docstring) of a class's first public method with a docstring."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_":
            text = clean_docstring(inner)
            if text is not None:
                return inner.name, text
    return None


def format_question(kind: str, name: str) -> str:
    """One of the questions of a kind, always the same one for a name."""
    templates = QUESTIONS[kind]
    return templates[hash_below(name, len(templates))].format(f"`{name}`")


def hash_below(name: str, limit: int) -> int:
    """A number from 0 to limit - 1, computed from the name alone."""
    return hash_number(name.encode()) % limit

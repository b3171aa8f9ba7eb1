"""A stage's bytes change only with its VERSION.

Each stage that can run here in seconds, and whose bytes do not depend on the machine, has the
digest of what it makes of a small fixed input in stages.json. When this fails: if the change is
meant, bump the stage's version (its artifacts are made anew everywhere), then

    uv run python tests/golden/test_stage_versions.py
"""

import gzip
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import olmo
from olmo.corpus.dedupe import NearSection
from olmo.corpus.digests import signature_options
from olmo.corpus.documents import DocumentsSection
from olmo.corpus.duplicates import OUTPUTS
from olmo.corpus.instructions import InstructionsSection
from olmo.io import gz
from olmo.store.stage import Stage
from olmo.store.store import content

GOLDEN = Path(__file__).parent / "stages.json"
LIBRARY = {
    "alpha.py": '"""A module."""\n\nimport os\n\n\ndef one(x):\n    return x + 1\n\n\n'
    "class Two:\n    pass\n",
    "beta/__init__.py": "from .inner import f\n",
    "beta/inner.py": "def f():\n    return 'ü'\n",
    "pydoc_data/topics.py": "topics = {'with': 'The with statement'}\n",
}
DOCUMENTED = {
    "delta.py": "".join(
        f'def f{i}(x, *, y={i}):\n    """Return what {i} and {w} make together."""\n'
        for i, w in enumerate(("naïve", "plain", "other", "last", "more"))
    ),
}
LINES = [
    {"id": f"doc-{i}", "text": f"Document {i}: naïve café, {'words ' * (i % 7)}end.", "source": "x"}
    for i in range(200)
]

# Whose bytes depend on more than their input and code, and what holds them still instead.
ELSEWHERE = {
    "training": "its bits depend on the processor; tests/golden holds its curves",
    "heldout_perplexity": "likewise",
    "document_losses": "likewise; tests/unit/test_bits_per_byte.py holds it to lm-eval's numbers",
    "choice_task": "likewise; tests/unit/test_evaluation.py holds it to lm-eval's numbers",
    "harness_tasks": "likewise",
    "samples": "likewise; its texts",
    "evaluation": "a summary of these: tests/unit/test_evaluation.py",
    "download": "its bytes are the server's; tests/unit/test_sources.py",
    "download_tokens": "likewise",
    "fetched": "likewise",
    "download_conversations": "likewise; what it makes of them is local_conversations'",
    "fetched_checkpoint": "likewise; it shares its code with local_checkpoint",
    "source_list": "likewise",
    "beginning": "likewise: tests/unit/test_sample.py",
    "sample": "a summary of beginnings: tests/unit/test_sample.py",
    "given_tokenizer": "its bytes are the hub's; it shares its code with local_tokenizer",
    "huggingface_export": "tests/unit/test_huggingface.py holds it to transformers' numbers",
    "statistics": "a summary of shards: tests/unit/test_statistics.py",
    "tokens": "needs the toolkit's environment: tests/unit/test_tokens.py",
    "overlap_filter": "likewise: tests/unit/test_dedupe.py",
    "overlaps": "likewise",
    "mixed": "likewise",
    "tags": "likewise: tests/unit/test_tags.py",
}


def source(folder: Path) -> Path:
    path = folder / "source.json.gz"
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in LINES)
    return path


def tokenizer(folder: Path) -> Path:
    from olmo.corpus.tokenizer import trained_tokenizer

    path = folder / "given.json"
    trained_tokenizer.build(documents=[source(folder)], tokenizer=path, vocab_size=300)
    return path


def make_converted(stage: Stage, root: Path) -> None:
    """A file of each format; rows with and without ids, one that is malformed, one not UTF-8."""
    import polars

    (root / "a.jsonl").write_text('{"text": "Café", "id": 7}\n{"text": null}\nno row\n')
    (root / "b.csv").write_text('id,text\n1,"of two\nlines"\n,none\n')
    (root / "c.txt").write_bytes(b"one \xff")
    polars.DataFrame({"text": ["one", None], "n": [1, 2]}).write_parquet(root / "d.parquet")
    names = ["a.jsonl", "b.csv", "c.txt", "d.parquet"]
    stage.build(files=[root / name for name in names], names=names, source=root / "outputs")


TALKS = [
    {
        "id": f"talk-{i}",
        "messages": [
            {"role": "user", "content": f"What is {i}? "},
            {"role": "assistant", "content": f"Ein Café für {'viele ' * (i % 9)}{i}."},
        ],
    }
    for i in range(40)
]


def talks(folder: Path) -> Path:
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in TALKS))
    return path


def make_instances(stage: Stage, root: Path) -> None:
    from olmo.corpus.conversations import local_conversations
    from olmo.corpus.documents import documents

    local_conversations.build(file=talks(root), source=root / "talks.gz")
    names = {name: root / name for name in ("documents", "heldout", "table")}
    documents.build(source=root / "talks.gz", name="talks.gz", kind="messages", **names)
    for packed in (False, True):
        kind = "packed" if packed else "plain"
        stage.build(
            **{name: names[name] for name in ("documents", "table")},
            tokenizer=tokenizer(root),
            **{name: folder(root) / f"{kind}-{name}" for name in ("tokens", "labels", "index")},
            config=InstructionsSection(sequence_length=32, packed=packed),
            eos_token_id=0,
            pad_token_id=1,
        )


def make_token_bytes(stage: Stage, root: Path) -> None:
    import numpy as np
    import polars
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer(root)))
    ids = [[*encoder.encode(line["text"].strip()).ids, 0] for line in LINES]
    np.concatenate(ids).astype(np.uint16).tofile(root / "tokens")
    ends = np.cumsum([len(one) for one in ids])
    rows = {"start": [0, *ends[:-1]], "end": ends, "id": [line["id"] for line in LINES]}
    polars.DataFrame(rows).write_parquet(root / "index")
    given = {name: root / name for name in ("tokens", "index")}
    stage.build(
        documents=source(root),
        tokenizer=root / "given.json",
        token_bytes=root / "outputs",
        **given,
    )


def make_checkpoint(stage: Stage, folder: Path) -> None:
    import numpy as np
    import torch

    from olmo.checkpoint.final import write_safetensors

    rng = np.random.default_rng(0)
    weights = {n: torch.from_numpy(rng.random((3, 4), np.float32)) for n in ("b.weight", "a")}
    (folder / "given").mkdir()
    write_safetensors(folder / "given", weights, {})
    (folder / "given/optim.safetensors").unlink()
    files = [folder / "given/model.safetensors"]
    stage.build(files=files, checkpoint=folder / "outputs", folder=folder / "given")


def make_soup(stage: Stage, root: Path) -> None:
    import torch

    from olmo.checkpoint.final import write_safetensors

    finals = [root / name for name in ("one", "other", "third")]
    for number, final in enumerate(finals):
        final.mkdir()
        (final / "config.yaml").write_text("model: {d_model: 8, n_heads: 2}\n")
        weights = {"w": torch.arange(12.0).reshape(3, 4) / (number + 3)}
        write_safetensors(final, weights, {})
    stage.build(
        weights=[final / "model.safetensors" for final in finals],
        config=finals[0] / "config.yaml",
        final=root / "outputs",
        checkpoints=finals,
    )


def order(folder: Path) -> Path:
    from olmo.data.order import global_indices, write

    write(global_indices(1000, seed=6198), folder / "order.npy")
    return folder / "order.npy"


def library(folder: Path, files: dict[str, str] = LIBRARY) -> Path:
    for name, text in files.items():
        (folder / "library" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "library" / name).write_text(text)
    return folder / "library"


def make_docstrings(stage: Stage, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(library(folder, DOCUMENTED)))
        stage.build(folder=folder / "outputs", questions=5)


def make_stdlib(stage: Stage, folder: Path) -> None:
    """The library is a small one, and Python's version, which each document names, a fixed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(library(folder)))
        patch.setattr("platform.python_version", lambda: "3.11.7")
        stage.build(folder=folder / "outputs", shards=2)


def make_questions(stage: Stage, folder: Path) -> None:
    modules = {"alpha": "one", "beta": "two", "gamma": "three"}
    text = '"""About {0}."""\n\n\nclass {1}:\n    """A {1}.\n\n    Long."""\n\n'
    text += '    def m(self):\n        "M"\n'
    (folder / "library").mkdir()
    for name, inner in modules.items():
        (folder / f"library/{name}.py").write_text(text.format(name, inner))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(folder / "library"))
        stage.build(folder=folder / "outputs", shards=2)


DIGESTS = ("document_digests", "line_digests", "near_digests", "line_starts")


def make_digests(stage: Stage, root: Path) -> None:
    """Of documents with copies, of each other and of a held-out one, and of lines."""
    documents = root / "documents.gz"
    with gzip.GzipFile(documents, "wb", mtime=0) as file:
        for i, text in enumerate(["x\ny", "a\n \nb\n", "x\ny", "b\nß\nx", LINES[0]["text"]]):
            file.write(json.dumps({"id": str(i), "text": text}).encode() + b"\n")
    stage.build(
        documents=documents,
        overlaps=[],
        exact=True,
        paragraphs=True,
        **signature_options(NearSection(ngram=1, bands=2, rows=2)),
        **{name: folder(root) / name for name in DIGESTS},
    )


def make_copies(stage: Stage, root: Path) -> None:
    make_digests(stages()["digests"], root)
    held = root / "held"
    stages()["heldout_digests"].build(heldout=[source(root)], heldout_digests=held)
    found = folder(root) / "document_digests"
    stage.build(document_digests=found, heldout=[held], copies=folder(root) / "copies")


def make_duplicates(stage: Stage, root: Path) -> None:
    make_copies(stages()["copies"], root)
    given = {name: [folder(root) / name] for name in (*DIGESTS, "copies")}
    made = {name: folder(root) / name for name in OUTPUTS}
    stage.build(**given, **made, names=["s"], part=1, parts=2)


def make_clusters(stage: Stage, root: Path) -> None:
    make_duplicates(stages()["duplicates"], root)
    stage.build(near_pairs=[folder(root) / "near_pairs"], near=folder(root) / "near")


def make_places(stage: Stage, root: Path) -> None:
    make_clusters(stages()["clusters"], root)
    names = ("shards", "document_repeats", "line_repeats", "near")
    given = {name: [folder(root) / name] for name in names}
    stage.build(**given, places=folder(root) / "places", shard="s")


def make_quality(stage: Stage, root: Path) -> None:
    name = "c4_v2__c4_v2__has_curly_brace"
    with gzip.GzipFile(root / "tags.gz", "wb", mtime=0) as file:
        for i, spans in enumerate([[], [[0, 1, 1.0]], [[0, 1, 1.0], [2, 3, 0.5]]]):
            tags = {name: spans, "c4_v2__c4_v2__line_count": [[0, 9, float(i)]]}
            file.write(json.dumps({"id": str(i), "attributes": tags}).encode() + b"\n")
    keep = (f"sum({name}) <= 1", "c4_v2__c4_v2__line_count > 0")
    made = {"quality": folder(root) / "quality", "values": folder(root) / "values"}
    stage.build(tags=root / "tags.gz", taggers=("c4_v2",), keep=keep, **made)


def make_marks(stage: Stage, root: Path) -> None:
    import polars

    make_places(stages()["places"], root)
    rows = {"id": list("01234"), "split": ["train"] * 5, "row": [1, 2, 3, 4, 5]}
    polars.DataFrame(rows).write_parquet(root / "table")
    stage.build(
        documents=root / "documents.gz",
        table=root / "table",
        overlaps=[],
        copies=[folder(root) / "copies"],
        places=[folder(root) / "places"],
        marks=folder(root) / "marks",
    )


MAKE: dict[str, Callable[[Stage, Path], object]] = {
    "stdlib": make_stdlib,
    "stdlib_docstrings": make_docstrings,
    "stdlib_questions": make_questions,
    "local_conversations": lambda s, d: s.build(file=talks(d), source=d / "outputs"),
    "instances": make_instances,
    "token_bytes": make_token_bytes,
    "local_checkpoint": make_checkpoint,
    "averaged": make_soup,
    "converted": make_converted,
    "local_source": lambda s, d: s.build(file=source(d), source=d / "outputs"),
    "documents": lambda s, d: s.build(
        source=source(d),
        documents=folder(d) / "documents",
        heldout=folder(d) / "heldout",
        table=folder(d) / "table",
        name="source.json.gz",
        config=DocumentsSection(keep_one_in=2, heldout_share=0.1),
    ),
    "trained_tokenizer": lambda s, d: s.build(
        documents=[source(d)], tokenizer=d / "outputs", vocab_size=300
    ),
    "local_tokenizer": lambda s, d: s.build(source=tokenizer(d), tokenizer=d / "outputs"),
    "global_order": lambda s, d: s.build(order=d / "outputs", instances=1000, seed=6198),
    "mixture_order": lambda s, d: s.build(
        order=d / "outputs",
        spans=[[300, 0], [700, 1]],
        weights=["a=1", "*=3"],
        temperature=2.0,
        instances=2000,
        seed=6198,
        from_step=5,
        before=order(d),
    ),
    "skipped": lambda s, d: s.build(
        order=order(d),
        **{name: folder(d) / name for name in ("remaining", "holes")},
        spans=[[100, 700]],
        steps=[[5, 6]],
        sequence_length=64,
        batch_size=8,
    ),
    "text_index": lambda s, d: s.build(
        documents=source(d), **{name: folder(d) / name for name in ("grams", "blocks")}
    ),
    "positions": lambda s, d: s.build(order=order(d), positions=d / "outputs"),
    "heldout_digests": lambda s, d: s.build(heldout=[source(d)], heldout_digests=d / "outputs"),
    "digests": make_digests,
    "duplicates": make_duplicates,
    "copies": make_copies,
    "clusters": make_clusters,
    "places": make_places,
    "marks": make_marks,
    "quality": make_quality,
    "local_tokens": lambda s, d: s.build(file=order(d), tokens=d / "outputs", dtype="uint32"),
}


def folder(root: Path) -> Path:
    (root / "outputs").mkdir(exist_ok=True)
    return root / "outputs"


def stages() -> dict[str, Stage]:
    found = {}
    for module in pkgutil.walk_packages(olmo.__path__, "olmo."):
        if not module.name.endswith(("__main__", "bench.peer")):  # a script for a peer's Python
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, Stage):
                    found[value.name] = value
    return found


def made(name: str, root: Path) -> dict:
    stage = stages()[name]
    MAKE[name](stage, root)
    outputs = root / "outputs"
    files = [outputs] if outputs.is_file() else sorted(p for p in outputs.rglob("*") if p.is_file())
    digest = content({str(f.relative_to(root)): {"sha256": digest_of(f)} for f in files})
    return {"version": stage.version, "content": digest}


def digest_of(file: Path) -> str:
    """Of a gz file, its lines: isal compresses otherwise on ARM than on x86-64."""
    content = file.read_bytes()
    return hashlib.sha256(
        gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    ).hexdigest()


def test_every_stage_is_held():
    assert stages().keys() == MAKE.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", [*MAKE, *ELSEWHERE])
def test_what_is_compressed_is_told_with_the_machine(name: str):
    """Else ARM's bytes beside x86-64's raise the alarm of one action with two contents."""
    stage = stages()[name]
    writes = "gz.writing(" in Path(inspect.getfile(stage.build)).read_text()
    writes |= "write_marks(" in inspect.getsource(stage.build)
    assert (stage.conditions is gz.conditions) == writes


@pytest.mark.parametrize("name", MAKE)
def test_bytes_change_only_with_the_version(name: str, tmp_path: Path):
    assert made(name, tmp_path) == json.loads(GOLDEN.read_text())[name], (
        f"the stage {name} gives other bytes than its version says; see the top of {__file__}"
    )


if __name__ == "__main__":
    golden = {}
    for name in MAKE:
        with tempfile.TemporaryDirectory() as root:
            golden[name] = made(name, Path(root))
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    sys.exit(0)

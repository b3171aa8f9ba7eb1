"""Near duplicates: recall by how much of a document was edited, and precision, beside datatrove's.

    python bench/near.py [--documents 5000] [--datatrove PYTHON]

Documents are passages of the Python's standard library, which have near copies of their own. To
each third a copy is added, in which a share of the words are others. Recall is the share of copies
that go, or whose origin goes. Precision: of the pairs of a document that went and the one most like
it that stayed, how many share at least half of their n-grams (Jaccard, computed exactly). Both
programs get the same documents and parameters; CPU seconds are those of the whole program.
"""

import gzip
import json
import random
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from string import ascii_lowercase

from olmo.bench.script import cpu_time, describe_run, parse_options
from olmo.corpus.dedupe import NEAR, NearSection, read_marks
from olmo.corpus.digests import WORD, copies, digests, read_texts, signature_options
from olmo.corpus.documents import documents
from olmo.corpus.duplicates import OUTPUTS, clusters, duplicates, places
from olmo.corpus.marks import marks
from olmo.corpus.stdlib import stdlib

SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)  # of the words of a copy that are others
WORDS = 200  # of a passage


def main() -> None:
    options = parse_options(
        __doc__, documents=5000, datatrove={"type": Path, "default": None, "help": "its Python"}
    )
    near = NearSection()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = make_texts(root, options.documents)
        lines = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
        (root / "in").mkdir()
        (root / "in/all.jsonl").write_text("\n".join(lines) + "\n")
        print(describe_run(f"{len(texts):,} documents, {near}"))
        print(f"{'':10} {'CPU-s':>6} {'gone':>6} {'precision':>9}  recall at {SHARES} of the words")
        before = cpu_time()
        gone = ours(root, lines, near)
        report("olmo", cpu_time() - before, gone, texts, near)
        if options.datatrove:
            gone, seconds = theirs(root, options.datatrove, texts, near)
            report("datatrove", seconds, gone, texts, near)


def make_texts(root: Path, count: int) -> dict[str, str]:
    """Passages, and after them the edited copies: "SHARE of ID"."""
    stdlib.build(folder=root / "stdlib", shards=1)
    chance = random.Random(0)
    passages: list[str] = []
    for text in read_texts(root / "stdlib/stdlib-00.json.gz"):
        words = text.decode().split()
        starts = range(0, len(words) - WORDS, WORDS)
        passages += [" ".join(words[start : start + WORDS]) for start in starts]
    chance.shuffle(passages)
    found = {str(number): text for number, text in enumerate(passages[:count])}
    for number in range(0, len(found), 3):
        share = SHARES[number // 3 % len(SHARES)]
        found[f"{share} of {number}"] = edit(found[str(number)], share, chance)
    return found


def edit(text: str, share: float, chance: random.Random) -> str:
    words = text.split()
    for at in chance.sample(range(len(words)), round(share * len(words))):
        words[at] = "".join(chance.choices(ascii_lowercase, k=9))
    return " ".join(words)


def ours(root: Path, lines: list[str], near: NearSection) -> set[str]:
    """The ids of what goes."""
    source = root / "source.gz"
    source.write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {name: root / name for name in ("documents", "heldout", "table")}
    documents.build(source=source, name="source", **made)
    names = ("document_digests", "line_digests", "near_digests", "line_starts")
    given = {"documents": made["documents"], "overlaps": []}
    outputs = {name: root / name for name in names}
    digests.build(**given, **signature_options(near), **outputs)
    copies.build(document_digests=root / names[0], heldout=[], copies=root / "copies")
    duplicates.build(
        **{name: [root / name] for name in (*names, "copies")},
        **{name: root / name for name in OUTPUTS},
        names=["all"],
        part=0,
        parts=1,
    )
    clusters.build(near_pairs=[root / "near_pairs"], near=root / "near")
    found = {name: [root / name] for name in ("shards", "document_repeats", "line_repeats", "near")}
    places.build(**found, places=root / "places", shard="all")
    found = {"copies": [root / "copies"], "places": [root / "places"]}
    marks.build(**given, **found, table=made["table"], marks=root / "marks")
    ids = [json.loads(line)["id"] for line in lines]
    marked = zip(ids, read_marks(root / "marks"), strict=True)
    return {name for name, spans in marked if NEAR in spans}


def theirs(
    root: Path, python: Path, texts: dict[str, str], near: NearSection
) -> tuple[set[str], float]:
    """The ids of what goes, and the CPU seconds."""
    script = Path(__file__).with_name("near_datatrove.py")
    numbers = [str(number) for number in (near.ngram, near.bands, near.rows)]
    command = [python, script, root / "in", root / "out", *numbers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kept = [json.loads(line)["id"] for p in root.glob("out/kept/*") for line in p.open()]
    return set(texts) - set(kept), float(done.stdout.splitlines()[-1])


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def report(
    name: str, seconds: float, gone: set[str], texts: dict[str, str], near: NearSection
) -> None:
    kept = {one: grams(text, near.ngram) for one, text in texts.items() if one not in gone}
    holders = defaultdict(list)
    for one, found in kept.items():
        for gram in found:
            holders[gram].append(one)
    right = 0
    for one in gone:
        own = grams(texts[one], near.ngram)
        shared: dict[str, int] = defaultdict(int)
        for gram in own:
            for other in holders.get(gram, ()):
                shared[other] += 1
        most = max((n / len(own | kept[other]) for other, n in shared.items()), default=0.0)
        right += most >= 0.5
    recalls = []
    for share in SHARES:
        pairs = [(copy, copy.split()[-1]) for copy in texts if copy.startswith(f"{share} of ")]
        recalls.append(sum(bool(gone & set(pair)) for pair in pairs) / len(pairs))
    shown = " ".join(f"{recall:6.3f}" for recall in recalls)
    precision = right / len(gone) if gone else 1.0
    print(f"{name:10} {seconds:6.1f} {len(gone):6,} {precision:9.4f}  {shown}", flush=True)


if __name__ == "__main__":
    main()

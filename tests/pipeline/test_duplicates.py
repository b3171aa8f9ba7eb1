"""A recipe that takes out duplicates and overlaps, by the real Snakefile: what is planted goes."""

import contextlib
import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import polars
import pytest
from project import Project, read_source, write_source

from olmo.corpus.documents import is_held_out
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.inspect.documents import find_token_shards
from olmo.store.store import Store

pytestmark = pytest.mark.slow
HELDOUT_SHARE = 0.1


def text(chance: random.Random, lines: int = 4) -> str:
    """Lines of 16 words that nothing else has."""
    return "\n".join(
        " ".join(f"{chance.randrange(10**5):x}" for _ in range(16)) for _ in range(lines)
    )


def named(prefix: str, held: bool) -> str:
    """An id that is held out, or one that is not."""
    names = (f"{prefix}-{number}" for number in range(1000))
    return next(name for name in names if is_held_out(name, HELDOUT_SHARE) == held)


def words(text: str, start: int, count: int) -> str:
    return " ".join(text.split()[start : start + count])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A project with three files and an evaluation set; what is to be left of their documents."""
    project = Project(tmp_path_factory.mktemp("dedupe") / "project")
    chance = random.Random(0)
    files = [
        {named(f"{part}-{number}", held=number % 10 == 0): text(chance) for number in range(40)}
        for part in range(3)
    ]
    quiz = text(chance, 1)
    train, held = (
        [name for name in files[0] if is_held_out(name, HELDOUT_SHARE) == side]
        for side in (False, True)
    )
    later_held = next(name for name in files[2] if is_held_out(name, HELDOUT_SHARE))
    own, line = text(chance, 1), files[0][train[3]].split("\n")[2]
    plants = {
        "copy": (1, files[0][train[0]], "duplicate"),
        "copy of held out": (1, files[2][later_held], "overlap"),
        "asks": (2, f"{own}\nso: {words(quiz, 2, 13)}?", "overlap"),
        "twelve": (2, f"so: {words(quiz, 2, 12)}?", None),
        "quotes held out": (2, f"it said {words(files[0][held[0]], 0, 13)}", "overlap"),
        "lines only": (2, f"{line}\n\n{line}\n", "duplicate-paragraph"),
        "a line": (1, f"before {quiz[:5]}\n{line}\nand after", None),
        # Its own line was in a document that went.
        "after one that went": (2, f"{own}\nand then", None),
    }
    expected = {n: t for file in files for n, t in file.items()}
    for name, (file, content, reason) in plants.items():
        identity = named(name, held=False)
        files[file][identity] = content
        if reason is None:
            expected[identity] = content.replace(line + "\n", "")
    files[2][named("held, asks", held=True)] = quiz
    expected = {n: t for n, t in expected.items() if not is_held_out(n, HELDOUT_SHARE)}
    reasons = {named(n, held=False): reason for n, (_, _, reason) in plants.items() if reason}

    for part, file in enumerate(files):
        lines = [{"id": name, "text": content} for name, content in file.items()]
        write_source(project.root / f"sources/part-{part}.json.gz", lines)
    write_source(project.root / "quizzes/quiz.json.gz", [{"id": "q", "text": quiz}])
    tokenizer = project.root.parent / "tokenizer.json"
    sources = sorted((project.root / "sources").iterdir())
    trained_tokenizer.build(documents=sources, tokenizer=tokenizer, vocab_size=300)
    project.use_given_tokenizer(tokenizer)
    project.change(
        "config/data/small.yaml",
        documents={"heldout_share": HELDOUT_SHARE},
        dedupe={"exact": True, "paragraphs": True},
        decontaminate={"against": ["quizzes/*.json.gz"]},
    )
    project.run("data/small/statistics.txt")
    return project, files, expected, reasons


def data(project: Project) -> Path:
    return project.root / "data/small"


def test_exactly_what_was_planted_goes(planted):
    project, files, expected, reasons = planted
    left = {}
    for part, file in enumerate(files):
        kept = read_source(data(project) / f"mixed/part-{part}.json.gz")
        assert [d["id"] for d in kept] == [name for name in file if name in expected]
        left |= {document["id"]: document["text"] for document in kept}
        held = read_source(data(project) / f"heldout/part-{part}.json.gz")
        assert {d["id"]: d["text"] for d in held} == {
            name: content for name, content in file.items() if is_held_out(name, HELDOUT_SHARE)
        }
    assert left == expected
    tables = polars.concat(map(polars.read_parquet, sorted(data(project).glob("mixed/*.parquet"))))
    assert tables.height == sum(map(len, files)), "lines in = documents out + drops"
    dropped = tables.filter(split="dropped")
    assert dict(dropped.select("id", "reason").rows()) == reasons

    summary = polars.read_parquet(data(project) / "statistics.parquet").filter(file="in all")
    counted = {(s, r): n for s, r, n in summary.select("split", "reason", "documents").rows()}
    held = sum(is_held_out(name, HELDOUT_SHARE) for file in files for name in file)
    assert counted == {
        ("train", None): len(expected),
        ("heldout", None): held,
        ("cut", "duplicate-paragraph"): 1,
        **{("dropped", reason): n for reason, n in Counter(reasons.values()).items()},
    }
    assert "duplicate-paragraph" in (data(project) / "statistics.txt").read_text()


def test_the_way_back_is_that_of_the_documents(planted):
    project, *_ = planted
    known = find_token_shards(Store(project.store)).values()
    for file in ("part-0", "part-1", "part-2"):
        source = Store(project.store).digest(data(project) / f"sources/{file}.json.gz")
        own = [shard for shard in known if source in shard.sources]
        assert own and {d.source for shard in own for d in shard.documents()} == {f"{file}.json.gz"}


def same_sources(project: Project, root: Path) -> Project:
    """A project with the sources, recipe and tokenizer of another, where nothing is made yet."""
    other = Project(root)
    for name in ("sources", "quizzes"):
        for path in (project.root / name).iterdir():
            (other.root / name).mkdir(exist_ok=True)
            (other.root / name / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer.json", "config/data/small.yaml"):
        (other.root / name).write_bytes((project.root / name).read_bytes())
    return other


def check_equal(one: Project, two: Project, stages: tuple[str, ...]) -> None:
    for stage in stages:
        names = sorted(path.name for path in data(one).glob(f"{stage}/*.tsv"))
        assert names
        for name in names:
            texts = [(data(p) / stage / name).read_text() for p in (one, two)]
            assert texts[0] == texts[1], (stage, name)


def test_two_runs_give_equal_digests(planted, tmp_path):
    other = same_sources(planted[0], tmp_path / "other")
    other.run("data/small/statistics.txt", cores=1)
    check_equal(planted[0], other, ("digests", "duplicates", "mixed", "tokens"))


def test_three_parts_that_are_killed_give_the_same(planted, tmp_path):
    other = same_sources(planted[0], tmp_path / "killed")
    other.change("config/data/small.yaml", dedupe__parts=3)
    other.change("config/config.yaml", shards_per_job=1)
    kills = 0
    for seconds in (6, 7, 8, 9, 10):
        process = other.start("data/small/statistics.txt", mark="killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 1
    other.run("data/small/statistics.txt")
    parts = sorted(path.name for path in data(other).glob("duplicates/*.tsv"))
    assert parts == ["000.tsv", "001.tsv", "002.tsv"]
    for part in range(3):
        name = f"mixed/part-{part}.json.gz"
        assert (data(other) / name).read_bytes() == (data(planted[0]) / name).read_bytes()


def test_only_what_must_runs_again(planted, tmp_path):
    project = planted[0].copy(tmp_path / "again")
    target = "data/small/statistics.txt"
    assert not project.run(target).ran
    lines = read_source(project.root / "sources/part-2.json.gz")
    lines.append({"id": named("new", held=False), "text": text(random.Random(1))})
    write_source(project.root / "sources/part-2.json.gz", lines)
    ran = project.run(target).ran
    one = ("local_source", "documents", "overlaps", "digests", "duplicates", "marks", "mixed")
    one += ("copies", "statistics")
    assert ran == {**dict.fromkeys(one, 1), "tokens": 2}, "of one file, held-out ones too"
    # What was found and is gone is found again, and nothing is done after it.
    listing = data(project) / "duplicates/000.tsv"
    digest = listing.read_text().splitlines()[1].split("\t")[3]
    lost = project.store / "objects" / digest[:2] / digest
    lost.chmod(0o644)
    lost.unlink()
    assert project.run(target).ran == {"duplicates": 1}
    assert lost.exists()


def test_near_duplicates_go_and_are_counted(tmp_path):
    chance = random.Random(3)
    texts = [text(chance, lines=12) for _ in range(60)]
    near = [one.replace(one.split()[7], "other") for one in texts[:20]]
    project = Project(tmp_path / "project")
    for path in (project.root / "sources").iterdir():
        path.unlink()
    for name, part in (("a", texts), ("b", near + [text(chance) for _ in range(5)])):
        lines = [{"id": f"{name}-{i}", "text": content} for i, content in enumerate(part)]
        write_source(project.root / f"sources/{name}.json.gz", lines)
    project.change(
        "config/data/small.yaml",
        documents={},
        dedupe={"exact": True, "near": {"rows": 4}, "parts": 2},
    )
    project.change("config/config.yaml", shards_per_job=1)
    project.run("data/small/statistics.txt")
    table = polars.read_parquet(data(project) / "mixed/b.parquet")
    dropped = table.filter(split="dropped")
    assert set(dropped["id"]) == {f"b-{i}" for i in range(20)}
    assert set(dropped["reason"]) == {"near-duplicate"}
    assert "near-duplicate" in (data(project) / "statistics.txt").read_text()
    assert polars.read_parquet(data(project) / "mixed/a.parquet").filter(split="dropped").is_empty()

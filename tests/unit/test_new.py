"""`olmo new`: what a folder has is found, the numbers fit it, what cannot be is told at once."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import polars
import pyarrow
import pytest
import yaml
from project import documents

from olmo.pipeline import new as new_module
from olmo.pipeline import survey as survey_module
from olmo.pipeline.new import CONFIG, Choice, Machine, choose, format_recipe, new
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import Recipe
from olmo.pipeline.survey import Survey, survey

CPU = Machine("cpu", "2 CPU threads", 1e11)
GPU = Machine("cuda", "NVIDIA H200", 7e14)
TEXTS = [document["text"] for number in range(3) for document in documents(number)]
RECIPE = Path("config/data/mine.yaml")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a project, on a machine of which the speed is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_module, "measure_machine", lambda: CPU)
    Path("in").mkdir()
    CONFIG.parent.mkdir()
    CONFIG.write_text("# mine\nruns: # all\n  old: {train: a.yaml, dataset: old} # first\n")


def json_lines(**keys: str) -> bytes:
    """Rows with the texts under `text`, and other fields."""
    name = keys.pop("field", "text")
    rows = [{name: text, **keys, "n": n} for n, text in enumerate(TEXTS)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def frame(**columns: object) -> polars.DataFrame:
    return polars.DataFrame(columns)


def write(name: str, content: bytes) -> None:
    path = Path("in", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_texts() -> None:
    for number, text in enumerate(TEXTS):
        write(f"{number % 3}/{number}.txt", text.encode())


def write_csv() -> None:
    frame(title=["x"] * len(TEXTS), essay=TEXTS).write_csv("in/a.csv")


def write_parquet() -> None:
    frame(content=TEXTS, url=[f"u{n}" for n in range(len(TEXTS))]).write_parquet("in/a.parquet")


FOLDERS: dict[str, tuple[Callable[[], None], dict]] = {
    "txt": (write_texts, {"files": ["in/**/*.txt"]}),
    "jsonl": (lambda: write("a.jsonl", json_lines()), {"files": ["in/**/*.jsonl"]}),
    "zst": (
        lambda: write("a.jsonl.zst", pyarrow.compress(json_lines(), codec="zstd", asbytes=True)),
        {"files": ["in/**/*.jsonl.zst"]},
    ),
    "gz without ids": (
        lambda: write("a.json.gz", gzip.compress(json_lines())),
        {"files": ["in/**/*.json.gz"], "one_document_per": "row"},
    ),
    "csv": (write_csv, {"files": ["in/**/*.csv"], "text_field": "essay"}),
    "parquet": (
        write_parquet,
        {"files": ["in/**/*.parquet"], "text_field": "content", "id_field": "url"},
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_each_format_becomes_a_run(kind: str, capsys: pytest.CaptureFixture[str]):
    make, sources = FOLDERS[kind]
    make()
    new("mine", "in")
    assert yaml.safe_load(RECIPE.read_text())["sources"] == sources
    assert CONFIG.read_text().startswith("# mine\nruns: # all\n  mine:\n")
    assert CONFIG.read_text().endswith("  old: {train: a.yaml, dataset: old} # first\n")
    plan = Plan(yaml.safe_load(CONFIG.read_text()))
    assert plan.train_config("mine").model.vocab_size == 512
    assert sum(len(plan.local_files("mine", batch)) for batch in plan.batches("mine")) == (
        len(TEXTS) if kind == "txt" else 1
    )
    said = capsys.readouterr().out
    assert f"{len(TEXTS)} documents" in said
    assert said.endswith(
        f"  uv run snakemake --cores {new_module.count_cores()} checkpoints/mine/final\n"
    )
    with pytest.raises(
        ValueError, match=r"a new name, found config/data/mine.yaml, .*the run mine"
    ):
        new("mine", "in")


def test_folders_of_several_kinds():
    write_texts()
    write("b.md", b"# Title")
    write("c.jsonl.gz", gzip.compress(json_lines()))
    write("d.pdf", b"%PDF")
    write("e", b"")
    found = survey("in", RECIPE)
    assert found.patterns == ["in/**/*.jsonl.gz", "in/**/*.md", "in/**/*.txt"]
    assert found.left_out == {".pdf": 1, "no suffix": 1}
    assert (found.sources, found.documents, found.rows.one_document_per) == (2, 961, "row")


def test_what_is_left_out_is_told_by_file_and_row(capsys: pytest.CaptureFixture[str]):
    write_texts()
    write("0/of\ntwo.txt", b" ")  # a name of two lines
    write("0/picture.txt", b"\xff\xd8\xff\xe0")
    write("a.jsonl", b'{"text": "one"}\n{"text": 1}\n{"text": 2}\n')
    new("mine", "in")
    assert Recipe.load(RECIPE).documents.allow == ["empty-text", "not-utf8", "bad-text"]
    said = capsys.readouterr().out
    assert "left out: 2 × bad-text (in/a.jsonl:2 …)\n" in said
    assert "left out: 1 × empty-text ('in/0/of\\ntwo.txt:1')\n" in said
    assert "left out: 1 × not-utf8 (in/0/picture.txt:1)\n" in said


def text_of(count: int, sources: int = 1) -> Survey:
    """A folder of so many tokens of words, in documents of 20 words."""
    found = Survey(
        ["in/*"], sources, sources, survey_module.Counter(), survey_module.RowsSection(), True
    )
    sizes = [100] * (count * 5 // 100)
    found.documents, found.text_bytes = len(sizes), sum(sizes)
    for number, size in enumerate(sizes):
        found.bytes_read[str(number % sources)] += size
        for share in survey_module.HELDOUT_SHARES:
            if number % 100 < 100 * share:
                found.heldout[share][str(number % sources)] += size
    found.sample = [(0.5, text) for text in TEXTS[:100]]
    return found


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["CPU", "GPU"])
@pytest.mark.parametrize("tokens", [6_000, 50_000, 1_000_000, 30_000_000, 10_000_000_000])
def test_the_numbers_fit_text_and_machine(tokens: int, machine: Machine):
    found = text_of(min(tokens, 2_000_000))
    if tokens > 2_000_000:  # as if the rest had not been read
        found.is_whole, found.text_bytes = False, 5 * tokens
    choice = choose(found, machine, 0.2 if machine is CPU else 12)
    instance_bytes = choice.sequence_length * choice.bytes_per_token
    training, held_out = found.count_instances(choice.heldout_share, instance_bytes)
    assert choice.batch_size <= training and choice.tokens == training * choice.sequence_length
    assert held_out >= 4 or choice.heldout_share == 0
    assert choice.epochs <= new_module.MAX_EPOCHS + 0.01
    assert choice.steps >= (300 if choice.sequence_length > 64 else 20)
    assert choice.seconds <= 1.01 * 3600 * (0.2 if machine is CPU else 12)
    if tokens >= 1_000_000:
        assert choice.sequence_length == (256 if machine is CPU else 1024)
    assert choice.width % choice.heads == 0 and (choice.width // choice.heads) % 2 == 0


def comments(choice: Choice) -> dict[str, str]:
    """The comments of a training config, by key."""
    lines = new_module.format_train("mine", choice, CPU).splitlines()
    found = [line.partition(": ") for line in lines if "# " in line and ": " in line]
    return {key.strip(): value.partition("# ")[2] for key, _, value in found}


def test_comments_say_what_is_so():
    tiny, large = (choose(text_of(tokens), CPU, 0.2) for tokens in (6_000, 1_000_000))
    assert comments(tiny)["global_train_batch_size"] == "instances: 256 tokens a step"
    assert "some 300 steps or more" in comments(large)["global_train_batch_size"]
    assert large.steps >= 300 > tiny.steps
    found = text_of(6_000)
    found.rows.text_field = "content"
    assert 'content"\n' in format_recipe("mine", found, tiny)
    found.rows.text_field = "essay"
    assert 'essay" # the longest field\n' in format_recipe("mine", found, tiny)
    found.heldout = {share: survey_module.Counter() for share in survey_module.HELDOUT_SHARES}
    none = choose(found, CPU, 0.2)
    assert "heldout_share: 0.0 # too few documents" in format_recipe("mine", found, none)


def test_text_in_many_small_files_is_no_instance():
    """An instance has text of one source; text files are a source together, others one each."""
    assert choose(text_of(20_000, 10), CPU, 0.2).tokens > 10_000
    with pytest.raises(ValueError, match=r"at least some 2,000 tokens, found .*or join the files"):
        choose(text_of(20_000, 1000), CPU, 0.2)


def test_a_large_text_has_a_document_a_line(monkeypatch: pytest.MonkeyPatch):
    write("a.txt", "\n".join(TEXTS).encode())
    monkeypatch.setattr(survey_module, "MAX_DOCUMENT_BYTES", 1000)
    new("mine", "in")
    recipe = Recipe.load(RECIPE)
    assert recipe.sources.one_document_per == "line" and recipe.documents.allow == ["empty-text"]
    assert "one_document_per: line # a file has too much text for one\n" in RECIPE.read_text()


def test_many_files_of_rows_are_many_jobs(capsys: pytest.CaptureFixture[str]):
    half = json_lines()[: 1 << 13].rpartition(b"\n")[0]
    for number in range(202):
        write(f"{number}.jsonl", half)
    new("mine", "in")
    assert "  51 jobs a stage: join the files, or set a larger shards_per_job in config" in (
        capsys.readouterr().out
    )


def test_a_sample_speaks_for_a_large_folder(monkeypatch: pytest.MonkeyPatch):
    for number in range(20):
        write(f"{number}.jsonl", json_lines(field="text"))
    whole = survey("in", RECIPE)
    monkeypatch.setattr(survey_module, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(survey_module, "MAX_FILES", 7)
    part = survey("in", RECIPE)
    assert whole.is_whole and not part.is_whole
    assert part.documents == whole.documents and part.text_bytes == whole.text_bytes
    monkeypatch.setattr(survey_module, "MAX_FILE_BYTES", 1 << 14)
    assert 0.5 < survey("in", RECIPE).text_bytes / whole.text_bytes < 2


def only(name: str, content: bytes) -> Callable[[], None]:
    return lambda: write(name, content)


def write_numbers() -> None:
    frame(a=[1, 2], b=[0.5, 0.6]).write_parquet("in/a.parquet")


MISTAKES: list[tuple[Callable[[], None], str]] = [
    (lambda: None, "in: expected .txt, .*; found no file; put text there"),
    (only("a.pdf", b"%PDF"), r"in: expected .*; found 1 .pdf; put text there"),
    (only("a.txt", b"%PDF-1.4"), "in/a.txt: expected text, found PDF$"),
    (only("a.txt", b"\x7fELF\x02\x01\x01" + bytes(99) + b"\xff"), "in/a.txt:1: .*not UTF-8"),
    (
        only("a.txt", b""),
        "in/a.txt: expected rows, found none; remove it|in/a.txt:1: .*white space",
    ),
    (only("a.jsonl", b""), "in/a.jsonl: expected rows, found none; remove it"),
    (only("a.jsonl", b"no\nrows\n"), "in/a.jsonl: expected an object a line, found none"),
    (only("a.json", b'{\n  "text": "a"\n}\n'), "in/a.json: expected an object a line, found none"),
    (only("a.json", b'[{"text": "a"}]'), r"in/a.json: expected an object a line, .*json.load"),
    (only("a.csv", b"1,2\n3,4\n"), "in/a.csv: expected a header, found '1'; add a first line"),
    (only("a.csv", b"a,%s\n1,b\n" % (b"word " * 20)), "in/a.csv: expected a header, found 'word"),
    (only("a.csv", b"text\n"), "in/a.csv: expected a field of text, found no row$"),
    (only("a.csv", b"\n"), "in/a.csv: expected "),
    (only("a.csv", b'text\n"a" b\n'), "in/a.csv, line 2: expected csv in row 1, found: "),
    (write_numbers, "in/a.parquet: expected a field of text, found a, b$"),
    (only("a.parquet", b"PAR1" + bytes(60)), "in/a.parquet: damaged parquet: .*Download"),
    (only("a.jsonl.gz", gzip.compress(json_lines())[:-9]), "in/a.jsonl.gz: truncated: "),
    (
        only("a.jsonl.zst", pyarrow.compress(json_lines(), "zstd", asbytes=True)[:-9]),
        "damaged zstd",
    ),
    (
        lambda: Path("in/a.txt").symlink_to("b"),
        "in/a.txt: expected a file, found a link to nothing",
    ),
    (only("\udcff.txt", b"one"), r"expected a name in UTF-8, found 'in/\\udcff.txt'; rename it"),
    (only("{a}.txt", b"one"), r"in/\{a\}.txt: snakemake reads braces as wildcards; rename"),
    (
        only("a.txt", b"too little"),
        "at least some 2,000 tokens, found 10 bytes in 1 document of 1 file",
    ),
]


@pytest.mark.parametrize(("make", "said"), MISTAKES)
def test_what_cannot_become_a_run_is_one_sentence(make: Callable[[], None], said: str):
    make()
    before = CONFIG.read_text()
    with pytest.raises(ValueError, match=said) as refused:
        new("mine", "in")
    assert "\n" not in str(refused.value)
    assert CONFIG.read_text() == before and not RECIPE.exists()


@pytest.mark.parametrize(
    ("name", "folder", "hours", "said"),
    [
        ("mine", "nowhere", None, "nowhere: expected a folder of text, found nothing"),
        ("mine", "in/a.txt", None, "in/a.txt: expected a folder of text, found a file"),
        ("old", "in", None, "expected a new name, found the run old in config/config.yaml"),
        ("a/b", "in", None, "expected a name of letters, digits, dots and dashes, found 'a/b'"),
        ("1984", "in", None, "expected a name of letters, digits, dots and dashes, found '1984'"),
        ("no", "in", None, "expected a name of letters, digits, dots and dashes, found 'no'"),
        ("mine", "in", 0.0, "--hours: expected at least 0.01, found 0.0"),
    ],
)
def test_arguments_that_cannot_be(name: str, folder: str, hours: float | None, said: str):
    write("a.txt", "\n".join(TEXTS).encode())
    with pytest.raises(ValueError, match=said):
        new(name, folder, hours=hours)


def test_a_folder_that_is_no_project(tmp_path: Path):
    CONFIG.unlink()
    with pytest.raises(
        ValueError, match=f"expected {CONFIG} in {tmp_path}, found none; cd to the "
    ):
        new("mine", "in")


def test_a_folder_whose_name_is_a_pattern(capsys: pytest.CaptureFixture[str]):
    folder = Path("a[1]*b c/")
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(TEXTS))
    new("mine", str(folder))
    assert "held out: none, too few documents" in capsys.readouterr().out
    assert Plan(yaml.safe_load(CONFIG.read_text())).local_files("mine", "000") == [
        f"{folder}/a.txt"
    ]

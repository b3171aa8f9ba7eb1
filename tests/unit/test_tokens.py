"""Token shards by the real `dolma tokens`: every document in its place, or an error, no hang."""

import gzip
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import polars
import pytest
from tokenizers import Tokenizer

from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.dolma import Dolma, pinned_toolkit
from olmo.corpus.environments import pinned_version
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import tokens
from olmo.runtime.process import is_alive

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "envs" / "dolma.txt"
TOOLKIT = pinned_toolkit(REQUIREMENTS)
EOS = 0
TEXTS = [
    f"  def f_{n}(x):\n    return x ** {n}  # größer als {n} 字 \u2028\n" * (n % 7 + 1)
    for n in range(600)
]
IDS = [f"doc-{n}" for n in range(600)]
IDS[3], IDS[4], IDS[5] = 'a "quoted", id', "two\r\nlines\r\rand more\n", "ü\t\x00"


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A file of documents, its table and a tokenizer."""
    folder = tmp_path_factory.mktemp("shard")
    lines = [json.dumps({"id": i, "text": t}) for i, t in zip(IDS, TEXTS, strict=True)]
    made = make_documents(folder, lines, heldout_share=0.1)
    trained_tokenizer.build(
        documents=[made["documents"]], tokenizer=folder / "tokenizer.json", vocab_size=400
    )
    return {**made, "tokenizer": folder / "tokenizer.json"}


def make_documents(folder, lines, **parameters):
    source = folder / "source.gz"
    source.write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: folder / f"{kind}.out" for kind in ("documents", "heldout", "table")}
    documents.build(source=source, name="source.gz", config=DocumentsSection(**parameters), **made)
    return made


def tokenize(shard, folder, dolma, **parameters):
    """Runs the stage's function: its facts, the tokens, the table."""
    inputs = {name: shard[name] for name in ("documents", "table", "tokenizer")}
    facts = tokens.build(
        **{
            **inputs,
            "tokens": folder / "tokens.npy",
            "index": folder / "index.parquet",
            "eos_token_id": EOS,
            "pad_token_id": 1,
            "toolkit": dolma.toolkit,
            "engine": dolma,
            **parameters,
        }
    )
    array = np.fromfile(folder / "tokens.npy", dtype=facts["dtype"])
    assert sorted(p.name for p in folder.iterdir()) == ["index.parquet", "tokens.npy"]
    return facts, array, polars.read_parquet(folder / "index.parquet")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_document_is_in_order_and_ends_with_eos(shard, tmp_path, dolma, split):
    file = shard["documents" if split == "train" else "heldout"]
    facts, array, index = tokenize(shard, tmp_path, dolma, documents=file, split=split)
    kept = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    model = Tokenizer.from_file(str(shard["tokenizer"]))
    expected = [[*model.encode(doc["text"].strip()).ids, EOS] for doc in kept]
    assert array.tolist() == [id for ids in expected for id in ids]
    assert index.columns == ["start", "end", "id", "file", "line", "bytes"]
    assert index["id"].to_list() == [doc["id"] for doc in kept]
    assert index["end"].to_list() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert index["start"].to_list() == [0, *index["end"].to_list()[:-1]]
    assert [IDS[line - 1] for line in index["line"]] == index["id"].to_list()
    assert set(index["file"]) == {"source.gz"}
    assert facts["documents"] == len(kept) and facts["tokens"] == len(array)


def test_bytes_do_not_depend_on_the_run_or_on_the_toolkit_s_parts(shard, tmp_path, dolma):
    found = set()
    for name, most in ("whole", 2**30), ("again", 2**30), ("in parts", 3000):
        (tmp_path / name).mkdir()
        tokenize(shard, tmp_path / name, dolma, max_size=most)
        found.add(
            (tmp_path / name / "tokens.npy").read_bytes()
            + (tmp_path / name / "index.parquet").read_bytes()
        )
    assert len(found) == 1


def test_a_document_that_would_make_the_toolkit_loop_is_refused(shard, tmp_path):
    longest = max(len(text.encode()) for text in TEXTS)
    with pytest.raises(ValueError, match=r"source.gz:\d+: .*max_size=1,000 tokens; found"):
        tokenize(shard, tmp_path, Dolma(Path("never started"), TOOLKIT), max_size=1000)
    assert longest > 1000 // 3


def test_no_documents_are_an_empty_shard(shard, tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    made = make_documents(folder, [json.dumps({"id": "a", "text": "b"})])
    (tmp_path / "out").mkdir()
    facts, array, index = tokenize(
        {**shard, **made, "documents": made["heldout"]},
        tmp_path / "out",
        Dolma(Path("never started"), TOOLKIT),
        split="heldout",
    )
    assert len(array) == facts["documents"] == facts["tokens"] == index.height == 0
    assert index.columns == ["start", "end", "id", "file", "line", "bytes"]


def test_a_special_token_in_a_text_is_counted_and_warned_of(shard, tmp_path, dolma, capsys):
    folder = tmp_path / "documents"
    folder.mkdir()
    texts = ["before <|endoftext|> after", "<|padding|>", "ends so<|endoftext|>", "plain"]
    made = make_documents(folder, [json.dumps({"id": t, "text": t}) for t in texts])
    (tmp_path / "out").mkdir()
    facts, array, _ = tokenize({**shard, **made}, tmp_path / "out", dolma)
    assert facts["special_tokens_in_text"] == {"<|endoftext|>": 1, "<|padding|>": 1}
    assert np.count_nonzero(array == EOS) == 5
    assert "<|endoftext|> occurs 1 times in the text" in capsys.readouterr().err


def test_many_token_ids_are_written_as_uint32(shard, tmp_path, dolma):
    large = json.loads(shard["tokenizer"].read_text())
    large["model"]["vocab"] |= {f"word-{n}": n for n in range(400, 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(large))
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    _, small, _ = tokenize(shard, tmp_path / "small", dolma)
    facts, array, _ = tokenize(
        {**shard, "tokenizer": tmp_path / "large.json"}, tmp_path / "large", dolma
    )
    assert facts["dtype"] == "uint32" and array.tolist() == small.tolist()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [*lines[:100], b'{"id": "x"}', *lines[101:]], r"lost \(source.gz:\d+\)"),
        (lambda lines: lines[:-3], "3 lost"),
        (lambda lines: [*lines[:7], lines[8], lines[7], *lines[9:]], "2 lost .* 2 unexpected"),
        (lambda lines: [*lines, lines[0]], "0 lost .* 1 unexpected"),
        (lambda lines: [b"\xff" + lines[0], *lines[1:]], "found 0: "),
    ],
    ids=["no text", "missing", "swapped", "doubled", "not UTF-8"],
)
def test_what_the_toolkit_loses_silently_fails_the_stage(shard, tmp_path, dolma, damage, message):
    lines = gzip.decompress(shard["documents"].read_bytes()).splitlines()
    other = tmp_path / "other.gz"
    other.write_bytes(gzip.compress(b"\n".join(damage(lines)) + b"\n"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        tokenize({**shard, "documents": other}, tmp_path / "out", dolma)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".dolma")]


def test_a_truncated_file_of_documents_fails_the_stage(shard, tmp_path, dolma):
    other = tmp_path / "other.gz"
    other.write_bytes(shard["documents"].read_bytes()[:-5000])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"expected 5\d\d documents from the toolkit, found"):
        tokenize({**shard, "documents": other}, tmp_path / "out", dolma)


def test_another_version_of_the_toolkit_is_refused(shard, tmp_path, dolma):
    another_version = "dolma==9.9 tokenizers==0.19.1"
    expected = r"expected dolma==9.9 .*found dolma==1.2.1"
    with pytest.raises(ValueError, match=expected), Dolma(dolma.python, another_version) as another:
        tokenize(shard, tmp_path, another)


def test_the_toolkit_s_own_error_is_reported(shard, tmp_path, dolma):
    with pytest.raises(ValueError, match=r"the toolkit failed: .*separated"):
        tokenize(shard, tmp_path, dolma, eos_token_id=None)


def test_a_killed_toolkit_is_an_immediate_error_and_leaves_no_process(shard, tmp_path, python):
    with Dolma(python, TOOLKIT) as dolma:
        dolma.start()
        versions = dolma.read_reply(time.monotonic() + 60)
        assert versions["dolma"] == "1.2.1"
        pid = dolma.process.pid
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()  # while it imports dolma
        with pytest.raises(ChildProcessError, match=r"ended early \(killed by SIGKILL\)"):
            tokenize(shard, tmp_path, dolma)
    assert not is_alive(pid) and not list(tmp_path.iterdir())


def test_a_hanging_toolkit_is_killed_with_its_children(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\necho never mind >&2\nsleep 1000 & echo $! > pid; wait\n")
    program.chmod(0o755)
    expected = "exceeded its time limit; its output is above"
    with pytest.raises(ChildProcessError, match=expected), Dolma(program, TOOLKIT) as dolma:
        dolma.request("tokens", time_limit_s=0.5)
    assert "never mind" in capsys.readouterr().err
    child = (tmp_path / "pid").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True).stdout
    assert state[:1] in (b"", b"Z"), "gone, or dead and waiting for init"


def test_an_environment_of_other_versions_is_an_error_with_the_command_to_rebuild_it(tmp_path):
    program = tmp_path / "environments/dolma-0/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho \'{"dolma": "0.1", "tokenizers": "0.2"}\'; cat >&2\n')
    program.chmod(0o755)
    with Dolma(program, TOOLKIT) as dolma, pytest.raises(ValueError, match=r"of envs/dolma.txt"):
        dolma.request("tokens", time_limit_s=20)
    for made in ("environments/dolma-0/made-from.json", "environments/dolma.json"):
        (tmp_path / made).touch()
    with Dolma(program, TOOLKIT) as dolma, pytest.raises(ValueError, match="found dolma") as e:
        dolma.request("tokens", time_limit_s=20)
    command = str(e.value).partition("Build it again: ")[2].partition(", then")[0]
    subprocess.run(["bash", "-c", command], check=True)
    assert not list((tmp_path / "environments").iterdir()), "so the next run makes both"


def test_both_forms_of_the_environment_pin_the_same_versions():
    import yaml

    lines = REQUIREMENTS.read_text().splitlines()
    plain = [line for line in lines if line and not line.startswith("#")]
    conda = yaml.safe_load((ROOT / "envs" / "dolma.yaml").read_text())
    assert conda["dependencies"][-1] == {"pip": plain}
    assert all("==" in line for line in plain) and len(plain) > 50
    assert pinned_version(REQUIREMENTS, "dolma") == "1.2.1"

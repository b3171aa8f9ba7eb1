"""A function as a stage: what is in its identity, what is found again, what it tells."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars
import pytest

from olmo import cli
from olmo.commands import build_parser
from olmo.config import TrainConfig
from olmo.pipeline.workspace import format_failures, report_failures
from olmo.store import commands
from olmo.store.lease import lease
from olmo.store.lineage import diff_actions, explain, format_lineage
from olmo.store.stage import (
    Facts,
    Folder,
    Input,
    Inputs,
    Output,
    Unhashed,
    Work,
    current_store,
    stage,
)
from olmo.store.store import GC_LEASE

CALLS: list[dict] = []


@stage(version=1)
def join(
    parts: Inputs,
    joined: Output,
    glue: str = "",
    words: tuple[str, ...] = (),
    threads: Unhashed[int] = 1,
) -> Facts:
    """Join files."""
    CALLS.append({"threads": threads})
    joined.write_text(glue.join(part.read_text() for part in parts))
    return {"parts": len(parts)}


@stage(version=1)
def unpack(packed: Input, folder: Folder, attempt: Work, optional: Input | None = None) -> Facts:
    """Write a folder, in two attempts."""
    if not attempt.exists():
        attempt.mkdir()
        raise ValueError("cut off")
    folder.mkdir()
    (folder / "text").write_text(packed.read_text())
    return {"facts": {"n": 1}, "conditions": {"processes": 2}}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OLMO_STORE", raising=False)
    CALLS.clear()
    Path("a").write_text("A")
    Path("b").write_text("B")
    return tmp_path


def call(**changes):
    return join(**{"parts": [Path("a"), Path("b")], "joined": Path("out/joined"), **changes})


def test_what_changes_bytes_is_in_the_key_and_nothing_else():
    first = call()
    assert Path("out/joined").read_text() == "AB"
    same = [
        call(threads=8),
        call(joined=Path("elsewhere")),
        call(glue=""),
        call(words=()),
    ]
    assert {record["key"] for record in same} == {first["key"]} and len(CALLS) == 1
    Path("moved").write_text("A")
    assert call(parts=[Path("moved"), Path("b")])["key"] == first["key"]
    others = [call(glue="-"), call(words=("x",)), call(parts=[Path("b"), Path("a")])]
    assert len({record["key"] for record in others} | {first["key"]}) == 4


def test_a_parameter_at_its_default_is_not_in_the_action():
    assert call()["action"]["params"] == {}
    assert call(glue="-")["action"]["params"] == {"glue": "-"}


def test_an_input_in_the_store_is_known_by_its_link():
    call()
    record = join(parts=[Path("out/joined")], joined=Path("again"))
    assert record["action"]["inputs"]["parts"] == [Path("out/joined").resolve().name]


def test_a_missing_input_says_so():
    with pytest.raises(ValueError, match=r"expected a file at .*none, found nothing"):
        call(parts=[Path("none")])


def test_an_input_that_changes_while_it_is_read_fails_the_stage():
    @stage(version=1)
    def careless(source: Input, made: Output) -> Facts:
        made.write_text("x")
        source.write_text("changed meanwhile")
        return {}

    with pytest.raises(ValueError, match="changed while it was read"):
        careless(source=Path("a"), made=Path("made"))
    assert not Path("made").exists()


def test_a_failed_attempt_is_carried_on():
    with pytest.raises(ValueError, match="cut off"):
        unpack(packed=Path("a"), folder=Path("f"), attempt=Path("run"))
    assert Path("run").is_dir() and not Path("f").exists()
    record = unpack(packed=Path("a"), folder=Path("f"), attempt=Path("run"))
    assert Path("f/text").read_text() == "A"
    assert record["facts"] == {"n": 1} and record["conditions"] == {"processes": 2}
    assert json.loads(Path("f/record.json").read_text())["key"] == record["key"]


def test_the_record_tells_how_it_went():
    run = call()["run"]
    assert {"started", "wall_s", "cpu_s", "peak_memory_bytes", "host", "python", "commit"} <= set(
        run
    )
    assert run["peak_memory_bytes"] > 1e6


def test_a_second_run_tells_why(capsys: pytest.CaptureFixture[str]):
    call()
    call(glue="+")
    assert "params.glue: default → +" in capsys.readouterr().out


def test_differences_field_by_field():
    before = {"version": 1, "params": {"n": 1, "m": 2}, "inputs": {"parts": ["x", "y"]}}
    now = {"version": 1, "params": {"n": 3}, "inputs": {"parts": ["x", "z"]}}
    assert diff_actions(before, now) == [
        "inputs.parts: 1 of 2 changed",
        "params.m: 2 → default",
        "params.n: 1 → 3",
    ]


def test_the_way_back():
    call()
    join(parts=[Path("out/joined")], joined=Path("again"), glue="x")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    told = "\n".join(format_lineage(current_store(), Path("again")))
    lines = re.sub(r" \d\d:\d\d", "", told).splitlines()
    assert lines == [f"again  join, {today}  glue: x", f"  out/joined  join, {today}"]
    told = explain(current_store(), Path("again"))
    assert told[0].startswith("again  join, ") and told[1] == ""
    assert told[2].startswith("differs from out/joined  join, ")
    assert "  params.glue: default → x" in told
    assert "  parts: again" in told, "which has the same bytes as out/joined"
    told = explain(current_store(), Path("out/joined"))
    assert "  none" in told[told.index("version 1, parameters") :]
    assert not any(re.search(r"[0-9a-f]{32}", line) for line in told[:-1]), "hashes are last"


def test_the_command_line_comes_from_the_signature(monkeypatch: pytest.MonkeyPatch):
    line = "--parts a b --joined out/c --glue + --words x y --threads 3"
    words = line.split()
    arguments = vars(build_parser("join", join).parse_args(words))
    assert arguments == {
        "parts": [Path("a"), Path("b")],
        "joined": Path("out/c"),
        "glue": "+",
        "words": ["x", "y"],
        "threads": 3,
        "log": None,
    }
    monkeypatch.setitem(cli.commands(), "join", "test_stage:join")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    cli.main(["join", *words, "--log", "logs/join.log"])
    assert Path("out/c").read_text() == "A+B"
    assert "runs for the first time" in Path("logs/join.log").read_text()


def test_a_users_error_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    call()
    with pytest.raises(SystemExit) as ended:
        cli.main(["store", "why", "nowhere"])
    assert str(ended.value).startswith("olmo store why: expected a name that the store")


def test_a_store_that_is_elsewhere_is_not_called_sound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    call()
    cli.main(["store", "verify"])
    assert "all intact" in capsys.readouterr().out
    monkeypatch.setenv("OLMO_STORE", "elsewhere")
    for words in (["verify"], ["gc"], ["push", "second"], ["trace", "out"]):
        with pytest.raises(SystemExit, match=r"found no folder .*/elsewhere; cd to .*OLMO_STORE="):
            cli.main(["store", *words])
    assert not Path("elsewhere").exists()


def interrupted(*, wait: bool = True) -> None:
    """Say that it began, and wait for a signal."""
    print("began", flush=True)
    time.sleep(60)


def chatty(*, lines: int) -> None:
    """Say more than a reader wants."""
    for number in range(lines):
        print(number)


def olmo(command: str, *words: str) -> str:
    """A shell's command line of one of this file's functions as a command."""
    code = (
        f"import olmo.cli as c; c.commands()['{command}'] = 'test_stage:{command}'; "
        f"c.main({[command, *words]})"
    )
    return shlex.join([sys.executable, "-c", code])


def test_ctrl_c_is_one_line_and_no_failure():
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    running = subprocess.Popen(
        ["bash", "-c", "exec " + olmo("interrupted", "--log", "logs/it.log")],
        env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout and running.stdout.readline() == "began\n"
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "olmo interrupted: interrupted\n")
    assert Path("logs/it.log").read_text().startswith("failed: KeyboardInterrupt")
    assert not format_failures()
    Path("logs/other.log").write_text("failed: expected x\n")
    assert format_failures() == "\nWhat failed (1):\nlogs/other.log:\nexpected x"


def faulty(*, kind: str) -> None:
    """Fail in one way or another."""
    if kind == "ours":
        raise KeyError("outputs")
    if kind == "disk":
        raise OSError(28, "No space left on device", "/data/x")
    if kind == "table":
        polars.DataFrame({"x": [1]}).write_parquet("/dev/full")
    Path("/proc/nowhere").mkdir()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ours", "a bug in olmo, KeyError: 'outputs'; the traceback is in {log}"),
        (
            "disk",
            "/data/x: No space left on device: the disk is full; make room, then run the same "
            "command again",
        ),
        (
            "table",
            "parquet: File out of specification: underlying IO error: No space left on device (os "
            "error 28): the disk is full; make room, then run the same command again",
        ),
        (
            "place",
            "/proc/nowhere: No such file or directory, and none can be made there; name another "
            "place",
        ),
    ],
)
def test_a_failure_is_one_sentence_and_its_log_has_the_traceback(kind: str, said: str):
    place = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(cli.__file__).parents[1]}"}
    words = ["bash", "-c", olmo("faulty", "--kind", kind, "--log", "logs/it.log")]
    done = subprocess.run(words, env=place, capture_output=True, text=True)
    log = Path("logs/it.log")
    assert done.stderr == f"olmo faulty: {said.format(log=log.resolve())}\n"
    traceback, _, last = log.read_text().rpartition("\nfailed: ")
    assert traceback.startswith("Traceback (most recent") and "in faulty" in traceback
    assert last == f"{said.format(log=log.resolve())}\n"
    assert format_failures().endswith(last.strip()) and "Traceback" not in format_failures()


def test_a_job_that_left_no_word(capsys: pytest.CaptureFixture[str], monkeypatch):
    """Killed, or interrupted: what happens next is said, last."""
    told: list[str] = []
    monkeypatch.setattr("olmo.pipeline.workspace.print_at_exit", told.append)
    monkeypatch.setattr("sys.argv", ["/bin/snakemake", "--cores", "2", "a b"])
    monkeypatch.setenv("UV", "/bin/uv")
    report_failures()
    Path("logs").mkdir()
    Path("logs/it.log").write_text("failed: KeyboardInterrupt: \n")
    report_failures()
    assert [line.partition(";")[0] for line in told] == [
        "\nA job was killed (`dmesg` shows whether memory ran out)",
        "\nInterrupted",
    ]
    assert told[1].endswith("; this carries on:\nuv run snakemake --cores 2 'a b'")


@pytest.mark.parametrize("words", [("--lines", "9"), ("--lines", "99999"), ("--help",)])
def test_a_reader_that_leaves_early_hears_no_traceback(words: tuple[str, ...]):
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": ""}
    line = f"( {olmo('chatty', *words)}; echo $? >&2 ) | ( exec <&-; sleep 0 )"
    done = subprocess.run(["bash", "-c", line], env=place, capture_output=True, text=True)
    assert done.stderr == "1\n"


def test_help_says_what_each_does_and_imports_none(capsys: pytest.CaptureFixture[str]):
    cli.main(["--help"])
    text = capsys.readouterr().out
    for name, place in cli.commands().items():
        assert cli.command_summary(place) and f"\n  {name} " in text
    cli.main(["store", "--help"])
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if line.startswith("  store ")] == (
        ["trace", "why", "affected", "verify", "gc", "pin", "checkout", "push", "pull"]
    )
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("olmo ")
    with pytest.raises(SystemExit, match="usage: olmo <command>"):
        cli.main([])


# Commands whose --help, and whose refusals, should not wait for torch.
SWIFT = "check runs diff fork start soup inspect seen replay generate chat compare ladder scores"


def test_help_does_not_wait_for_torch():
    modules = {cli.commands()[name].split(":")[0] for name in SWIFT.split()}
    code = f"import sys, {', '.join(sorted(modules))}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "--run", "r", "--step", "1"],
        ["seen", "--run", "r", "--id", "1-0"],
        ["generate", "nobody", "--prompt", "x"],
    ],
)
def test_a_question_is_answered_without_torch(words: list[str], tmp_path: Path):
    """Its import takes longer than the answer."""
    np.arange(64, dtype=np.uint16).tofile("tokens.npy")
    Path("r").mkdir()
    cfg = TrainConfig.new(model={"max_sequence_length": 8, "vocab_size": 64})
    data = cfg.data.update_with(paths=["tokens.npy"])
    cfg.update_with(data=data, global_train_batch_size=2, max_duration=4).save("r/config.yaml")
    code = (
        f"import sys; from olmo import cli; sys.argv[1:] = {words}\n"
        "try: cli.main()\nexcept SystemExit as end: print(end)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr
    told = ("step 1, position 0", "is not known to the store", "trained runs here: none")
    assert any(part in done.stdout for part in told)


def begin(rest: str) -> subprocess.Popen[str]:
    """A process that asks for `join` of two files."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{rest}"
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


ASK = "from test_stage import *\njoin(parts=[Path('a'), Path('b')], joined=Path('out/joined'))"


def test_what_a_killed_process_made_and_did_not_name_is_kept_from_gc():
    killed = begin(
        "import os\nfrom olmo.store import naming\n"
        f"naming.link_output = lambda *_: os.abort()\n{ASK}"
    )
    assert killed.wait(60) == -signal.SIGABRT
    commands.gc()
    call()
    assert CALLS == [], "it is found, and made by nobody again"
    Path("out/joined").unlink()
    commands.gc()
    call()
    assert len(CALLS) == 1, "what had a name and lost it is gone"


def test_a_stage_waits_for_gc():
    store = current_store()
    with lease(store.root / "leases", GC_LEASE):
        asking = begin(ASK)
        assert asking.stdout is not None
        assert asking.stdout.readline() == "store: gc runs; waiting\n"
        assert asking.poll() is None and not Path("out").exists()
    assert asking.wait(60) == 0 and Path("out/joined").read_text() == "AB"
    asking.stdout.close()


def test_a_copied_store_whose_times_are_others(tmp_path: Path):
    call()
    target = Path("out/joined").resolve()
    os.utime(target)  # as cp -r leaves it
    join(parts=[Path("out/joined")], joined=Path("again"))
    assert Path("again").read_text() == "AB"


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ('{"keep_one_in": 0}', "documents.keep_one_in: expected at least 1, found 0"),
        ('{"keep_one": 2}', "keep_one: no such key in DocumentsSection; the nearest is"),
        ("[1]", "must be a mapping"),
        ("{", "Expecting property name"),
    ],
)
def test_a_section_that_is_wrong_is_told(
    section: str, reason: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        cli.main(["documents", "--sources", "a.tsv", "--listing", "b.tsv", "--config", section])
    assert reason in capsys.readouterr().err


def test_the_peak_memory_is_not_that_of_the_parent():
    ask = "from olmo.store.stage import peak_memory_bytes; print(peak_memory_bytes())"
    parent = (
        "import subprocess, sys; held = b'1' * 500_000_000;"
        f"sys.exit(subprocess.call([sys.executable, '-c', {ask!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, check=True)
    assert 10e6 < int(done.stdout) < 400e6

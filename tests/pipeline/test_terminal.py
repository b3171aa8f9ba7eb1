"""What a run shows: few lines, no hashes, plain ones in a file, and its error as the last one."""

import os
import re
import signal
import sys

from project import Project, run_in_terminal

IN_PROCESSES = True  # see conftest.py
HASH = re.compile(r"\b(?=[0-9]*[a-f])[0-9a-f]{8,}\b")
COLOR = re.compile(r"\x1b\[[0-9;]*m")
INSTALLERS_LINES = 14  # of uv, where it builds and installs everything first
TARGET = "data/small/documents/000.tsv"


def test_a_file_gets_few_plain_lines(project: Project):
    outcome = project.run()
    lines = outcome.output.splitlines()
    assert sum(1 + (len(line) - 1) // 80 for line in lines) <= 40 - INSTALLERS_LINES, outcome.output
    assert not HASH.search(outcome.output) and not re.search("[\x1b\r]", outcome.output)
    for said in (
        "documents      2/2 ",
        "train          1/1 ",
        "checkpoints/small/final is ready: 24 steps",
        "  device: cpu",
    ):
        assert sum(line.startswith(said) for line in lines) == 1, outcome.output
    assert "rule documents:" in project.full_log() and "olmo documents --" in project.full_log()
    assert "Finished jobid" in project.run(TARGET, "--force", "--verbose").output

    for name in ("data", "checkpoints", ".snakemake"):
        (project.root / name).rename(project.root / f"old-{name}")
    found = project.run("checkpoints/small/global_indices.npy").output
    (line,) = (line for line in found.splitlines() if line.startswith("found in the store: "))
    assert "3 documents" in line and ", global_order" in line and not HASH.search(found)


def test_the_sentence_of_what_failed_is_the_last_line(project: Project):
    source = project.root / "sources/part-1.json.gz"
    source.write_bytes(source.read_bytes()[:900])
    outcome = project.run(TARGET, ok=False)
    *_, log, sentence = outcome.output.splitlines()
    assert log == "logs/sources/small/000.log:"
    assert sentence.startswith("1 of 2 sources: sources/part-1.json.gz: truncated: 900 bytes")
    assert "Traceback" not in outcome.output and "CalledProcessError" not in outcome.output
    assert "Traceback" in (project.root / "logs/sources/small/000.log").read_text()


def test_a_terminal_gets_bars_and_no_colors_where_none_are_wanted(project: Project):
    (project.root / "sources/part-2.json.gz").unlink()
    words = [sys.executable, "-m", "snakemake", "data/small/tokenizer.json"]
    said = run_in_terminal(words, project.root, project.environment() | {"NO_COLOR": "1"})
    assert "░" in said and "tokenizer      1/1" in said
    assert not COLOR.search(said) and not HASH.search(said)
    assert "Provided cores" in (said := project.full_log())
    assert int(re.findall("Provided cores: (\\d+)", said)[0]) == os.cpu_count()


def test_ctrl_c_while_it_plans_names_the_command(project: Project):
    recipe = project.root / "config/data/small.yaml"
    recipe.unlink()
    os.mkfifo(recipe)  # the plan waits for who writes it
    process = project.start(TARGET)
    writer = os.open(recipe, os.O_WRONLY)
    os.kill(process.pid, signal.SIGINT)
    process.wait(60)
    os.close(writer)
    *_, said, command = project.outcome().output.splitlines()
    assert said == "Interrupted; this carries on:" and f" {TARGET} --cores 2" in command
    assert "Traceback" not in project.outcome().output


def test_the_targets_and_rules_can_be_found(project: Project):
    outcome = project.run("checkpoints/small", ok=False)
    assert outcome.output.splitlines()[-1] == (
        "no rule makes checkpoints/small; the target is checkpoints/small/final"
    )
    listed = project.run("--list").output.splitlines()
    rules = [line for line in listed if re.match(r"\w+ \(.*\)$", line)]
    assert len(rules) == len([line for line in listed if not line.startswith("Using")]) > 20

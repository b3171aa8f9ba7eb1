"""What users do wrong: each mistake ends with one sentence, whose remedy then works.

Each row breaks a copy of one finished project. The sentence is the last line on the screen. What it
tells to do is done, and the same command, or the one that it names, then succeeds.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from project import Project

from olmo.store.lease import lease

CONFIG, RECIPE, TRAIN = "config/config.yaml", "config/data/small.yaml", "config/train/small.yaml"
FINAL = "checkpoints/small/final"
DRY = f"snakemake -n {FINAL}"
SOURCES = "snakemake --cores 2 data/small/sources/000.tsv"
Change = Callable[[Project], object]


@dataclass
class Mistake:
    """A row of the table.

    Args:
        command: what the user typed.
        sentence: a regex of the last line.
        change: what the user did before.
        remedy: what the sentence tells to do; None: the configs are corrected.
        then: what is typed after it; None: the same command.
        folder: where the command is typed.
        store: $OLMO_STORE of the command.
        is_long: it takes many seconds.
    """

    name: str
    command: str
    sentence: str
    change: Change | None = None
    remedy: Change | None = None
    then: str | None = None
    folder: str = "."
    store: str | None = None
    is_long: bool = False


def put(path: str, text: str) -> Change:
    return lambda project: (project.root / path).write_text(text)


def edit(path: str, old: str, new: str) -> Change:
    def change(project: Project) -> None:
        file = project.root / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def sh(command: str) -> Change:
    return lambda project: subprocess.run(["bash", "-ec", command], cwd=project.root, check=True)


def table_of(url: str) -> Change:
    """A recipe with one file to download."""

    def change(project: Project) -> None:
        (project.root / "sources.tsv").write_text(f"url\tbytes\tsha256\n{url}\t\t\n")
        project.change(RECIPE, sources={"table": "sources.tsv"})

    return change


def keys(path: str, **values: object) -> Change:
    """`a__b=value` in a config."""
    return lambda project: project.change(path, **values)


def hold_the_folder(project: Project) -> None:
    """Another snakemake runs, as its lease says."""
    RUNNING.enter_context(lease(project.root / ".snakemake/leases", "running"))


RUNNING = ExitStack()


def append(path: str, text: str) -> Change:
    def change(project: Project) -> None:
        with (project.root / path).open("a") as file:
            file.write(text)

    return change


def in_config(name: str, sentence: str, change: Change, is_long: bool = False) -> Mistake:
    """A mistake in a config, as a dry run tells it."""
    return Mistake(name, DRY, sentence, change, then="olmo check", is_long=is_long)


EMPTY = "expected a mapping of keys, found an empty file; write `key: value`$"
MISTAKES = [
    # Names and targets.
    Mistake(
        "a misspelt run",
        "snakemake -n checkpoints/smal/final",
        "expected one of the runs small; found smal; the nearest is 'small'$",
        then=DRY,
    ),
    Mistake(
        "no target",
        "snakemake -n",
        "found olmo-tiny; ask for one, as in checkpoints/small/final, or add olmo-tiny to runs$",
        then=DRY,
    ),
    Mistake(
        "a target without final",
        "snakemake -n checkpoints/small",
        f"^no rule makes checkpoints/small; the target is {FINAL}$",
        then=DRY,
    ),
    Mistake(
        "a misspelt rule",
        "snakemake -n bench_los",
        "^no rule makes bench_los; the target is bench_loss$",
        then="snakemake -n bench_loss",
        is_long=True,
    ),
    Mistake(
        "a misspelt data set",
        "snakemake -n data/smal/statistics.txt",
        "^expected the recipe config/data/smal.yaml, found none; .* the nearest is 'small'$",
        then="snakemake -n data/small/statistics.txt",
        is_long=True,
    ),
    Mistake(
        "a misspelt run in a plan",
        "olmo plan checkpoints/smal/final",
        "^olmo plan: .* found smal; the nearest is 'small'$",
        then=f"olmo plan {FINAL}",
    ),
    Mistake(
        "a misspelt command",
        "olmo chek",
        "^unknown command 'chek'; the nearest: check; ",
        then="olmo check",
    ),
    Mistake(
        "a misspelt command of the store",
        "olmo store verfy",
        "^unknown command 'store verfy'; the nearest: store verify,",
        then="olmo store verify",
    ),
    Mistake(
        "a misspelt option",
        "olmo inspect --run small --stp 3 --step 3",
        "^olmo inspect: unknown option --stp; the nearest is --step; olmo inspect --help",
        then="olmo inspect --run small --step 3",
    ),
    Mistake(
        "an option that is like no other",
        "olmo seen --run small --document x",
        "^olmo seen: unknown option --document; olmo seen --help shows all options$",
        then="olmo seen --help",
    ),
    Mistake(
        "an argument left out",
        "olmo diff small",
        "^olmo diff: the following arguments are required: b; olmo diff --help",
        then="olmo diff small small",
    ),
    Mistake(
        "a misspelt run to compare with",
        "olmo diff small smal",
        "^olmo diff: expected a run .* found 'smal' .*; trained runs here: small$",
        then="olmo diff small small",
    ),
    Mistake(
        "a run that was not trained",
        "olmo inspect --run other --step 1",
        "^olmo inspect: .* train it: uv run snakemake --cores 2 checkpoints/other/final$",
        edit(CONFIG, "runs:", f"runs:\n  other: {{train: {TRAIN}, dataset: small}}"),
        lambda project: None,
        "snakemake -n --cores 2 checkpoints/other/final",
    ),
    Mistake(
        "a step beyond the last",
        "olmo inspect --run small --step 999",
        "^olmo inspect: expected a step from 1 to 6, found 999$",
        then="olmo inspect --run small --step 6",
    ),
    Mistake(
        "a path that the store did not make",
        "olmo store trace checkpoints/smal/final",
        f"^olmo store trace: expected a name .*/smal/final; the nearest is {FINAL}$",
        then=f"olmo store trace {FINAL}",
    ),
    Mistake(
        "a misspelt file",
        "olmo store checkout data/small/tokeniser.json",
        "^olmo store checkout: .*; the nearest is data/small/tokenizer.json$",
        then="olmo store checkout data/small/tokenizer.json",
    ),
    # Places.
    Mistake(
        "another folder",
        "olmo runs",
        "^olmo runs: expected config/config.yaml in .*/sources, found none; cd .*/project$",
        folder="sources",
    ),
    Mistake(
        "another folder, for a plan",
        "olmo plan",
        "^olmo plan: expected config/config.yaml in .*/sources, found none; cd .*/project$",
        folder="sources",
        then=f"olmo plan {FINAL}",
        is_long=True,
    ),
    Mistake(
        "a file where a folder belongs",
        DRY,
        "^expected the folder checkpoints, found a file; mv checkpoints checkpoints.old$",
        sh("rm -r checkpoints; touch checkpoints"),
        sh("mv checkpoints checkpoints.old"),
    ),
    Mistake(
        "a folder where a config belongs",
        DRY,
        f"runs.small.train names {TRAIN}, which is a folder .*; write the file, or name another$",
        sh(f"mv {TRAIN} train.yaml; mkdir {TRAIN}"),
        sh(f"rmdir {TRAIN}; mv train.yaml {TRAIN}"),
    ),
    Mistake(
        "no store there",
        "olmo store verify",
        "^olmo store verify: expected a store, found no folder /nowhere; .* OLMO_STORE=",
        store="/nowhere",
    ),
    Mistake(
        "a store that cannot be written",
        f"snakemake --cores 2 {FINAL}",
        "^the store /proc/nowhere cannot be written: .*; name one with OLMO_STORE=<folder>$",
        sh(f"rm -r {FINAL}"),
        store="/proc/nowhere",
        then=DRY,
    ),
    Mistake(
        "a push to an unwritable place",
        "olmo store push /proc/nowhere",
        "^olmo store push: /proc/nowhere: No such file or directory, .*; name another place$",
        then="olmo store push pushed",
    ),
    Mistake(
        "a push to a file",
        f"olmo store push {RECIPE}",
        "^olmo store push: .*small.yaml: File exists; name another place$",
        then="olmo store push pushed",
    ),
    Mistake(
        "a pull of what was not pushed",
        f"olmo store pull pushed {FINAL}",
        f"^olmo store pull: pushed: expected the name {FINAL}, .*: olmo store push pushed {FINAL}$",
        then=f"olmo store push pushed {FINAL}",
    ),
    # A folder of text.
    Mistake(
        "new from a folder that is not there",
        "olmo new mine soures",
        "^olmo new: soures: expected a folder of text, found nothing; correct the path$",
        then="olmo new mine sources",
    ),
    Mistake(
        "new from a file",
        "olmo new mine sources/part-0.json.gz",
        "^olmo new: sources/part-0.json.gz: expected a folder of text, found a file; name its fol",
        then="olmo new mine sources",
    ),
    Mistake(
        "new from PDFs",
        "olmo new mine papers",
        "^olmo new: papers: expected .txt, .* found 1 .pdf; put text there, or convert what is",
        sh("mkdir papers; touch papers/a.pdf"),
        sh("cp sources/* papers"),
    ),
    Mistake(
        "new with the name of another run",
        "olmo new small sources",
        "^olmo new: expected a new name, found .*; give another name$",
        then="olmo new mine sources",
    ),
    Mistake(
        "new with a name that is none",
        "olmo new 'my run' sources",
        "^olmo new: expected a name of letters, .* found 'my run'; give another one$",
        then="olmo new my-run sources",
    ),
    # Configs: corrected, `olmo check` finds nothing more.
    in_config("an empty config", f"^{CONFIG}: {EMPTY}", put(CONFIG, "")),
    in_config(
        "a list for a config",
        f"^{CONFIG}: expected a mapping .* a list",
        put(CONFIG, "- a"),
        is_long=True,
    ),
    in_config(
        "a binary config",
        f"^{CONFIG}: expected text in UTF-8, ",
        sh(f"gzip -c {RECIPE} > {CONFIG}"),
    ),
    in_config(
        "a tab",
        f"^{CONFIG} is not readable as YAML: .*tab.*line 6.*; correct it",
        append(CONFIG, "\tb: 1\n"),
        is_long=True,
    ),
    in_config(
        "a misspelt key", "run: no such key .* the nearest is 'runs'", edit(CONFIG, "runs:", "run:")
    ),
    in_config(
        "a path as a run",
        "runs.small: expected keys, as `train: …`, found 'a'$",
        keys(CONFIG, runs={"small": "a"}),
        is_long=True,
    ),
    in_config(
        "a missing training config",
        "small.train names none.yaml, which does not exist .*; write the file, or name another$",
        keys(CONFIG, runs__small__train="none.yaml"),
        is_long=True,
    ),
    in_config(
        "a missing recipe",
        "^expected the recipe config/data/smll.yaml, found none; .* the nearest is 'small'$",
        keys(CONFIG, runs__small__dataset="smll"),
        is_long=True,
    ),
    in_config(
        "a misspelt start",
        "runs.small.start_from: expected a run, .* found smal; the nearest is 'small'$",
        keys(CONFIG, runs__small__start_from="smal"),
        is_long=True,
    ),
    in_config("an empty training config", f"^{TRAIN}: {EMPTY}", put(TRAIN, "")),
    in_config("an empty recipe", f"^{RECIPE}: {EMPTY}", put(RECIPE, ""), is_long=True),
    in_config(
        "another vocabulary",
        f"^{TRAIN}: model.vocab_size is 500, .*; set model.vocab_size: 512",
        keys(TRAIN, model__vocab_size=500),
    ),
    in_config(
        "a smaller embedding",
        f"^{TRAIN}: model.embedding_size must be at least .* found 100",
        keys(TRAIN, model__embedding_size=100),
        is_long=True,
    ),
    in_config(
        "no batch",
        f"^{TRAIN}: global_train_batch_size: expected at least 1, found 0$",
        keys(TRAIN, global_train_batch_size=0),
    ),
    in_config(
        "a batch in words",
        f"^{TRAIN}: global_train_batch_size: expected a whole number, found 'eight'$",
        keys(TRAIN, global_train_batch_size="eight"),
        is_long=True,
    ),
    in_config(
        "a duration in words",
        f"^{TRAIN}: max_duration: expected steps .*, found '24steps'$",
        keys(TRAIN, max_duration="24steps"),
    ),
    in_config(
        "an unknown optimizer",
        f"^{TRAIN}: optimizer.name: expected one of lionw, adamw, muon, found 'adam'$",
        keys(TRAIN, optimizer__name="adam"),
        is_long=True,
    ),
    in_config(
        "heads that do not divide",
        f"^{TRAIN}: model.d_model must be a multiple of model.n_heads",
        keys(TRAIN, model__n_heads=5),
        is_long=True,
    ),
    in_config(
        "a share in percent",
        f"^{RECIPE}: documents.heldout_share: expected from 0 to below 1, found 10.0$",
        keys(RECIPE, documents__heldout_share=10),
        is_long=True,
    ),
    in_config(
        "sources that are not there",
        f"^{RECIPE}: sources.files names none/.*; put the file there or remove the line$",
        keys(RECIPE, sources__files=["none/*.gz"]),
    ),
    in_config(
        "a folder as a source",
        f"^{RECIPE}: sources.files: sources: expected files, found the folder sources; end ",
        keys(RECIPE, sources__files=["sources"]),
        is_long=True,
    ),
    in_config(
        "a missing tokenizer",
        f"^{RECIPE}: tokenizer.file names none.json, which does not exist .*; write the file",
        keys(RECIPE, tokenizer={"file": "none.json", "eos_token_id": 0, "pad_token_id": 1}),
    ),
    # While it runs.
    Mistake(
        "two at once",
        "snakemake --cores 2 data/small/statistics.txt",
        r"^another snakemake \(pid .*\) runs in .*; wait for it, or use another folder",
        hold_the_folder,
        lambda project: RUNNING.close(),
        DRY,
    ),
    Mistake(
        "an empty file",
        SOURCES,
        "part-0.json.gz: expected a gz .*, found an empty file. Replace the file, or remove it",
        sh("echo -n > sources/part-0.json.gz"),
        sh("rm sources/part-0.json.gz"),
        DRY,
    ),
    Mistake(
        "text that is named gz",
        SOURCES,
        "found plain text .* Name it as text with `mv .*gz .*txt`, and name that file in the reci",
        sh("echo one > sources/part-0.json.gz"),
        lambda project: (
            sh("mv sources/part-0.json.gz sources/part-0.json.txt")(project),
            project.change(RECIPE, sources__files=["sources/*.txt", "sources/*.gz"]),
        ),
        is_long=True,
    ),
    Mistake(
        "no network",
        "olmo store pull https://nowhere.invalid/store",
        "^olmo store pull: https://nowhere.invalid/.*: the connection failed: .*: see to the netw",
        sh("true"),
        then="olmo store push pushed",
    ),
    Mistake(
        "no network for a source",
        SOURCES,
        "nowhere.invalid/.*: the connection failed: .* then run the same command again$",
        table_of("https://nowhere.invalid/a.json.gz"),
        is_long=True,
    ),
    Mistake(
        "more in a batch than there is",
        f"snakemake --cores 2 {FINAL}",
        "^expected at least 100000 instances .*; use more documents .* or a smaller global_train_",
        keys(TRAIN, global_train_batch_size=100000),
        then=DRY,
        is_long=True,
    ),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose run is trained."""
    project = Project(tmp_path_factory.mktemp("finished") / "project")
    project.change(TRAIN, max_duration=6)
    project.change(RECIPE, tokens={"engine": "fast"})
    project.run()
    return project


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, id=m.name, marks=[pytest.mark.long] * m.is_long) for m in MISTAKES],
)
def test_a_mistake_ends_with_one_sentence_whose_remedy_works(
    finished: Project, tmp_path: Path, mistake: Mistake
):
    project = finished.copy(tmp_path / "project")
    if mistake.change:
        mistake.change(project)
    status, said = type_command(project, mistake.command, mistake.folder, mistake.store)
    assert status not in (0, None), said
    assert "Traceback" not in said
    last = said.rstrip().rpartition("\n")[2]
    assert re.search(mistake.sentence, last), said
    if mistake.remedy:
        mistake.remedy(project)
    else:
        shutil.copytree(finished.root / "config", project.root / "config", dirs_exist_ok=True)
    status, said = type_command(project, mistake.then or mistake.command)
    assert status == 0, said


def type_command(
    project: Project, command: str, folder: str = ".", store: str | None = None
) -> tuple[int, str]:
    """The exit status of a command line, and what was on the screen."""
    program, *words = shlex.split(command)
    module = {"olmo": "olmo.cli"}.get(program, program)
    environment = project.environment() | ({"OLMO_STORE": store} if store else {})
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=project.root / folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout

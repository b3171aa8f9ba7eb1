"""`olmo plan`: what a target needs, what of it is in the store, why the rest runs, and its cost.

Snakemake decides which jobs run. Each job's command is then called on a store that finds and never
makes (olmo.store.lookup), in a temporary folder: what is found there is a link, what is not is a
prediction of its size (olmo.pipeline.rates), and the next job reads both.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo.cluster.launch import Geometry
from olmo.commands import bind, load_command
from olmo.config import TrainConfig
from olmo.config.strict import hashed_fields
from olmo.pipeline.plan import Plan
from olmo.pipeline.rates import (
    DOWNLOADS,
    TRAINING,
    Range,
    Rates,
    attempt_bytes,
    checkpoint_files,
    main_bytes,
    trained_tokens,
)
from olmo.pipeline.sampling import Sample, why_no_sample
from olmo.report.runs import last_metrics
from olmo.runtime.log import log
from olmo.store import naming
from olmo.store.action import Action
from olmo.store.lineage import diff_actions
from olmo.store.lookup import FOUND, NEW, REBUILT, Lookup, LookupStore, Prediction
from olmo.store.record import output_files
from olmo.store.stage import looking_up
from olmo.store.store import Store

# Rules whose commands are no stages: they are not called for a plan.
NOT_STAGES = (
    *("environment", "bench_tps", "bench_loss", "eval", "quality_page", "certificate"),
    *("report", "report_index"),
)
NOTHING = Range()
# Stages whose outputs a sample tells → the amount that has their range.
SAMPLED = {"converted": "source_bytes", "documents": "documents_bytes", "tokens": "tokens"}
BYTES_PER_TOKEN = 2  # of uint16, which all but the largest vocabularies have


@dataclass(frozen=True)
class Job:
    """A job that snakemake would run."""

    rule: str
    command: str | None  # None: known after another job only
    outputs: list[str]

    @property
    def written(self) -> list[str]:
        """Everything that the job's command writes."""
        words = shlex.split(self.command or "")
        return self.outputs + [words[i + 1] for i, w in enumerate(words) if w == "--answers"]

    @property
    def place(self) -> str:
        """The job's outputs for people: the batches of a stage together."""
        path = Path(self.outputs[0] if self.outputs else self.rule)
        return str(path.parent if path.suffix == ".tsv" and path.stem.isdigit() else path)


@dataclass
class Row:
    """The jobs of one place, and what their stages' calls came to."""

    place: str
    jobs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    written: Range = NOTHING  # bytes
    downloaded: int = 0
    attempt: int = 0  # bytes of checkpoints while it is trained
    documents: Range = NOTHING
    tokens: Range = NOTHING  # that are made
    trained_tokens: int = 0
    seconds: Range = NOTHING
    is_time_known: bool = True
    gpus: int = 0

    @property
    def runs(self) -> int:
        return self.states[NEW] + self.states[REBUILT]


class Forecast:
    """The rows of a plan.

    Args:
        project: config/config.yaml and what it names.
        jobs: those that snakemake would run, each after the ones it needs.
        cores: how many jobs of one core run at once.
    """

    def __init__(self, project: Plan, jobs: list[Job], cores: int) -> None:
        self.project, self.cores = project, cores
        self.store = Store(Path(project.store))
        self.rows: dict[str, Row] = {}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "store").mkdir()
            # It reads records, too: the real store would put a damaged one into quarantine.
            self._lookups = LookupStore(self.store, root / "store", self._predict)
            self._samples: dict[str, Sample | None] = {}  # data set → what was found
            self._dataset = ""  # of the job that is looked at
            self.rates = Rates(self._lookups)
            self._project = root / "project"
            self._moved: dict[str, str] = {}  # path → where it is for the plan
            with looking_up(self._lookups):
                for job in jobs:
                    self._look(job)

    def _look(self, job: Job) -> None:
        """Call a job's command on the lookup store, and count what its stages were asked."""
        row = self.rows.setdefault(job.place, Row(job.place))
        row.jobs += 1
        parts = Path(job.place).parts
        self._dataset = parts[1] if parts[0] == "data" and len(parts) > 1 else ""
        if not job.command:
            self._count_unknown(job, row, "after the list of its files")
            return
        if job.rule == "source_list":
            self._count_listed(Path(job.outputs[0]).parent.name)
        self._moved |= {out: str(self._project / out) for out in job.written}
        before = len(self._lookups.lookups)
        is_complete = job.rule not in NOT_STAGES and self._call(job)
        calls = self._lookups.lookups[before:]
        for call in calls:
            self._count(call, row)
        if not is_complete and not any(call.state == NEW for call in calls):
            self._count_unknown(job, row, "new" if job.rule in NOT_STAGES else "other inputs")

    def _call(self, job: Job) -> bool:
        """Call a job's command; False if it needs more of another job than a prediction."""
        words = shlex.split(job.command or "")
        verb, words = words[words.index("olmo") + 1], words[words.index("olmo") + 2 :]
        for flag in ("--environment", "--log"):  # the first may have to be built; no log is wanted
            if flag in words:
                at = words.index(flag)
                del words[at : at + 2]
        if "<<<" in words:  # what a word "-" stands for
            at = words.index("<<<")
            words[words.index("-")] = words[at + 1]
            del words[at : at + 2]
        if "--table" in words:  # `olmo sources` completes it
            self._copy_for_plan(words[words.index("--table") + 1])
        words = [self._moved.get(word, word) for word in words]
        level = log.level
        log.setLevel(100)
        try:
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                _, call = bind(verb, load_command(verb), words)
                call()
        except (Exception, SystemExit):
            if not self._lookups.has_predictions:
                raise
            return False  # it read a predicted file, which can fail in any way
        finally:
            log.setLevel(level)
        return True

    @property
    def sample(self) -> Sample | None:
        """The sample of the data set that is looked at."""
        if self._dataset and self._dataset not in self._samples:
            self._samples[self._dataset] = Sample.find(self.project, self._dataset)
        return self._samples.get(self._dataset)

    def _predict(
        self,
        action: Action,
        names: Mapping[str, Path],
        arguments: Mapping[str, Any],
        size_of: Callable[[str], int],
    ) -> Prediction:
        """The sizes of an action's outputs: by the data set's sample, else by fixed rates."""
        found = self.rates.predict(action, names, arguments, size_of)
        if (sample := self.sample) is None or action.stage not in SAMPLED:
            return found
        read = main_bytes(action, size_of)
        share = self.project.recipe(self._dataset).documents.heldout_share
        sizes = {
            name: int(size) for name, size in sample.outputs(action.stage, read, share).items()
        }
        documents = int(sample.documents(read)) if action.stage == "documents" else 0
        facts = {"documents": documents} if documents else found.facts
        return Prediction({**found.outputs, **sizes}, facts)

    def _range(self, amount: str, number: float) -> Range:
        """A predicted number, with its range by the sample of the data set."""
        low, high = self.sample.spread(amount) if self.sample else (1.0, 1.0)
        return Range(number * low, number, number * high)

    def datasets_without_sample(self) -> list[str]:
        """Data sets of which sources are missing, and a sample could be made."""
        places = [Path(row.place) for row in self.rows.values() if row.runs]
        found = {p.parts[1]: None for p in places if p.match("data/*/sources")}
        found |= {p.parts[1]: None for p in places if p.match("data/*/sources.tsv")}
        asked = {p.parts[1] for p in places if p.match("data/*/sample.json")}
        return [
            dataset
            for dataset in found
            if dataset not in asked
            and why_no_sample(self.project, dataset) is None
            and Sample.find(self.project, dataset) is None
        ]

    def _copy_for_plan(self, table: str) -> None:
        place = self._project / table
        if table not in self._moved and Path(table).exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(table, place)
            self._moved[table] = str(place)

    def _count(self, call: Lookup, row: Row) -> None:
        row.states[call.state] += 1
        if call.state == FOUND:
            return
        size_of, action = self._lookups.size, call.action
        read = main_bytes(action, size_of)
        written = sum(file["size"] for file in output_files(call.record))
        row.reasons[self._reason(call)] += 1
        amount = SAMPLED.get(action.stage)
        row.written += self._range(amount, written) if amount else Range.exactly(written)
        row.downloaded += written if action.stage in DOWNLOADS else 0
        if action.stage == "documents":
            row.documents += self._range("documents", call.record["facts"].get("documents", 0))
        elif action.stage == "tokens":
            tokens = call.record["outputs"]["tokens"]["size"] // BYTES_PER_TOKEN
            row.tokens += self._range("tokens", tokens)
        if action.stage == TRAINING:
            cfg, geometry = call.arguments["cfg"], call.arguments["geometry"]
            attempt = self.store.root / "work" / action.key / "attempt"
            self._count_training(cfg, geometry, read, row, last_metrics(attempt / "metrics.jsonl"))
        else:
            self._add_time(row, self.rates.seconds(action, read, written))

    def _count_training(
        self, cfg: TrainConfig, geometry: Geometry, token_bytes: int, row: Row, reached: Any = None
    ) -> None:
        """Count a run's tokens and time; of one that was interrupted, from its last metrics on."""
        run = Path(row.place).parts[1]
        processes = geometry.processes * geometry.nodes
        on_gpus = bool(self.project.run(run).gpus_per_node)
        reached_tokens = (reached or {}).get("throughput/total_tokens", 0)
        left = max(0, trained_tokens(cfg, token_bytes) - reached_tokens)
        row.trained_tokens += left
        row.attempt += attempt_bytes(cfg, token_bytes)
        row.gpus = processes if on_gpus or self.rates.on_gpu else 0
        self._add_time(row, self.rates.training_seconds(cfg, processes, left, on_gpus))

    def _add_time(self, row: Row, seconds: Range | None) -> None:
        row.is_time_known &= seconds is not None
        row.seconds += seconds or Range()

    def _reason(self, call: Lookup) -> str:
        """Why an action runs: how it differs from the one that its names stood for."""
        if call.state == REBUILT:
            return "lost in the store"
        for path in call.names.values():
            inside = Path(path).absolute().relative_to(self._project)
            name = naming.find_name(self.store, inside, repair=False)
            if name and (known := self._lookups.record(name["key"])):
                return shorten_changes(diff_actions(known["action"], call.action.as_dict()))
        return "new"

    def _count_unknown(self, job: Job, row: Row, reason: str) -> None:
        """Count a job whose stages need more of the jobs before it than a prediction."""
        row.states[NEW] += 1
        row.reasons[reason] += 1
        if job.rule != "train":
            row.is_time_known = False
            return
        run = Path(row.place).parts[1]
        tokens = self.rows.get(f"data/{self.project.dataset(run)}/tokens", row)
        cfg, geometry = self.project.train_config(run), self.project.run(run).geometry
        self._count_training(cfg, geometry, int(tokens.written.middle), row)
        row.written += Range.exactly(sum(checkpoint_files(cfg).values()))

    def _count_listed(self, dataset: str) -> None:
        """The rows of a data set whose list is not here yet, by the size that its recipe gives."""
        recipe = self.project.recipe(dataset)
        read = recipe.sources.total_bytes
        for stage, section, toolkit in (
            ("download", {}, {}),
            ("documents", hashed_fields(recipe.documents), {}),
            ("tokens", {}, {"toolkit": recipe.tokens.engine}),
        ):
            folder = "sources" if stage == "download" else stage
            row = self.rows.setdefault(f"data/{dataset}/{folder}", Row(f"data/{dataset}/{folder}"))
            row.reasons["after the list of its files"] += 1
            row.states[NEW] += 1
            if read is None:
                row.is_time_known = False
                continue
            action = Action(stage, 1, {**section, **toolkit}, {"source": "all"})
            names = {name: Path(name) for name in (stage, "table", "index")}
            sizes = self.rates.predict(action, names, {}, {"all": read}.__getitem__).outputs
            written = {name: size for name, size in sizes.items() if isinstance(size, int)}
            made = sum(written.values()) if stage != "download" else read
            row.written = Range.exactly(made)
            row.downloaded = read if stage == "download" else 0
            self._add_time(row, self.rates.seconds(action, read, made))
            row.jobs = self.cores
            row.tokens = Range.exactly(written.get("tokens", 0) // BYTES_PER_TOKEN)
            read = written.get("documents", read)


def shorten_changes(changed: list[str]) -> str:
    """Changes of an action without digests; without inputs, if parameters changed, too.

    >>> shorten_changes(["inputs.source: 01ab… → 02cd…", "params.keep_one_in: 2 → 4"])
    'keep_one_in: 2 → 4'
    >>> shorten_changes(["inputs.documents: 01ab… → 02cd…", "inputs.table: 03ef… → 04ab…"])
    'other documents, table'
    """
    parts = [text.partition(": ") for text in changed]
    inputs = [name.partition(".")[2] for name, _, _ in parts if name.startswith("inputs.")]
    others = [
        f"{name.removeprefix('params.')}: {change}"
        for name, _, change in parts
        if not name.startswith("inputs.")
    ]
    return "; ".join(others) or "other " + ", ".join(inputs)

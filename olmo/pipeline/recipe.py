"""Schemas of config/config.yaml, of recipes (config/data) and of evaluations (config/eval)."""

import contextlib
import fnmatch
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo.certificate.settings import CertificateConfig
from olmo.cluster.launch import Geometry
from olmo.config import BaseConfig, TrainConfig
from olmo.config.conversion import Mistakes, each_mistake
from olmo.config.strict import check_range, non_default_fields
from olmo.corpus.dedupe import DecontaminateSection, DedupeSection
from olmo.corpus.documents import DocumentsSection
from olmo.corpus.instructions import InstructionsSection
from olmo.corpus.mixture import MixturePart
from olmo.corpus.quality import QualitySection
from olmo.corpus.skip import Skip, SkipRule
from olmo.corpus.sources import SourcesSection
from olmo.corpus.tokenizer import TokenizerSection
from olmo.corpus.tokens import TokensSection
from olmo.eval.questions import HARNESS, OURS
from olmo.pipeline.ladder import LadderConfig
from olmo.tokenizer import hub_name


@dataclass
class Recipe(BaseConfig):
    """A data set: config/data/<name>.yaml."""

    sources: SourcesSection
    tokenizer: TokenizerSection
    documents: DocumentsSection = field(default_factory=DocumentsSection)
    tokens: TokensSection = field(default_factory=TokensSection)
    quality: QualitySection | None = None
    dedupe: DedupeSection | None = None
    decontaminate: DecontaminateSection | None = None
    instructions: InstructionsSection | None = None  # the sources contain conversations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instructions and (self.quality or self.removes_overlaps):
            raise ValueError(
                "quality, dedupe and decontaminate work on documents only; remove them"
            )
        if self.dedupe and self.documents.has_repeats():
            raise ValueError(
                "dedupe: documents.weights has a weight above 1, whose copies are duplicates; "
                "remove one of the two"
            )
        if (d := self.decontaminate) and not (d.against or self.documents.heldout_share):
            raise ValueError(
                "decontaminate: expected files in against or a documents.heldout_share above 0, "
                "found neither"
            )

    @property
    def removes_overlaps(self) -> bool:
        """Whether documents are compared, with one another or with evaluation sets."""
        return bool(self.dedupe or self.decontaminate)

    @property
    def drops_quality(self) -> bool:
        """Whether documents are dropped for their tags; else they are only tagged, for the page."""
        return bool(self.quality and self.quality.keep)

    def quality_flag(self, dataset: str) -> str:
        """The section on quality as a flag. Raises ValueError if there is none."""
        if self.quality is None:
            raise ValueError(
                f"{recipe_path(dataset)}: expected a section quality, which names taggers, found "
                "none; add quality: {taggers: [gopher_v1]}"
            )
        return json_flag("config", self.quality)

    def quality_models(self, dataset: str) -> list[str]:
        """The models and tokenizers of taggers. Raises ValueError for one that is missing."""
        models = self.quality.models if self.quality else {}
        for tagger, path in models.items():
            check_file_exists(path, f"{recipe_path(dataset)}: quality.models.{tagger}")
        return list(models.values())

    @property
    def dedupe_parts(self) -> int:
        """The ranges of hashes that are compared; 0 if duplicates stay."""
        return self.dedupe.parts if self.dedupe else 0


def check_each_once(key: str, names: list[str]) -> None:
    """Raise ValueError for a name that occurs twice."""
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ValueError(f"{key}: expected each name once, found {twice[0]} twice; remove one")


@dataclass
class SuiteMember(BaseConfig):
    """What counts as one in a suite: a task's score, or the mean score of several tasks."""

    task: str  # its name, or a pattern of several: "olmes_mc::mmlu::*"
    metric: str  # acc, acc_norm, …
    scorer: str = "lm-eval"  # or ours
    chance: float = 0.0  # what guessing scores; the member is (score − chance) / (1 − chance)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.chance < 1:
            raise ValueError(f"chance: expected a share of 0 or more, below 1, found {self.chance}")
        if self.scorer not in (OURS, HARNESS):
            raise ValueError(f"scorer: expected {OURS} or {HARNESS}, found {self.scorer!r}")


@dataclass
class EvaluationConfig(BaseConfig):
    """The evaluation of a finished run besides held-out documents: config/eval/<name>.yaml."""

    choices: list[str] = field(default_factory=list)  # of olmo/eval/tasks.yaml, by our scorer
    # Tasks of lm-evaluation-harness: its own tasks and groups, those in `task_files`, and those of
    # tasks.yaml whose documents are in `data`.
    harness: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)  # further data sets with the same tokenizer
    data: str | None = None  # folder of data sets, like hf_datasets_cache_dir; None: the hub
    task_files: list[str] = field(default_factory=list)  # folders of the harness's YAML
    # One number each, the mean of its members, by the name that it has in the tables.
    suites: dict[str, list[SuiteMember]] = field(default_factory=dict)
    batch_size: int = 8  # instances of a forward pass
    limit: int | None = None  # the number of documents to evaluate of each task

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("batch_size", self.batch_size, 1)
        check_range("limit", self.limit, 1)
        for key in ("choices", "heldout"):  # answers that count twice make an error smaller
            check_each_once(key, getattr(self, key))
        for name, members in self.suites.items():
            if not members:
                raise ValueError(f"suites.{name}: expected tasks, found none")
            check_each_once(f"suites.{name}", [f"{m.scorer} {m.task} {m.metric}" for m in members])
            for member in members:
                is_ours = member.scorer == OURS
                key, measured = ("choices", self.choices) if is_ours else ("harness", self.harness)
                # What the harness's groups have in them is known only when it has run.
                if not (fnmatch.filter(measured, member.task) if is_ours else measured):
                    raise ValueError(
                        f"suites.{name}: expected {member.task} in {key}, found "
                        f"{', '.join(measured) or 'none'}; name it there, or correct its scorer"
                    )


@dataclass
class RunConfig(BaseConfig):
    """A training run: its settings, data set and processes.

    Without a data set it trains on the token files that its training config names.
    """

    train: str  # the training config: config/train/RUN.yaml
    dataset: str | None = None  # the recipe: config/data/DATASET.yaml
    start_from: str | None = None  # another run, or a checkpoint: its folder or URL
    overrides: list[str] = field(default_factory=list)  # optimizer.name=muon, …
    evaluation: str | None = None  # a file in config/eval; None: held-out documents only
    # Where it is trained; not in the run's identity.
    processes: int = 1  # on each node; with GPUs, one per GPU
    nodes: int = 1  # more than one needs a SLURM allocation
    min_nodes: int | None = None  # elastic: start, or continue after a loss, with this many
    gpus_per_node: int = 0  # requested from a scheduler; 0: gpus_per_node of the pipeline
    max_restarts: int = 0  # of the processes by torchrun, before the job fails
    # Cut the run at these steps, or every so many steps: each link is a job of its own, and writes
    # checkpoints/<run>/step-<n>.
    links: list[int] = field(default_factory=list)
    link_every: int | None = None  # steps
    # The shares of the data set's sources; several parts are a curriculum, and each part but the
    # last ends with a link. Without it every instance is used once an epoch.
    mixture: list[MixturePart] = field(default_factory=list)
    # What the run leaves out of its data set; what is left keeps its order.
    skip_documents: list[str] = field(default_factory=list)  # by their ids
    skip_sources: list[str] = field(default_factory=list)  # patterns of their names
    skip_steps: list[str] = field(default_factory=list)  # "5", "100..119"; later ones move up
    skip_by: SkipRule = SkipRule.mask  # documents and sources: masked, or replaced by the next
    # A step before the first that uses what is left out. It ends a link, which is that of a run
    # that leaves nothing out. None: the step before skip_steps, else 0.
    skip_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.skip.step_ranges
        if self.skip_after is not None and not self.skip:
            raise ValueError(
                "skip_after: expected skip_documents, skip_sources or skip_steps, found none of "
                "them; remove it"
            )
        if self.gpus_per_node and self.processes not in (1, self.gpus_per_node):
            raise ValueError(
                f"processes: expected one per GPU, that is gpus_per_node={self.gpus_per_node}; "
                f"found {self.processes}; remove it"
            )
        _ = self.geometry

    @property
    def skip(self) -> Skip:
        """What the run leaves out."""
        return Skip(self.skip_documents, self.skip_sources, self.skip_steps, self.skip_by)

    @property
    def geometry(self) -> Geometry:
        """How many processes train, and where."""
        processes = self.gpus_per_node or self.processes
        return Geometry(processes, self.nodes, self.min_nodes, self.max_restarts)


@dataclass
class PriceConfig(BaseConfig):
    """What `olmo plan` multiplies GPU-hours and energy with."""

    gpu_hour: float | None = None  # of one GPU
    kwh: float | None = None  # of energy
    currency: str = "USD"  # of both prices


@dataclass
class PipelineConfig(BaseConfig):
    """config/config.yaml."""

    runs: dict[str, RunConfig]  # the training runs, by name
    # Checkpoints that average runs' final ones; the data set of a soup is its first run's.
    soups: dict[str, list[str]] = field(default_factory=dict)
    # Runs of several sizes that predict the loss of a larger one: ladder/<name>/prediction.md.
    ladders: dict[str, LadderConfig] = field(default_factory=dict)
    store: str = "store"  # the folder of all artifacts; OLMO_STORE is another
    shards_per_job: int = 4  # files that one job of a stage processes
    gpu: str = "gpu"  # their name in --gres (gpu, gpu:a100); profiles/slurm sets it
    gpus_per_node: int = 0  # of runs without this key; profiles/slurm sets it
    bench_loss: list[str] = field(default_factory=list)  # runs to compare; first the reference
    eval: list[str] = field(default_factory=list)  # likewise, for `snakemake eval`
    price: PriceConfig = field(default_factory=PriceConfig)
    certificate: CertificateConfig = field(default_factory=CertificateConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("shards_per_job", self.shards_per_job, 1)
        if "index" in {*self.runs, *self.soups}:
            raise ValueError("runs: index is the page of all runs, report/index.html; rename it")
        for name, parts in self.soups.items():
            if name in self.runs:
                raise ValueError(f"soups: {name} is also a run; rename one of them")
            unknown = [part for part in parts if part not in self.runs]
            if unknown or not parts:
                raise ValueError(
                    f"soups.{name}: expected runs, found {', '.join(unknown) or 'none'}; known are "
                    + ", ".join(self.runs)
                )


def check_ids_are_text(runs: Mapping[str, Any]) -> None:
    """Raises ValueError for a number where a run names what it skips: YAML reads 010 as 8."""
    for run, settings in runs.items():
        for key in ("skip_documents", "skip_sources"):
            for found in settings.get(key, ()) if isinstance(settings, Mapping) else ():
                if not isinstance(found, str):
                    raise ValueError(
                        f"runs.{run}.{key}: expected text, found {found}, which YAML may have read "
                        f"from another text, as 8 from 010; put it in quotes: '{found}'"
                    )


def recipe_path(dataset: str) -> Path:
    return Path(f"config/data/{dataset}.yaml")


@contextlib.contextmanager
def prefix_errors(prefix: str) -> Iterator[None]:
    """Put the file, or the key, that a ValueError is about in front of its message."""
    try:
        yield
    except ValueError as error:
        raise Mistakes([f"{prefix}{mistake}" for mistake in each_mistake(error)]) from error


def json_flag(flag: str, config: BaseConfig) -> str:
    """A command's flag with a config as JSON: the fields that differ from their defaults."""
    return shlex.join([f"--{flag}", json_text(config)])


def json_text(config: BaseConfig) -> str:
    """A config as JSON: the fields that differ from their defaults."""
    return json.dumps(non_default_fields(config))


def check_environment_values(
    config: BaseConfig, path: Path | str, allowed: tuple[str, ...], of: tuple[str, ...] = ("",)
) -> None:
    """Allow values of environment variables only as local paths, in the keys that are `allowed`.

    Any other value would be written into commands and records, and may be a secret.

    Args:
        of: beginnings of the keys that are checked.

    Raises:
        ValueError: another value comes from the environment.
    """
    for place, (text, value) in config.from_environment.items():
        key = ".".join(map(str, place))
        if key.startswith(of) and not (key.startswith(allowed) and "://" not in str(value)):
            raise ValueError(
                f"{path}: {key}: expected a value or a local path, found {text}, whose value "
                "records would show; write the value. Credentials belong into ~/.netrc or AWS_…"
            )


def check_file_exists(path: str, named_by: str) -> None:
    """Raises ValueError if a file that a config names does not exist."""
    if not Path(path).is_file():
        wrong = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(
            f"{named_by} names {path}, which {wrong} (looked in "
            f"{Path.cwd()}); write the file, or name another"
        )


def recipe_from_train_config(run: RunConfig) -> Recipe:
    """The recipe of a run without a data set: the token files and tokenizer of its config."""
    train = run.train
    check_file_exists(train, "config/config.yaml: train of a run")
    cfg = TrainConfig.load(train, run.overrides, validate_paths=False)
    check_environment_values(cfg, train, ("",), ("data.", "tokenizer."))
    name = cfg.tokenizer.identifier
    is_file = Path(name).is_file()
    tokenizer = TokenizerSection(
        file=name if is_file else None,
        hub=None if is_file else hub_name(name),
        eos_token_id=cfg.model.eos_token_id,
        pad_token_id=cfg.model.pad_token_id,
    )
    datasets = cfg.data.datasets or {}
    files = list(cfg.data.paths or [path for k in sorted(datasets) for path in datasets[k]])
    if empty := next((k for k in sorted(datasets) if not datasets[k]), None):
        raise ValueError(f"{train}: data.datasets.{empty}: expected files, found none")
    if not files:
        raise ValueError(
            f"{train}: expected files in data.paths, found none (a ${{path.glob:…}} may match "
            "none); name some, or give the run a `dataset` in config/config.yaml"
        )
    return Recipe(sources=SourcesSection(files=files), tokenizer=tokenizer)

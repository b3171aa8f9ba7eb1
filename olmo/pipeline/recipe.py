"""What config/config.yaml and the recipes in config/data can say: runs, data sets, their parts."""

from dataclasses import dataclass, field

from olmo.cluster.launch import Geometry
from olmo.config import BaseConfig
from olmo.config.strict import check_range
from olmo.corpus.documents import MAX_TEXT_BYTES
from olmo.io.gz import LONGEST_LINE


@dataclass
class SourcesConfig(BaseConfig):
    """Where text comes from; exactly one of the first five is given."""

    stdlib: int | None = None  # the running Python's standard library, in so many files
    stdlib_questions: int | None = None  # its documentation as conversations, likewise
    files: list[str] = field(default_factory=list)  # local gz files of Dolma's schema; globs
    table: str | None = None  # a TSV: url, bytes, sha256, licence
    url_list: str | None = None  # a URL of a text file of URLs, as Dolma publishes them
    # Where else the files are, tried in this order: "https://a.org/x/=https://b.org/y/".
    mirrors: list[str] = field(default_factory=list)
    allow_missing: bool = False  # go on without the files that cannot be had

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stdlib", "stdlib_questions"):
            check_range(f"sources.{name}", getattr(self, name), 1, 100)
        kinds = ("stdlib", "stdlib_questions", "files", "table", "url_list")
        given = [name for name in kinds if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"sources: expected one of {', '.join(kinds)}; found "
                + (" and ".join(given) or "none")
            )
        if wrong := [mirror for mirror in self.mirrors if mirror.count("=") != 1]:
            raise ValueError(f"sources.mirrors: expected beginning=beginning, found {wrong[0]!r}")


@dataclass
class DocumentsConfig(BaseConfig):
    """What is kept of a source. `allow` names the reasons for which a line may be dropped."""

    keep_one_in: int = 1
    offset: int = 0
    heldout_share: float = 0.0
    # Parts and copies by the hash of the id, of sources by their names: "books-*=2.5". The first
    # that fits counts; a source that none fits has weight 1.
    weights: list[str] = field(default_factory=list)
    max_text_bytes: int = MAX_TEXT_BYTES
    max_line_bytes: int | None = None  # a longer line is a drop (long-line); None: 256 MiB
    allow: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("documents.keep_one_in", self.keep_one_in, 1)
        check_range("documents.max_text_bytes", self.max_text_bytes, 1)
        check_range("documents.max_line_bytes", self.max_line_bytes, 1, LONGEST_LINE)
        if not 0 <= self.offset < self.keep_one_in:
            raise ValueError(
                f"documents.offset: expected from 0 to keep_one_in - 1, {self.keep_one_in - 1}; "
                f"found {self.offset}"
            )
        if not 0 <= self.heldout_share < 1:
            raise ValueError(
                f"documents.heldout_share: expected from 0 to below 1, found {self.heldout_share}"
            )

        for weight in self.weights:
            pattern, _, number = weight.partition("=")
            try:
                known = pattern and 0 < float(number) <= 1000
            except ValueError:
                known = False
            if not known:
                raise ValueError(
                    "documents.weights: expected pattern=number, the number above 0 and at most "
                    f"1000; found {weight!r}"
                )

    def repeats(self) -> bool:
        """Whether a document is taken more than once."""
        return any(float(weight.partition("=")[2]) > 1 for weight in self.weights)


@dataclass
class DedupeConfig(BaseConfig):
    """Training documents, and lines of them, that are there already go; the first one stays."""

    exact: bool = False  # documents with the text of an earlier one, or of one held out
    paragraphs: bool = False  # lines, also short ones, that an earlier document has
    false_positives: float = 1e-6  # the share of what is new that may go as well

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.exact or self.paragraphs):
            raise ValueError("dedupe: expected exact or paragraphs to be true, found neither")
        if not 0 < self.false_positives < 1:
            raise ValueError(
                f"dedupe.false_positives: expected from 0 to 1, found {self.false_positives}"
            )


@dataclass
class DecontaminateConfig(BaseConfig):
    """Training documents that share n-grams with evaluation sets go."""

    against: list[str] = field(default_factory=list)  # local gz files of documents; globs
    heldout: bool = True  # the data set's own held-out documents are one of them
    ngram: int = 13  # words
    overlap: float = 0.0  # the least share of a line's n-grams; 0: a single one is enough

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.against or self.heldout):
            raise ValueError("decontaminate: expected against or heldout: true, found neither")
        if self.ngram < 1 or not 0 <= self.overlap <= 1:
            raise ValueError(
                "decontaminate: expected ngram of at least 1 and overlap from 0 to 1, found "
                f"{self.ngram} and {self.overlap}"
            )


@dataclass
class TokenizerConfig(BaseConfig):
    """A given tokenizer (a file, a name on the hub, another data set's) or one trained on the
    documents.
    """

    file: str | None = None
    hub: str | None = None
    dataset: str | None = None  # whose tokenizer it is; the ids below are then that one's
    sha256: str | None = None
    train_vocab_size: int | None = None
    eos_token_id: int = 0
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("file", "hub", "dataset", "train_vocab_size") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "tokenizer: expected one of file, hub, dataset, train_vocab_size; found "
                + (" and ".join(given) or "none")
            )
        for name in ("eos_token_id", "pad_token_id"):
            check_range(f"tokenizer.{name}", getattr(self, name), 0)
        check_range("tokenizer.train_vocab_size", self.train_vocab_size, 1)


@dataclass
class TokensConfig(BaseConfig):
    """How documents become tokens; both engines give the same bytes."""

    engine: str = "dolma"  # the toolkit itself, or `fast`
    audit_share: float = 0.01  # of fast's files, tokenized by the toolkit as well and compared
    special_tokens: str = "as-special"  # what looks like one in a text; or "as-text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens.audit_share", self.audit_share, 0, 1)
        for name, known in {
            "engine": ("dolma", "fast"),
            "special_tokens": ("as-special", "as-text"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"tokens.{name}: expected {' or '.join(known)}, found {getattr(self, name)!r}"
                )


@dataclass
class InstructionsConfig(BaseConfig):
    """How conversations become instances for fine-tuning (olmo.corpus.sft)."""

    sequence_length: int  # the model's max_sequence_length
    packed: bool = False  # as many conversations in an instance as fit; else one

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("instructions.sequence_length", self.sequence_length, 1)


@dataclass
class Recipe(BaseConfig):
    """A data set: config/data/<name>.yaml."""

    sources: SourcesConfig
    tokenizer: TokenizerConfig
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    dedupe: DedupeConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    instructions: InstructionsConfig | None = None  # the sources hold conversations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instructions and (self.dedupe or self.decontaminate):
            raise ValueError("dedupe and decontaminate are for documents, not for instructions")
        if self.dedupe and self.documents.repeats():
            raise ValueError(
                "dedupe: documents.weights has one above 1, but every copy would be a duplicate; "
                "take one of them out"
            )
        if (d := self.decontaminate) and not (d.against or self.documents.heldout_share):
            raise ValueError(
                "decontaminate: expected files in against or a documents.heldout_share above 0, "
                "found neither"
            )


@dataclass
class EvaluationConfig(BaseConfig):
    """What finished runs are asked besides their held-out documents: config/eval/<name>.yaml."""

    choices: list[str] = field(default_factory=list)  # of olmo/evaluate/tasks.yaml, by our scorer
    # Of lm-evaluation-harness: its own tasks and groups, those in `task_files`, and those of
    # tasks.yaml whose documents are here.
    harness: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)  # further data sets, of the same tokenizer
    data: str | None = None  # folder of data sets, as hf_datasets_cache_dir; None: the hub
    task_files: list[str] = field(default_factory=list)  # folders of the harness's YAML
    batch_size: int = 8
    limit: int | None = None  # the first so many documents of each task

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("batch_size", self.batch_size, 1)
        check_range("limit", self.limit, 1)


@dataclass
class Run(BaseConfig):
    """A training run: which settings, on which data set, by how many processes.

    Without a data set it is trained on the token files that its training config names.
    """

    train: str
    dataset: str | None = None
    start_from: str | None = None  # another run, or a checkpoint: its folder or URL
    overrides: list[str] = field(default_factory=list)  # optimizer.name=muon, …
    evaluation: str | None = None  # a file in config/eval; None: held-out documents only
    # Where it is trained. The result's identity holds none of this.
    processes: int = 1  # on each node; with GPUs, one a GPU
    nodes: int = 1  # more than one: in a SLURM allocation
    min_nodes: int | None = None  # elastic: begin, and go on after a loss, with as few as this
    gpus_per_node: int = 0  # what is asked of a scheduler; 0: as many as the pipeline says
    max_restarts: int = 0  # times torchrun starts the processes again before the job fails
    # Cut at these steps, or at every so many: each piece is a job, and checkpoints/<run>/step-<n>.
    links: list[int] = field(default_factory=list)
    link_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_node and self.processes not in (1, self.gpus_per_node):
            raise ValueError(
                f"processes: expected one a GPU, that is gpus_per_node={self.gpus_per_node}; found "
                f"{self.processes}. Leave it out"
            )
        _ = self.geometry

    @property
    def geometry(self) -> Geometry:
        """How many processes train, and where."""
        processes = self.gpus_per_node or self.processes
        return Geometry(processes, self.nodes, self.min_nodes, self.max_restarts)


@dataclass
class Pipeline(BaseConfig):
    """config/config.yaml."""

    runs: dict[str, Run]
    # Checkpoints that are the average of runs' final ones; each has its first run's data set.
    soups: dict[str, list[str]] = field(default_factory=dict)
    store: str = "store"
    shards_per_job: int = 4
    # Of a cluster, and so given by profiles/slurm: what --gres calls a GPU (gpu, gpu:a100), and how
    # many of each node a run gets that does not say.
    gpu: str = "gpu"
    gpus_per_node: int = 0
    bench_loss: list[str] = field(default_factory=list)  # runs; the first is the reference
    eval: list[str] = field(default_factory=list)  # likewise, for `snakemake eval`

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("shards_per_job", self.shards_per_job, 1)
        for name, parts in self.soups.items():
            if name in self.runs:
                raise ValueError(f"soups: {name} is a run as well; rename one of them")
            unknown = [part for part in parts if part not in self.runs]
            if unknown or not parts:
                raise ValueError(
                    f"soups.{name}: expected runs, found {', '.join(unknown) or 'none'}; there are "
                    + ", ".join(self.runs)
                )

"""The plan: which runs and data sets there are, and which files a target needs.

The Snakefile asks this module and nothing else for names; what is planned depends on
config/config.yaml, the recipes in config/data and, for a list of URLs, the list.
"""

import glob
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from olmo.config import BaseConfig, TrainConfig
from olmo.data.documents import MAX_TEXT_BYTES
from olmo.store import now


@dataclass
class SourcesConfig(BaseConfig):
    """Where text comes from; exactly one of the four is given."""

    stdlib: int | None = None  # the running Python's standard library, in so many files
    files: list[str] = field(default_factory=list)  # local gz files of Dolma's schema; globs
    table: str | None = None  # a TSV: url, bytes, sha256, licence
    url_list: str | None = None  # a URL of a text file of URLs, as Dolma publishes them

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("stdlib", "files", "table", "url_list") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "sources: expected one of stdlib, files, table, url_list; found "
                + (" and ".join(given) or "none")
            )


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
    allow: list[str] = field(default_factory=list)


@dataclass
class TokenizerConfig(BaseConfig):
    """A given tokenizer (a file, or a name on the hub) or one trained on the documents."""

    file: str | None = None
    hub: str | None = None
    sha256: str | None = None
    train_vocab_size: int | None = None
    eos_token_id: int = 0
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("file", "hub", "train_vocab_size") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "tokenizer: expected one of file, hub, train_vocab_size; found "
                + (" and ".join(given) or "none")
            )


@dataclass
class TokensConfig(BaseConfig):
    """How documents become tokens; both engines give the same bytes."""

    engine: str = "dolma"  # the toolkit itself, or `fast`
    audit_share: float = 0.01  # of fast's files, tokenized by the toolkit as well and compared
    special_tokens: str = "as-special"  # what looks like one in a text; or "as-text"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in {
            "engine": ("dolma", "fast"),
            "special_tokens": ("as-special", "as-text"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"tokens.{name}: expected {' or '.join(known)}, found {getattr(self, name)!r}"
                )


@dataclass
class Recipe(BaseConfig):
    """A data set: config/data/<name>.yaml."""

    sources: SourcesConfig
    tokenizer: TokenizerConfig
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)


@dataclass
class Run(BaseConfig):
    """A training run: which settings, on which data set, by how many processes."""

    train: str
    dataset: str
    processes: int = 1  # one a GPU; the result's identity does not hold it


@dataclass
class Pipeline(BaseConfig):
    """config/config.yaml."""

    runs: dict[str, Run]
    store: str = "store"
    shards_per_job: int = 4


@dataclass(frozen=True)
class Source:
    """One file of a data set: a name that is safe in paths, where it is, what it should be."""

    name: str
    place: str
    bytes: int | None = None
    sha256: str | None = None


class Plan:
    """config/config.yaml and the recipes it leads to, read when they are asked for."""

    def __init__(
        self, config: dict[str, Any], dry_run: Callable[[], bool] = lambda: False
    ) -> None:
        self.pipeline = Pipeline.new(**config)
        self.dry_run = dry_run  # known only when snakemake asks for the first input
        self._recipes: dict[str, Recipe] = {}
        self._trains: dict[str, TrainConfig] = {}
        self._told: set[str] = set()
        self._journals: dict[str, list[str]] = {}

    @property
    def store(self) -> str:
        """The store's folder: $OLMO_STORE wins over the config."""
        return os.path.abspath(os.environ.get("OLMO_STORE") or self.pipeline.store)

    def run(self, name: str) -> Run:
        return self.pipeline.runs[name]

    def recipe(self, dataset: str) -> Recipe:
        if dataset not in self._recipes:
            path = recipe_path(dataset)
            if not path.exists():
                known = sorted(p.stem for p in Path("config/data").glob("*.yaml"))
                raise ValueError(
                    f"expected the recipe {path}, found none; there are {', '.join(known)}"
                )
            try:
                self._recipes[dataset] = Recipe.load(path)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return self._recipes[dataset]

    def train_config(self, run: str) -> TrainConfig:
        """The run's training config, checked against the tokenizer that its data set names."""
        if run not in self._trains:
            path = self.run(run).train
            cfg = TrainConfig.load(path, validate_paths=False)
            tokenizer = self.recipe(self.run(run).dataset).tokenizer
            for name in ("eos_token_id", "pad_token_id"):
                wanted, found = getattr(tokenizer, name), getattr(cfg.model, name)
                if wanted != found:
                    raise ValueError(
                        f"{path}: model.{name} is {found}, but the tokenizer of "
                        f"{recipe_path(self.run(run).dataset)} has {wanted}; set model.{name}: "
                        f"{wanted}"
                    )
            self._trains[run] = cfg
        return self._trains[run]

    # --- files ------------------------------------------------------------------------------

    def sources(self, dataset: str) -> list[Source]:
        """Every file of a data set, in order.

        Raises:
            ValueError: a file that the recipe names is missing, two have one name, or the list
                of URLs has not been fetched.
        """
        sources = self.recipe(dataset).sources
        if sources.stdlib:
            return [
                Source(f"stdlib-{i:02d}", f"stdlib:{i}/{sources.stdlib}")
                for i in range(sources.stdlib)
            ]
        if sources.files:
            return named([(place, None, None) for place in local(sources.files, dataset)])
        table = Path(sources.table) if sources.table else table_path(dataset)
        if not table.exists():
            if sources.table:
                raise ValueError(f"{recipe_path(dataset)}: no source table at {table}")
            raise ValueError(f"{dataset}: its list is to be fetched first: snakemake {table}")
        return named(list(read_table(table)))

    def batches(self, dataset: str) -> list[str]:
        """Names of the batches in which a data set's files travel: "000", "001", …"""
        count = -(-len(self.sources(dataset)) // self.pipeline.shards_per_job)
        return [f"{index:03d}" for index in range(count)]

    def batch(self, dataset: str, batch: str) -> list[Source]:
        size = self.pipeline.shards_per_job
        return self.sources(dataset)[int(batch) * size : (int(batch) + 1) * size]

    def listings(self, dataset: str, stage: str) -> list[str]:
        """The listings of a stage's batches, each the word of a finished job on its files."""
        return [f"data/{dataset}/{stage}/{batch}.tsv" for batch in self.batches(dataset)]

    def journal(self, dataset: str) -> list[str]:
        """A file that every rule of a data set reads, and that changes when damage is found.

        By itself snakemake does not look at a shard, a tokenizer or a listing that is gone while
        the checkpoint made from it is there, nor behind a link. So what is missing is written
        into data/<dataset>/damage.log when the plan is made; the data set's jobs run again, find
        in the store what is still sound, and make the rest anew. A dry run writes nothing: where
        there is damage, a file that is gone with this process stands for the journal.
        """
        path = Path("data", dataset, "damage.log")
        if dataset not in self._journals:
            missing = sorted(self.missing(dataset))
            if self.dry_run():
                if missing:
                    self._draft = tempfile.NamedTemporaryFile(suffix=".damage.log")
                    path = Path(self._draft.name)
                self._journals[dataset] = [str(path)] if path.exists() else []
                return self._journals[dataset]
            self._journals[dataset] = [str(path)]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch()
                os.utime(path, (0, 0))  # older than anything made here
            if missing:
                with path.open("a") as file:
                    file.writelines(f"{now()} missing: {name}\n" for name in missing)
        return self._journals[dataset]

    def missing(self, dataset: str) -> set[str]:
        """The files of a data set, and of its runs, that were made here and have lost their bytes.

        A listing that names one of them is taken away, so that its job runs whenever it is asked
        for, and the file counts as missing once.
        """
        folder = Path("data", dataset)
        missing = set()
        for listing in folder.glob("*/[0-9]*.tsv"):
            rows = listing.read_text().splitlines()[1:]
            files = [folder / row.split("\t")[2] for row in rows]
            if gone := {str(file) for file in files if not file.exists()}:
                missing |= gone
                if not self.dry_run():
                    listing.unlink()
        needed: list[Path] = []
        for name, run in self.pipeline.runs.items():
            final = Path("checkpoints", name, "final")
            if run.dataset == dataset and final.exists():
                needed += [*final.iterdir(), final.parent / "global_indices.npy"]
        if needed and not self.unlisted(dataset):
            needed += [folder / "tokenizer.json", *map(Path, self.listings(dataset, "tokens"))]
        return missing | {str(file) for file in needed if not file.exists()}

    def unlisted(self, dataset: str) -> bool:
        """Whether a data set's files are known only after its list has been fetched."""
        unlisted = bool(self.recipe(dataset).sources.url_list) and not table_path(dataset).exists()
        if unlisted and dataset not in self._told:
            self._told.add(dataset)
            print(
                f"{dataset}: its files are known after its list ({table_path(dataset)}) has been "
                f"fetched. Then, for each {self.pipeline.shards_per_job} of them: sources → "
                "documents → tokens; and for the whole: tokenizer, order → train → evaluate",
                file=sys.stderr,
            )
        return unlisted

    def local_files(self, dataset: str, batch: str) -> list[str]:
        """The local files of a batch: what snakemake watches."""
        places = [source.place for source in self.batch(dataset, batch)]
        return [place for place in places if "://" not in place and not place.startswith("stdlib:")]

    def source_flags(self, dataset: str, batch: str) -> str:
        """A batch's sources as the command takes them: name=place, and what is known of them."""
        return shlex.join(
            f"{source.name}={source.place}"
            + (f"#sha256={source.sha256}" if source.sha256 else "")
            + (f"#bytes={source.bytes}" if source.bytes else "")
            for source in self.batch(dataset, batch)
        )

    def trains_tokenizer(self, dataset: str) -> bool:
        return self.recipe(dataset).tokenizer.train_vocab_size is not None

    def order_flags(self, run: str) -> str:
        """What decides the order of a run's instances."""
        cfg = self.train_config(run)
        seed = cfg.seed if cfg.data.seed is None else cfg.data.seed
        return shlex.join(
            ["--sequence-length", str(cfg.model.max_sequence_length), "--seed", str(seed)]
        )

    def flags(self, dataset: str, part: str) -> str:
        """A part of a recipe as flags of its stage's command."""
        config = getattr(self.recipe(dataset), part)
        words: list[str] = []
        for name, value in config.asdict().items():
            if value in (None, [], ""):
                continue
            words.append("--" + name.replace("_", "-"))
            words += map(str, value) if isinstance(value, list) else [str(value)]
        return shlex.join(words)


def recipe_path(dataset: str) -> Path:
    return Path(f"config/data/{dataset}.yaml")


def table_path(dataset: str) -> Path:
    """Where the table of a data set's sources is made from a published list."""
    return Path(f"data/{dataset}/sources.tsv")


def local(patterns: list[str], dataset: str) -> list[str]:
    """The files that patterns name, each pattern's in sorted order."""
    found = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) or ([pattern] if Path(pattern).exists() else [])
        if not matches:
            raise ValueError(
                f"{recipe_path(dataset)}: sources.files names {pattern}, which does not exist "
                f"(looked in {os.getcwd()}); put the file there or take the line out"
            )
        found += matches
    return found


def read_table(path: Path) -> Iterator[tuple[str, int | None, str | None]]:
    """(url, bytes, sha256) of each line of a source table; what is not known yet is empty."""
    lines = path.read_text().splitlines()
    header = lines[0].split("\t") if lines else []
    if header[:3] != ["url", "bytes", "sha256"]:
        raise ValueError(
            f"{path}: expected the columns url, bytes, sha256, licence; found {header}"
        )
    for line in lines[1:]:
        url, size, digest = [*line.split("\t"), "", ""][:3]
        yield url, int(size) if size else None, digest or None


def named(files: list[tuple[str, int | None, str | None]]) -> list[Source]:
    """Give each file a name that is safe in paths and unlike the others'.

    The last part of its place, without the ending; where two are alike, with the folder.
    """
    paths = [urlparse(place).path if "://" in place else place for place, *_ in files]
    parts = [[part for part in path.split("/") if part] for path in paths]
    for depth in (1, 2, 3):
        names = [safe("-".join(part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            return [
                Source(name, place, size, digest)
                for name, (place, size, digest) in zip(names, files, strict=True)
            ]
    twice = next(name for name in names if names.count(name) > 1)
    places = [p for (p, _, _), name in zip(files, names, strict=True) if name == twice]
    raise ValueError(f"two sources would have the name {twice}: {places[0]} and {places[1]}")


def safe(name: str) -> str:
    """A name without endings, spaces, leading dashes or anything else that a shell minds."""
    stem = re.sub(r"(\.(json|jsonl))?\.gz$|\.jsonl?$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip("-.") or "_"

"""The plan: which runs and data sets there are, and which files a target needs.

The Snakefile asks this module and nothing else for names; what is planned depends on
config/config.yaml, the recipes in config/data and, for a list of URLs, the list.
"""

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from olmo.config import BaseConfig, TrainConfig
from olmo.config.checks import check
from olmo.config.identity import identity
from olmo.config.strict import changed
from olmo.corpus import source_table
from olmo.corpus.documents import MESSAGES
from olmo.corpus.source_table import Source, quoted
from olmo.corpus.sources import SourcesSection
from olmo.corpus.tokenizer import TokenizerSection
from olmo.pipeline.recipe import (
    EvaluationConfig,
    Pipeline,
    Recipe,
    Run,
)
from olmo.pipeline.unheeded import refuse_unheeded
from olmo.tokenizer import hub_name
from olmo.train.chain import cuts


class Plan:
    """config/config.yaml and the recipes it leads to, read when they are asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        try:
            self.pipeline = Pipeline.new(**config)
        except ValueError as error:
            raise ValueError(f"config/config.yaml: {error}") from error
        # Data sets that are tokens already: those of runs that name no other.
        self.given = {n: run for n, run in self.pipeline.runs.items() if not run.dataset}
        self._recipes: dict[str, Recipe] = {}
        self._sources: dict[str, list[Source]] = {}
        self._trains: dict[str, TrainConfig] = {}
        self._borrowed: dict[str, str] = {}  # data set → that whose tokenizer it has
        self._told: set[str] = set()

    @property
    def store(self) -> str:
        """The store's folder: $OLMO_STORE wins over the config."""
        return os.path.abspath(os.environ.get("OLMO_STORE") or self.pipeline.store)

    def run(self, name: str) -> Run:
        """A run of config/config.yaml, of a soup its first; ValueError names those there are."""
        name = self.pipeline.soups.get(name, [name])[0]
        if name not in self.pipeline.runs:
            raise ValueError(
                f"there is no run {name} in config/config.yaml; there are "
                + ", ".join(self.pipeline.runs)
            )
        run = self.pipeline.runs[name]
        return replace(run, gpus_per_node=run.gpus_per_node or self.pipeline.gpus_per_node)

    def ours(self, name: str) -> bool:
        """Whether a checkpoint of this name is made here, by a run or as a soup."""
        return name in self.pipeline.runs or name in self.pipeline.soups

    def dataset(self, run: str) -> str:
        """The name of a run's data set; its own where its training config names the tokens."""
        return self.run(run).dataset or self.pipeline.soups.get(run, [run])[0]

    def recipe(self, dataset: str) -> Recipe:
        if dataset not in self._recipes:
            if dataset in self.given:
                self._recipes[dataset] = recipe_of(self.given[dataset])
                return self._recipes[dataset]
            path = recipe_path(dataset)
            if not path.exists():
                known = sorted(p.stem for p in Path("config/data").glob("*.yaml"))
                raise ValueError(
                    f"expected the recipe {path}, found none; there are {', '.join(known)}"
                )
            recipe = Recipe.load(path)
            only_places(recipe, path, ("sources", "tokenizer.file", "decontaminate.against"))
            if (other := recipe.tokenizer.dataset) is not None:
                self._borrowed[dataset] = other
                ids = self.recipe(other).tokenizer
                recipe.tokenizer = TokenizerSection(
                    file=f"data/{other}/tokenizer.json",
                    eos_token_id=ids.eos_token_id,
                    pad_token_id=ids.pad_token_id,
                )
            self._recipes[dataset] = recipe
        return self._recipes[dataset]

    def instructed(self) -> list[str]:
        """The data sets of conversations; by a look at the recipes, for one may be broken."""
        recipes = sorted(Path("config/data").glob("*.yaml"))
        return [p.stem for p in recipes if re.search("^instructions:", p.read_text(), re.M)]

    def train_config(self, run: str) -> TrainConfig:
        """The run's training config, checked against the tokenizer that its data set names."""
        if run not in self._trains:
            path = self.run(run).train
            expect_file(path, f"runs.{run}.train")
            cfg = TrainConfig.load(path, self.run(run).overrides, validate_paths=False)
            try:
                check(cfg)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            refuse_unheeded(run, self.run(run), cfg)
            dataset = self.dataset(run)
            tokenizer = self.recipe(dataset).tokenizer
            for name in ("eos_token_id", "pad_token_id"):
                wanted, found = getattr(tokenizer, name), getattr(cfg.model, name)
                if wanted != found:
                    raise ValueError(
                        f"{path}: model.{name} is {found}, but the tokenizer of "
                        f"{recipe_path(dataset)} has {wanted}; set model.{name}: "
                        f"{wanted}"
                    )
            try:
                identity(cfg)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            self._check_vocabulary(run, cfg)
            self._check_tuning(run, cfg)
            try:
                replace(self.run(run).geometry, batch=cfg.global_train_batch_size)
            except ValueError as error:
                raise ValueError(f"config/config.yaml: runs.{run}.{error}") from error
            self._trains[run] = cfg
        return self._trains[run]

    def _check_vocabulary(self, run: str, cfg: TrainConfig) -> None:
        """What can be told of a tokenizer's size before it is trained, and all is tokenized."""
        path, dataset = self.run(run).train, self.dataset(run)
        while dataset in self._borrowed:
            dataset = self._borrowed[dataset]
        size, found = self.recipe(dataset).tokenizer.train_vocab_size, cfg.model.vocab_size
        if size is not None and size != found:
            raise ValueError(
                f"{path}: model.vocab_size is {found}, but {recipe_path(dataset)} trains a "
                f"tokenizer of train_vocab_size {size}; set model.vocab_size: {size} and a "
                "model.embedding_size of no less"
            )

    def documents(self, dataset: str) -> str:
        """The stage whose documents become tokens: `mixed` where the recipe takes some out."""
        recipe = self.recipe(dataset)
        return "mixed" if recipe.dedupe or recipe.decontaminate else "documents"

    def against(self, dataset: str) -> list[str]:
        """The files that a data set is decontaminated against."""
        found = self.recipe(dataset).decontaminate
        files = found.against if found else []
        name = "decontaminate.against"
        return [s.place for s in self._local(dataset, name, files)]

    def _local(self, dataset: str, key: str, patterns: list[str]) -> list[Source]:
        """The files that a recipe names under `key`; their number is told once."""
        found = source_table.local(patterns, recipe_path(dataset), key)
        if found and (told := f"{dataset}: {key}") not in self._told:
            self._told.add(told)
            again = len(found) - len({source.place for source in found})
            more = f", {again:,} of them again" * bool(again)
            print(f"{told} names {len(found):,} files{more}", file=sys.stderr)
        return found

    def _check_tuning(self, run: str, cfg: TrainConfig) -> None:
        """What a run on conversations, or from a checkpoint, must have."""
        path, dataset = self.run(run).train, self.dataset(run)
        instructions, length = self.recipe(dataset).instructions, cfg.model.max_sequence_length
        if instructions is not None and instructions.sequence_length != length:
            raise ValueError(
                f"{recipe_path(dataset)}: instructions.sequence_length: expected "
                f"model.max_sequence_length of {path}, {length}; found "
                f"{instructions.sequence_length}"
            )
        base = self.run(run).start_from
        if base is None:
            return
        if not cfg.reset_trainer_state:
            raise ValueError(
                f"{path}: a run with start_from is a new one: expected reset_trainer_state: true"
            )
        if self.ours(base):
            ours, theirs = self.tokenizer_of(dataset), self.tokenizer_of(self.dataset(base))
            if ours != theirs:
                raise ValueError(
                    f"{run} starts from {base}, whose tokenizer is that of {theirs}; expected the "
                    f"same in {recipe_path(dataset)} (tokenizer: {{dataset: "
                    f"{self.dataset(base)}}}), found that of {ours}"
                )

    def tokenizer_of(self, dataset: str) -> str:
        """What names a data set's tokenizer: a file, a name on the hub, what it is trained on."""
        tokenizer = self.recipe(dataset).tokenizer
        if dataset in self._borrowed:
            return self.tokenizer_of(self._borrowed[dataset])
        return tokenizer.file or tokenizer.hub or f"data/{dataset}/tokenizer.json"

    def start(self, run: str) -> list[str]:
        """The folder that a run starts from: another run's final one, or one that is fetched."""
        base = self.run(run).start_from
        if base is None:
            return []
        return [f"checkpoints/{base}/final" if self.ours(base) else f"checkpoints/{run}/start"]

    def start_flags(self, run: str) -> str:
        """Which parts of a given checkpoint the run needs."""
        return "" if self.train_config(run).reset_optimizer_state else "--optimizer"

    def given_start(self, run: str) -> str:
        """The checkpoint, by path or URL, that `checkpoints/<run>/start` is made from."""
        base = self.run(run).start_from if run in self.pipeline.runs else None
        if base is None or self.ours(base):
            raise ValueError(f"{run}: expected start_from with a checkpoint, found {base}")
        if "://" not in base and not Path(base).exists():
            raise ValueError(
                f"config/config.yaml: runs.{run}.start_from: expected a run, a checkpoint that is "
                f"there, or a URL of one; found {base}"
            )
        return base

    # --- files ------------------------------------------------------------------------------

    def sources(self, dataset: str) -> list[Source]:
        """Every file of a data set, in order.

        Raises:
            ValueError: a file that the recipe names is missing, two have one name, or the list
                of URLs has not been fetched.
        """
        if dataset not in self._sources:
            found = self._find_sources(dataset)
            for weight in self.recipe(dataset).documents.weights:
                pattern = weight.partition("=")[0]
                if not any(fnmatchcase(source.name, pattern) for source in found):
                    names = [source.name for source in found[:5]] + ["…"] * (len(found) > 5)
                    raise ValueError(
                        f"{recipe_path(dataset)}: documents.weights: {pattern} fits no source; "
                        f"they are {', '.join(names)}"
                    )
            self._sources[dataset] = found
        return self._sources[dataset]

    def _find_sources(self, dataset: str) -> list[Source]:
        sources = self.recipe(dataset).sources
        for kind, count in (
            ("stdlib", sources.stdlib),
            ("stdlib-questions", sources.stdlib_questions),
        ):
            if count:
                return [Source(f"{kind}-{i:02d}", f"{kind}:{i}/{count}") for i in range(count)]
        if dataset in self.given:
            return source_table.named([Source("", place) for place in sources.files])
        if sources.files:
            return self._local(dataset, "sources.files", sources.files)
        table = self.table(dataset)
        if not table.exists():
            if sources.table:
                raise ValueError(f"{recipe_path(dataset)}: no source table at {table}")
            raise ValueError(
                f"{dataset}: its list is to be fetched first: uv run snakemake --cores 2 {table}"
            )
        return source_table.read(table)

    def table(self, dataset: str) -> Path:
        """The table of a data set's sources: given, or made from a published list."""
        return Path(self.recipe(dataset).sources.table or f"data/{dataset}/sources.tsv")

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

    def unlisted(self, dataset: str) -> bool:
        """Whether a data set's files are known only after its list has been fetched."""
        unlisted = bool(self.recipe(dataset).sources.url_list) and not self.table(dataset).exists()
        if unlisted and dataset not in self._told:
            self._told.add(dataset)
            print(
                f"{dataset}: its files are known after its list ({self.table(dataset)}) has been "
                f"fetched. Then, for each {self.pipeline.shards_per_job} of them: sources → "
                "documents → tokens; and for the whole: tokenizer, order → train → evaluate",
                file=sys.stderr,
            )
        return unlisted

    def local_files(self, dataset: str, batch: str) -> list[str]:
        """The local files of a batch: what snakemake watches."""
        places = [source.place for source in self.batch(dataset, batch)]
        files = [
            place
            for place in places
            if "://" not in place and not place.startswith(("stdlib:", "stdlib-questions:"))
        ]
        for file in files:
            if "{" in file or "}" in file:
                raise ValueError(f"{file}: snakemake takes braces for wildcards; rename the file")
        return files

    def source_flags(self, dataset: str, batch: str) -> str:
        """A batch's sources as the command takes them: name=place, and what is known of them.

        What a table knows of their contents is not among it: the command reads the table, and
        writes into it what it did not know.
        """
        sources = self.recipe(dataset).sources
        beginnings = [mirror.split("=") for mirror in sources.mirrors]
        words = ["--sources"]
        for source in self.batch(dataset, batch):
            place = source.place
            mirrors = [b + place.removeprefix(a) for a, b in beginnings if place.startswith(a)]
            words.append("#".join([f"{source.name}={quoted(place)}", *map(quoted, mirrors)]))
        if sources.table or sources.url_list:
            words += ["--table", str(self.table(dataset))]
        words += ["--allow-missing"] * sources.allow_missing
        words += ["--conversations"] * (self.recipe(dataset).instructions is not None)
        return shlex.join(words)

    def given_tokenizer(self, dataset: str) -> list[str]:
        """The file that a data set's tokenizer is taken from, where it is one."""
        file = self.recipe(dataset).tokenizer.file
        return [] if file is None else [file]

    def trains_tokenizer(self, dataset: str) -> bool:
        return self.recipe(dataset).tokenizer.train_vocab_size is not None

    def order_flags(self, run: str) -> str:
        """What decides the order of a run's instances."""
        cfg = self.train_config(run)
        length = cfg.model.max_sequence_length
        words = ["--sequence-length", length, "--seed", cfg.data_seed]
        words += ["--dtype", cfg.data.memmap_dtype]
        if cfg.epoch:  # that in which the run begins
            words += ["--epoch", cfg.epoch]
        return shlex.join(map(str, words))

    def geometry_flags(self, run: str) -> str:
        """How many processes train a run, and where."""
        geometry = self.run(run).geometry
        words = ["--processes", geometry.processes]
        if geometry.nodes > 1:
            words += ["--nodes", geometry.nodes, "--min-nodes", geometry.fewest]
        if geometry.max_restarts:
            words += ["--max-restarts", geometry.max_restarts]
        return shlex.join(map(str, words))

    def place(self, run: str, what: str, attempt: int = 1) -> int | str | None:
        """What a scheduler is asked for, as snakemake's resource `what`; None leaves it out.

        A further attempt asks for as few nodes as the run may go on with: the others may be gone,
        and whoever sets min_nodes would rather go on with fewer than wait for them.

        One task a node: srun starts a torchrun on each, and that the processes. A single node
        needs no srun, and `mpi` is what tells the SLURM executor to leave that to us.
        """
        geometry, gpus = self.run(run).geometry, self.run(run).gpus_per_node
        nodes = geometry.nodes if attempt == 1 else geometry.fewest
        many = nodes > 1
        asked: dict[str, int | str | None] = {
            "nodes": nodes if many else None,
            "tasks": nodes if many else None,
            "mpi": "srun" if many else None,
            "gres": f"{self.pipeline.gpu}:{gpus}" if gpus else None,
            "tasks_per_gpu": 0 if gpus else None,  # else the executor starts a task for each
        }
        return asked[what]

    def link_before(self, run: str, step: str | None = None) -> list[str]:
        """The link from which a run goes on to its end, or to its link at `step`; [] at its start.

        Raises:
            ValueError: the run has no link there.
        """
        settings = self.run(run)
        known = cuts(self.train_config(run), settings.links, settings.link_every)
        end = None if step is None else int(step)
        if end is not None and end not in known:
            raise ValueError(
                f"checkpoints/{run}/step-{step}: expected one of the steps "
                f"{known or 'that links or link_every of the run name; it has neither'}"
            )
        before = [cut for cut in known if end is None or cut < end]
        return [f"checkpoints/{run}/step-{cut}" for cut in before[-1:]]

    def link_flags(self, run: str, step: str | None = None) -> str:
        """Where a piece of a run begins and ends."""
        words = [word for link in self.link_before(run, step) for word in ("--after", link)]
        return shlex.join(words + (["--until", step] if step else []))

    def override_flags(self, run: str) -> str:
        words = self.run(run).overrides
        return f"--overrides {shlex.join(words)}" if words else ""

    def evaluation_flags(self, run: str) -> str:
        """What a run is asked; ValueError for a choice task that there is not."""
        from olmo.eval.tasks import task_of

        config = self.evaluation(run)
        for label in config.choices:
            task_of(label)
        return as_flag("config", config.update_with(heldout=[]))  # files are a rule's inputs

    def evaluation(self, run: str) -> EvaluationConfig:
        path = self.run(run).evaluation
        if path is None:
            return EvaluationConfig()
        expect_file(path, f"runs.{run}.evaluation")
        config = EvaluationConfig.load(path)
        only_places(config, path, ("data", "task_files"))
        return config

    def heldout(self, run: str) -> list[str]:
        """What is measured on the documents that a run's data set held out; [] where it has none.

        Raises:
            ValueError: the run is asked nothing else either.
        """
        dataset = self.dataset(run)
        if self.recipe(dataset).documents.heldout_share:
            return [f"checkpoints/{run}/heldout.json"]
        asked = self.evaluation(run)
        if not (asked.choices or asked.harness or asked.heldout):
            recipe = f"; or set documents.heldout_share in {recipe_path(dataset)}"
            raise ValueError(
                f"eval/{run}: expected something to measure, found no held-out documents in the "
                f"run's data and no tasks; give the run `evaluation: config/eval/hub.yaml` in "
                f"config/config.yaml, or a file of yours" + recipe * (dataset not in self.given)
            )
        return []

    def further_heldout(self, run: str) -> list[str]:
        """What is measured on the held-out documents of other data sets."""
        return [f"checkpoints/{run}/heldout/{name}.json" for name in self.evaluation(run).heldout]

    def section(self, dataset: str, part: str, flag: str = "config") -> str:
        """A section of a recipe as its stage's command takes it: what is not the default."""
        found = getattr(self.recipe(dataset), part)
        return "" if found is None else as_flag(flag, found)

    def kind_flags(self, dataset: str) -> str:
        """What a line of a data set's sources is, where that is no document."""
        return f"--kind {MESSAGES}" if self.recipe(dataset).instructions is not None else ""


def as_flag(flag: str, config: BaseConfig) -> str:
    return shlex.join([f"--{flag}", json.dumps(changed(config))])


def only_places(
    config: BaseConfig, path: Path | str, allowed: tuple[str, ...], of: tuple[str, ...] = ("",)
) -> None:
    """Of the environment a stage's settings take local paths alone, in the keys that are `allowed`.

    Anything else would stand in its command and its record, and may be a secret.

    Args:
        of: beginnings of the keys that are looked at.

    Raises:
        ValueError: another value comes from the environment.
    """
    for place, (text, value) in config.from_environment.items():
        key = ".".join(map(str, place))
        if key.startswith(of) and not (key.startswith(allowed) and "://" not in str(value)):
            raise ValueError(
                f"{path}: {key}: expected a value or a local path, found {text}, which records "
                "would tell; write the value. Credentials have their own places: ~/.netrc, AWS_…"
            )


def expect_file(path: str, named_by: str) -> None:
    """Raises ValueError where a file that config/config.yaml names is not there."""
    if not Path(path).is_file():
        raise ValueError(
            f"config/config.yaml: {named_by} names {path}, which does not exist (looked in "
            f"{Path.cwd()}); write the file, or name another"
        )


def recipe_path(dataset: str) -> Path:
    return Path(f"config/data/{dataset}.yaml")


def recipe_of(run: Run) -> Recipe:
    """The recipe that a run's training config implies: its token files, its tokenizer."""
    train = run.train
    expect_file(train, "train of a run")
    cfg = TrainConfig.load(train, run.overrides, validate_paths=False)
    only_places(cfg, train, ("",), ("data.", "tokenizer."))
    name = cfg.tokenizer.identifier
    here = Path(name).is_file()
    tokenizer = TokenizerSection(
        file=name if here else None,
        hub=None if here else hub_name(name),
        eos_token_id=cfg.model.eos_token_id,
        pad_token_id=cfg.model.pad_token_id,
    )
    labelled = cfg.data.datasets or {}
    files = list(cfg.data.paths or [path for k in sorted(labelled) for path in labelled[k]])
    if empty := next((k for k in sorted(labelled) if not labelled[k]), None):
        raise ValueError(f"{train}: data.datasets.{empty}: expected files, found none")
    if not files:
        raise ValueError(
            f"{train}: expected files in data.paths, where ${{path.glob:…}} may match none, or "
            "`dataset` in config/config.yaml"
        )
    return Recipe(sources=SourcesSection(files=files), tokenizer=tokenizer)

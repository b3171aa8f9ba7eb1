"""The plan: which runs and data sets there are, and which files a target needs.

Rules get every name and flag from this module. It reads config/config.yaml, the recipes in
config/data, the training configs and, for a published list of URLs, the list.
"""

import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.config.checks import check_train_config
from olmo.config.identity import identity
from olmo.corpus import source_table
from olmo.corpus.documents import MESSAGES
from olmo.corpus.source_table import Source
from olmo.corpus.tokenizer import TokenizerSection
from olmo.pipeline.ladder import (
    Branch,
    LadderConfig,
    branch_settings,
    find_ladder,
    list_branches,
    list_names,
    run_settings,
)
from olmo.pipeline.recipe import (
    EvaluationConfig,
    PipelineConfig,
    Recipe,
    RunConfig,
    check_environment_values,
    check_file_exists,
    check_ids_are_text,
    json_flag,
    prefix_errors,
    recipe_from_train_config,
    recipe_path,
)
from olmo.pipeline.source_files import (
    check_weights,
    find_sources,
    local_files,
    source_flags,
    source_table_path,
)
from olmo.pipeline.targets import suggest_name
from olmo.pipeline.unsupported_keys import refuse_unsupported_keys
from olmo.runtime.log import format_number

LARGE_DOWNLOAD = 1e12  # bytes, from which there is a warning


class Plan:
    """config/config.yaml and the files that it names, each read when it is first needed."""

    def __init__(self, config: dict[str, Any]) -> None:
        with prefix_errors("config/config.yaml: "):
            self.pipeline = PipelineConfig.new(**config)
            check_ids_are_text(config["runs"])
            self._add_ladder_runs()
        # Runs without `dataset`: the token files that each names are a data set of the run's name.
        self.tokenized_datasets = {
            n: run for n, run in self.pipeline.runs.items() if not run.dataset
        }
        self._recipes: dict[str, Recipe] = {}
        self._sources: dict[str, list[Source]] = {}
        self._train_configs: dict[str, TrainConfig] = {}
        self._tokenizer_from: dict[str, str] = {}  # data set → the one whose tokenizer it uses
        self._reported: set[str] = set()

    def _add_ladder_runs(self) -> None:
        """The runs of ladders become runs like any other; `run` gives them lengths and links."""
        self._branches: dict[str, list[Branch]] = {}  # by ladder, when they are asked for
        self.ladder_of = list_names(
            self.pipeline.ladders, {*self.pipeline.runs, *self.pipeline.soups}
        )
        for name, ladder in self.ladder_of.items():
            self.pipeline.runs[name] = RunConfig.new(**run_settings(self.pipeline.ladders[ladder]))

    def branches(self, ladder: str) -> list[Branch]:
        """The runs of a ladder. ValueError if one of them cannot be."""
        if ladder not in self._branches:
            config, runs = self.ladder(ladder), self.pipeline.runs
            with prefix_errors("config/config.yaml: "):
                self._branches[ladder] = found = list_branches(ladder, config)
            for branch in found:
                settings = branch_settings(config, branch, found)
                runs[branch.name] = replace(runs[branch.name], **settings)
        return self._branches[ladder]

    def ladder(self, name: str) -> LadderConfig:
        """The config of a ladder. ValueError for an unknown name."""
        return find_ladder(self.pipeline.ladders, name)

    @property
    def store(self) -> str:
        """The store's folder: $OLMO_STORE, or else `store` of the config."""
        return os.path.abspath(os.environ.get("OLMO_STORE") or self.pipeline.store)

    def run(self, name: str) -> RunConfig:
        """The config of a run; of a soup, that of its first run. ValueError for an unknown name."""
        name = self.pipeline.soups.get(name, [name])[0]
        if name not in self.pipeline.runs:
            known = [run for run in self.pipeline.runs if run not in self.ladder_of]
            raise ValueError(
                f"config/config.yaml: expected one of the runs {', '.join(known)}; found {name}; "
                + suggest_name(
                    name,
                    self.pipeline.runs,
                    f"ask for one, as in checkpoints/{next(iter(known), '<run>')}/final, or add "
                    f"{name} to runs",
                )
            )
        if name in self.ladder_of:
            self.branches(self.ladder_of[name])
        run = self.pipeline.runs[name]
        return replace(run, gpus_per_node=run.gpus_per_node or self.pipeline.gpus_per_node)

    def is_made_here(self, name: str) -> bool:
        """Whether a run or a soup of this pipeline makes a checkpoint of this name."""
        return name in self.pipeline.runs or name in self.pipeline.soups

    def dataset(self, run: str) -> str:
        """The name of a run's data set: the run's own name if its training config names tokens."""
        first = self.pipeline.soups.get(run, [run])[0]
        return (self.pipeline.runs.get(first) or self.run(first)).dataset or first

    def recipe(self, dataset: str) -> Recipe:
        """A data set's recipe, with `tokenizer.dataset` replaced by that tokenizer's file."""
        if dataset not in self._recipes:
            if dataset in self.tokenized_datasets:
                self._recipes[dataset] = recipe_from_train_config(self.tokenized_datasets[dataset])
                return self._recipes[dataset]
            path = recipe_path(dataset)
            if not path.exists():
                known = sorted(p.stem for p in Path("config/data").glob("*.yaml"))
                raise ValueError(
                    f"expected the recipe {path}, found none; known are {', '.join(known)}; "
                    + suggest_name(dataset, known, "name one of them, or write the recipe")
                )
            recipe = Recipe.load(path)
            allowed = ("sources", "tokenizer.file", "decontaminate.against", "quality.models")
            check_environment_values(recipe, path, allowed)
            if (other := recipe.tokenizer.dataset) is not None:
                self._tokenizer_from[dataset] = other
                ids = self.recipe(other).tokenizer
                recipe.tokenizer = TokenizerSection(
                    file=f"data/{other}/tokenizer.json",
                    eos_token_id=ids.eos_token_id,
                    pad_token_id=ids.pad_token_id,
                )
            self._recipes[dataset] = recipe
        return self._recipes[dataset]

    def instruction_datasets(self) -> list[str]:
        """Data sets of conversations; found by a regex, since another recipe may be broken."""
        recipes = sorted(Path("config/data").glob("*.yaml"))
        return [p.stem for p in recipes if re.search("^instructions:", p.read_text(), re.M)]

    def train_config(self, run: str) -> TrainConfig:
        """The run's training config, checked against the tokenizer that its data set names."""
        if run not in self._train_configs:
            path = self.run(run).train
            check_file_exists(path, f"config/config.yaml: runs.{run}.train")
            cfg = TrainConfig.load(path, self.run(run).overrides, validate_paths=False)
            with prefix_errors(f"{path}: "):
                check_train_config(cfg)
            refuse_unsupported_keys(run, self.run(run), cfg)
            dataset = self.dataset(run)
            tokenizer = self.recipe(dataset).tokenizer
            for name in ("eos_token_id", "pad_token_id"):
                expected, found = getattr(tokenizer, name), getattr(cfg.model, name)
                if expected != found:
                    raise ValueError(
                        f"{path}: model.{name} is {found}, but the tokenizer of "
                        f"{recipe_path(dataset)} has {expected}; set model.{name}: "
                        f"{expected}"
                    )
            with prefix_errors(f"{path}: "):
                identity(cfg)
            self._check_vocabulary(run, cfg)
            self._check_tuning(run, cfg)
            with prefix_errors(f"config/config.yaml: runs.{run}."):
                replace(self.run(run).geometry, batch=cfg.global_train_batch_size)
            self._train_configs[run] = cfg
        return self._train_configs[run]

    def _check_vocabulary(self, run: str, cfg: TrainConfig) -> None:
        """Refuse a model.vocab_size that differs from the size of a tokenizer to be trained."""
        path, dataset = self.run(run).train, self.dataset(run)
        while dataset in self._tokenizer_from:
            dataset = self._tokenizer_from[dataset]
        size, found = self.recipe(dataset).tokenizer.train_vocab_size, cfg.model.vocab_size
        if size is not None and size != found:
            raise ValueError(
                f"{path}: model.vocab_size is {found}, but {recipe_path(dataset)} trains a "
                f"tokenizer of train_vocab_size {size}; set model.vocab_size: {size} and "
                "model.embedding_size to at least that"
            )

    def documents_stage(self, dataset: str) -> str:
        """The stage whose documents are tokenized: `mixed` if the recipe removes some of them."""
        recipe = self.recipe(dataset)
        return "mixed" if recipe.drops_quality or recipe.removes_overlaps else "documents"

    def decontamination_files(self, dataset: str) -> list[str]:
        """The files that a data set is decontaminated against."""
        section, key = self.recipe(dataset).decontaminate, "decontaminate.against"
        patterns = section.against if section else []
        found = source_table.find_local_files(patterns, recipe_path(dataset), key)
        self._report_files(dataset, key, found)
        return [source.place for source in found]

    def _report_files(self, dataset: str, key: str, found: list[Source]) -> None:
        """Print, once for each key, how many files its patterns match."""
        repeated = len(found) - len({source.place for source in found})
        count = format_number(len(found), "file")
        count += f", {repeated:,} of them again" * bool(repeated)
        if found:
            self._report_once(f"{dataset}: {key}", f" names {count}")

    def _report_once(self, subject: str, text: str) -> None:
        if subject not in self._reported:
            self._reported.add(subject)
            print(subject + text, file=sys.stderr)

    def _check_tuning(self, run: str, cfg: TrainConfig) -> None:
        """Refuse settings that do not fit a run on conversations, or one from a checkpoint."""
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
        if not self.is_made_here(base):
            self.external_start(run)
        if not cfg.reset_trainer_state:
            raise ValueError(
                f"{path}: expected reset_trainer_state: true, since a run with start_from is new; "
                "found false"
            )
        if self.is_made_here(base):
            ours, theirs = self.tokenizer_name(dataset), self.tokenizer_name(self.dataset(base))
            if ours != theirs:
                raise ValueError(
                    f"{recipe_path(dataset)}: expected the tokenizer of {base}, from which {run} "
                    f"starts, {theirs} (tokenizer: {{dataset: {self.dataset(base)}}}); found {ours}"
                )

    def tokenizer_name(self, dataset: str) -> str:
        """The identifier of a data set's tokenizer: a file, or a name on the hub."""
        tokenizer = self.recipe(dataset).tokenizer
        if dataset in self._tokenizer_from:
            return self.tokenizer_name(self._tokenizer_from[dataset])
        return tokenizer.file or tokenizer.hub or f"data/{dataset}/tokenizer.json"

    def start_checkpoint(self, run: str) -> list[str]:
        """The checkpoint folder that a run starts from, made by another run or by rule `start`."""
        base = self.run(run).start_from
        if base is None:
            return []
        return [
            f"checkpoints/{base}/final" if self.is_made_here(base) else f"checkpoints/{run}/start"
        ]

    def start_flags(self, run: str) -> str:
        """Which parts of an external checkpoint the run needs."""
        return "" if self.train_config(run).reset_optimizer_state else "--optimizer"

    def external_start(self, run: str) -> str:
        """The path or URL of the checkpoint that `checkpoints/<run>/start` is made from."""
        base = self.run(run).start_from if run in self.pipeline.runs else None
        if base is None or self.is_made_here(base):
            raise ValueError(f"{run}: expected start_from with a checkpoint, found {base}")
        if "://" not in base and not Path(base).exists():
            raise ValueError(
                f"config/config.yaml: runs.{run}.start_from: expected a run, a checkpoint's folder "
                f"that exists, or its URL; found {base}; "
                + suggest_name(base, self.pipeline.runs, "name one that exists")
            )
        return base

    # --- files ------------------------------------------------------------------------------

    def sources(self, dataset: str) -> list[Source]:
        """Every source file of a data set, in order.

        Raises:
            ValueError: a file that the recipe names is missing, two have the same name, or the
                list of URLs has not been downloaded.
        """
        if dataset not in self._sources:
            recipe, is_tokenized = self.recipe(dataset), dataset in self.tokenized_datasets
            found = find_sources(dataset, recipe, is_tokenized)
            if recipe.sources.files and not is_tokenized:
                self._report_files(dataset, "sources.files", found)
            check_weights(dataset, recipe, found)
            self._sources[dataset] = found
        return self._sources[dataset]

    def batches(self, dataset: str) -> list[str]:
        """Names of a data set's batches of `shards_per_job` files: "000", "001", …"""
        count = -(-len(self.sources(dataset)) // self.pipeline.shards_per_job)
        return [f"{index:03d}" for index in range(count)]

    def batch_sources(self, dataset: str, batch: str) -> list[Source]:
        """The source files of one batch."""
        size = self.pipeline.shards_per_job
        return self.sources(dataset)[int(batch) * size : (int(batch) + 1) * size]

    def listings(self, dataset: str, stage: str) -> list[str]:
        """The listings of a stage's batches: each names the files that one job has written."""
        return [f"data/{dataset}/{stage}/{batch}.tsv" for batch in self.batches(dataset)]

    def find_smaller_run(self, dataset: str) -> str | None:
        """A run whose data set is at most a hundredth of another, trained with the same config."""
        runs = self.pipeline.runs
        same = {run.train for run in runs.values() if run.dataset == dataset}
        size = self.recipe(dataset).sources.total_bytes or 0
        for name, run in runs.items():
            if run.train in same and run.dataset not in (None, dataset):
                other = self.recipe(run.dataset).sources.total_bytes
                if other is not None and other * 100 <= size:
                    return name
        return None

    def needs_source_list(self, dataset: str) -> bool:
        """Whether a data set's list of URLs must be downloaded before its files are known."""
        sources = self.recipe(dataset).sources
        table = source_table_path(dataset, sources)
        needs_list = bool(sources.url_list) and not table.exists()
        if needs_list:
            self._report_once(
                dataset,
                f": its files are known after its list ({table}) has been downloaded. Then, for "
                f"each {self.pipeline.shards_per_job} of them: sources → documents → tokens; and "
                "for the data set: tokenizer, order → train → evaluate",
            )
        return needs_list

    def local_files(self, dataset: str, batch: str) -> list[str]:
        """The local files of a batch, which snakemake watches for changes."""
        return local_files(self.batch_sources(dataset, batch))

    def source_flags(self, dataset: str, batch: str) -> str:
        """A batch's sources as flags of `olmo sources`."""
        return source_flags(dataset, self.recipe(dataset), self.batch_sources(dataset, batch))

    def tokenizer_file(self, dataset: str) -> list[str]:
        """The file that a data set's tokenizer is copied from; [] if there is none."""
        file = self.recipe(dataset).tokenizer.file
        if file is not None and dataset not in self._tokenizer_from:
            check_file_exists(file, f"{recipe_path(dataset)}: tokenizer.file")
        return [] if file is None else [file]

    def trains_tokenizer(self, dataset: str) -> bool:
        return self.recipe(dataset).tokenizer.train_vocab_size is not None

    def geometry_flags(self, run: str) -> str:
        """How many processes train a run, and where."""
        geometry = self.run(run).geometry
        words = ["--processes", geometry.processes]
        if geometry.nodes > 1:
            words += ["--nodes", geometry.nodes, "--min-nodes", geometry.effective_min_nodes]
        if geometry.max_restarts:
            words += ["--max-restarts", geometry.max_restarts]
        return shlex.join(map(str, words))

    def scheduler_resource(self, run: str, name: str, attempt: int = 1) -> int | str | None:
        """A run's value of snakemake's resource `name`; None leaves the resource out.

        A further attempt requests min_nodes: the other nodes may be lost, and a run with min_nodes
        prefers fewer nodes over waiting.

        One task for each node: srun starts torchrun there, which starts the processes. A run on
        one node needs no srun; `mpi` tells the SLURM executor that the job calls srun itself.
        """
        geometry, gpus = self.run(run).geometry, self.run(run).gpus_per_node
        nodes = geometry.nodes if attempt == 1 else geometry.effective_min_nodes
        resources: dict[str, int | str | None] = {
            "nodes": nodes if nodes > 1 else None,
            "tasks": nodes if nodes > 1 else None,
            "mpi": "srun" if nodes > 1 else None,
            "gres": f"{self.pipeline.gpu}:{gpus}" if gpus else None,
            "tasks_per_gpu": 0 if gpus else None,  # else the executor starts a task for each
        }
        return resources[name]

    def evaluation_flags(self, run: str) -> str:
        """A run's evaluation config as a flag; ValueError for an unknown choice task."""
        from olmo.eval.tasks import find_task

        config = self.evaluation(run)
        for label in config.choices:
            find_task(label)
        return json_flag("config", config.update_with(heldout=[]))  # files are a rule's inputs

    def evaluation(self, run: str) -> EvaluationConfig:
        """A run's evaluation config; the defaults if it names none."""
        path = self.run(run).evaluation
        if path is None:
            return EvaluationConfig()
        check_file_exists(path, f"config/config.yaml: runs.{run}.evaluation")
        config = EvaluationConfig.load(path)
        check_environment_values(config, path, ("data", "task_files"))
        return config

    def heldout_results(self, run: str) -> list[str]:
        """The result on the documents that a run's data set held out; [] if it held out none.

        Raises:
            ValueError: there is nothing else to evaluate either.
        """
        dataset = self.dataset(run)
        if self.recipe(dataset).documents.heldout_share:
            return [f"checkpoints/{run}/heldout.json"]
        config = self.evaluation(run)
        if not (config.choices or config.harness or config.heldout):
            recipe = f"; or set documents.heldout_share in {recipe_path(dataset)}"
            raise ValueError(
                f"eval/{run}: expected something to measure, found no held-out documents in the "
                "run's data and no tasks; give the run `evaluation: config/eval/hub.yaml` in "
                "config/config.yaml, or a file of yours"
                + recipe
                * (dataset not in self.tokenized_datasets)
            )
        return []

    def further_heldout_results(self, run: str) -> list[str]:
        """The results on the held-out documents of other data sets."""
        return [f"checkpoints/{run}/heldout/{name}.json" for name in self.evaluation(run).heldout]

    def section(self, dataset: str, part: str, flag: str = "config") -> str:
        """A section of a recipe as a flag of its stage's command: the fields that are set."""
        found = getattr(self.recipe(dataset), part)
        return "" if found is None else json_flag(flag, found)

    def line_kind_flags(self, dataset: str) -> str:
        """What a line of a data set's sources is, if not a document."""
        return f"--kind {MESSAGES}" if self.recipe(dataset).instructions is not None else ""

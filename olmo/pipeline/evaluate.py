"""Evaluation of a finished run: held-out perplexity, choice tasks, lm-eval; one table.

Each measurement is a stage of its own, so that a changed list of tasks runs only the new ones.
Their answers are in checkpoints/<run>/answers; eval/<run> is made from them.
"""

import dataclasses
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from olmo.config import TrainConfig
from olmo.corpus.docstrings import DATASET, stdlib_docstrings
from olmo.corpus.listing import read_listing, read_objects
from olmo.corpus.stdlib import library_digest
from olmo.corpus.tokens import AS_TEXT
from olmo.eval.questions import HARNESS, OURS
from olmo.inspect.documents import TokenShard, find_token_shards, require_shard, select_shards
from olmo.pipeline.conditions import measurement_conditions
from olmo.pipeline.document_losses import document_losses
from olmo.pipeline.recipe import EvaluationConfig
from olmo.runtime.numbers import encode_non_finite, from_json, to_json
from olmo.store.stage import Facts, Folder, Input, Inputs, Output, Unhashed, current_store, stage

if TYPE_CHECKING:
    from olmo.eval.final import Answers


def heldout(
    checkpoint: Path,
    tokens: list[Path],
    results: Path,
    documents: Path,
    tokenizers: tuple[Path, ...] = (),
) -> None:
    """Loss and perplexity of a final checkpoint on the documents a data set held out.

    `results` has those of token files, as in the loop; `documents` the loss of each document by
    itself, as lm-eval computes it for bits per byte.

    `tokenizers`, of the run and of another data set, must be equal. So must those that, by the
    store's records, made the run's tokens and the held-out ones.

    Args:
        tokens: listings of tokens with held-out documents
        results: JSON file to write
        documents: parquet file to write, a row for each document
        tokenizers: tokenizer.json of the run, and of the held-out documents
    """
    found = {current_store().digest(path): str(path) for path in tokenizers}
    known = find_token_shards(current_store())
    cfg = TrainConfig.load(checkpoint / "config.yaml", untrusted=True)
    listed = read_listing(tokens, "heldout-tokens")
    for shard in select_shards((*(cfg.data.paths or []), *(e.sha256 for e in listed)), known):
        digest = shard.tokenizer.name
        found.setdefault(digest, f"{digest[:12]}…")
    if len(found) > 1:
        raise ValueError(
            "expected one tokenizer for the run and for the held-out documents, found two: "
            + " and ".join(found.values())
            + "; set the recipe's `tokenizer: {file: …}` to the run's, or remove the data set from "
            "`heldout`"
        )
    heldout = read_objects(tokens, "heldout-tokens", skip_empty=True)
    if not heldout:
        raise ValueError(
            f"expected held-out documents, found none in {len(tokens)} listings, as "
            f"{', '.join(map(str, tokens[:1]))}; set documents.heldout_share in the data set's "
            "recipe, or raise it (token files that a training config names have none)"
        )
    heldout_perplexity(
        model=checkpoint / "model.safetensors",
        config=checkpoint / "config.yaml",
        heldout=heldout,
        labels=read_objects(tokens, "heldout-labels", skip_empty=True) or None,
        results=results,
        checkpoint=checkpoint,
    )
    measure_each(checkpoint, [require_shard(e.sha256, known) for e in listed if e.bytes], documents)


def measure_each(checkpoint: Path, shards: list[TokenShard], losses: Path) -> None:
    """Run `document_losses` on the held-out documents of shards, all of one kind."""
    is_labelled = "labels" in shards[0].record["outputs"]
    names = ("tokens", "index", "labels") * is_labelled
    special = shards[0].record["action"]["params"].get("special_tokens")
    document_losses(
        model=checkpoint / "model.safetensors",
        config=checkpoint / "config.yaml",
        documents=[shard.documents_path for shard in shards],
        tokenizer=shards[0].find_object("tokenizer", shards[0].tokenizer.name),
        losses=losses,
        checkpoint=checkpoint,
        special_as_text=special == AS_TEXT,
        **{name: [shard.find_output(name) for shard in shards] for name in names},
    )


def docstrings(folder: Path) -> None:
    """Make a choice task from the docstrings of this Python's standard library."""
    stdlib_docstrings(folder=folder, library=library_digest())


def evaluate(
    checkpoint: Path,
    hf: Path,
    tokenizer: Path,
    docstrings: Path,
    answers: Path,
    results: Path,
    config: EvaluationConfig,
    heldout: Path | None = None,
    further: tuple[Path, ...] = (),
    losses: tuple[Path, ...] = (),
) -> None:
    """Evaluate a finished run on the tasks of `config`, and write a table.

    `checkpoint` is a final folder, `hf` its export, `heldout` the result of `olmo heldout`, if
    documents were held out, `further` its results on other data sets (<data set>.json),
    `docstrings` the folder of `olmo docstrings`. `answers` and `results` are the folders that are
    written.

    Args:
        hf: folder of the checkpoint's export
        docstrings: folder of `olmo docstrings`
        answers: folder to write, with each answer
        config: the evaluation config, config/eval/<name>.yaml
        heldout: result of `olmo heldout`
        further: its results on other data sets
        losses: the losses of documents that it wrote beside each of these

    Raises ValueError for a task that is unknown, that has no answers, or whose data is neither here
    nor on the hub.
    """
    from olmo.eval.rows import list_local_files
    from olmo.eval.tasks import find_task, load_tasks

    data = None if config.data is None else Path(config.data)
    task_files = [Path(path) for path in config.task_files]

    def find_rows(label: str) -> tuple[Path | None, list[Path]]:
        task = find_task(label)
        folder = docstrings if task.dataset == DATASET else data
        splits = filter(None, (task.split, task.shots_split))
        rows = list_local_files(task.dataset, task.configs, splits, folder) if folder else []
        return folder, rows

    names = sorted(set(config.harness))
    for path in task_files:
        if not any(file.is_file() for file in path.rglob("*")):
            raise ValueError(f"task_files: expected a folder with files, found none in {path}")
    answered = []
    for label in config.choices:
        folder, rows = find_rows(label)
        choice_task(
            model=checkpoint / "model.safetensors",
            config=checkpoint / "config.yaml",
            tokenizer=tokenizer,
            rows=rows,
            task=dataclasses.asdict(find_task(label)),
            answers=answers / OURS / label,
            checkpoint=checkpoint,
            data=folder,
            batch_size=config.batch_size,
            limit=config.limit,
        )
        answered.append(answers / OURS / label)
    if config.harness:
        local = {label: find_rows(label) for label in config.harness if label in load_tasks()}
        local = {label: (folder, rows) for label, (folder, rows) in local.items() if rows}
        # Which data sets a task of the harness reads is known only when it has run.
        copies = data if data and not set(names) <= local.keys() else None
        copied = (
            sorted(p for p in (copies / "hf_datasets").rglob("*") if p.is_file()) if copies else []
        )
        harness_tasks(
            model=sorted(p for p in hf.iterdir() if p.suffix in (".json", ".safetensors"))
            if hf.is_dir()
            else [hf],
            rows=[row for _, rows in local.values() for row in rows] + copied,
            files=sorted(p for f in task_files for p in f.rglob("*") if p.is_file()),
            names=names,
            ours={label: dataclasses.asdict(find_task(label)) for label in local},
            versions={name: version(name) for name in ("lm-eval", "transformers")},
            answers=answers / HARNESS,
            checkpoint=checkpoint,
            hf=hf,
            data={label: folder for label, (folder, _) in local.items() if folder},
            task_files=task_files,
            copies=copies,
            batch_size=config.batch_size,
            limit=config.limit,
        )
        answered.append(answers / HARNESS)
    evaluation(
        heldout=heldout,
        scores=[folder / "scores.json" for folder in answered],
        questions=[folder / "questions.parquet" for folder in answered],
        requests=[folder / "requests.parquet" for folder in answered],
        results=results,
        further=list(further) or None,
        losses=list(losses) or None,
        datasets=tuple(path.stem for path in further),
        suites={
            name: [dataclasses.asdict(member) for member in members]
            for name, members in config.suites.items()
        },
    )


@stage(version=4)
def heldout_perplexity(
    model: Input,
    config: Input,
    heldout: Inputs,
    results: Output,
    checkpoint: Unhashed[Path],
    labels: Inputs | None = None,
) -> Facts:
    """Mean loss (nats per token) with its standard error, and perplexity, on held-out files.

    `checkpoint` is the folder of `model` and `config`; `labels` are masks of the tokens that count.
    """
    from olmo.eval.final import measure_perplexity

    measured = measure_perplexity(checkpoint, heldout, labels)
    results.write_text(to_json(measured, indent=1, sort_keys=True) + "\n")
    return {"facts": encode_non_finite(measured), "conditions": measurement_conditions(checkpoint)}


@stage(version=2)
def choice_task(
    model: Input,
    config: Input,
    tokenizer: Input,
    rows: Inputs,
    task: dict[str, Any],
    answers: Folder,
    checkpoint: Unhashed[Path],
    data: Unhashed[Path | None],
    batch_size: Unhashed[int],
    limit: int | None = None,
) -> Facts:
    """A multiple-choice task by our own scorer: scores.json, questions.parquet, requests.parquet.

    `rows` are the files of its documents in `data`. If there are none, the documents come from the
    hub, and are not in the action's key.
    """
    from olmo.eval.final import Answers, score_task
    from olmo.eval.tasks import ChoiceTask

    choice = ChoiceTask(**task)
    found = score_task(checkpoint, choice, tokenizer, data, batch_size, limit)
    labelled = Answers(*([{"task": choice.label, **row} for row in rows] for rows in found))
    scores = write_answers(answers, OURS, labelled)
    where = measurement_conditions(checkpoint) | {"batch_size": batch_size}
    return {"facts": encode_non_finite({"scores": scores}), "conditions": where}


@stage(version=2)
def harness_tasks(
    model: Inputs,
    rows: Inputs,
    files: Inputs,
    names: list[str],
    ours: dict[str, Any],
    versions: dict[str, str],
    answers: Folder,
    checkpoint: Unhashed[Path],
    hf: Unhashed[Path],
    data: Unhashed[dict[str, Path]],
    task_files: Unhashed[list[Path]],
    copies: Unhashed[Path | None],
    batch_size: Unhashed[int],
    limit: int | None = None,
) -> Facts:
    """Tasks by lm-evaluation-harness on an export: scores.json, questions and requests.parquet.

    `ours` are tasks of tasks.yaml whose documents, `rows`, are in `data`: they are written as tasks
    of the harness. `files` are the files in the folders `task_files`; those of `copies`, a folder
    of data sets, are among `rows`.
    """
    import torch

    from olmo.eval.harness import run_harness, write_task
    from olmo.eval.tasks import ChoiceTask

    torch.set_num_threads(measurement_conditions(checkpoint)["threads"])
    with TemporaryDirectory() as place:
        for label, fields in ours.items():
            write_task(ChoiceTask(**fields), data[label], Path(place))
        folders = [*task_files, *([Path(place)] if ours else [])]
        found = run_harness(hf, names, folders, batch_size, limit, copies)
    scores = write_answers(answers, HARNESS, found)
    where = measurement_conditions(checkpoint) | {"batch_size": batch_size}
    return {"facts": encode_non_finite({"scores": scores}), "conditions": where}


@stage(version=4)
def evaluation(
    heldout: Input | None,
    scores: Inputs,
    questions: Inputs,
    requests: Inputs,
    results: Folder,
    further: Inputs | None = None,
    datasets: tuple[str, ...] = (),
    losses: Inputs | None = None,
    suites: dict[str, Any] | None = None,
) -> Facts:
    """All results of a run: results.json and .parquet, questions and requests.parquet, table.md.

    With `losses`, of the documents of `heldout` and of each of `further`, also documents.parquet:
    dataset ("heldout", or "heldout of <data set>"), document, digest, tokens, bytes, nats.
    """
    import polars

    from olmo.eval.questions import score_suite
    from olmo.report.differences import QUESTIONS
    from olmo.report.scores import SCHEMA, format_run_table, heldout_scores

    results_of = {"heldout": heldout} if heldout else {}
    results_of |= {f"heldout of {d}": p for d, p in zip(datasets, further or (), strict=True)}
    each = [polars.read_parquet(path) for path in losses or ()]
    rows: list[dict[str, Any]] = []
    for (task, path), documents in zip_longest(results_of.items(), each):
        rows += heldout_scores(from_json(path.read_text()), task, documents)
    for path in scores:
        rows += from_json(path.read_text())
    rows += [score_suite(name, members, rows) for name, members in (suites or {}).items()]
    results.mkdir()
    (results / "results.json").write_text(to_json(rows, indent=1) + "\n")
    frame = polars.DataFrame(rows, schema=SCHEMA)
    frame.write_parquet(results / "results.parquet")
    (results / "table.md").write_text(format_run_table(rows))
    if each:
        named = zip(results_of, each, strict=True)
        documents = polars.concat(d.select(polars.lit(t).alias("dataset"), "*") for t, d in named)
        documents.write_parquet(results / "documents.parquet")
    asked = [polars.read_parquet(path) for path in questions]
    asked = [polars.DataFrame(schema=QUESTIONS), *asked]
    polars.concat(asked).write_parquet(results / "questions.parquet")
    answered = [polars.read_parquet(path) for path in requests]
    if answered:
        polars.concat(answered, how="diagonal").write_parquet(results / "requests.parquet")
    return {"facts": {"scores": len(rows)}}


def write_answers(folder: Path, scorer: str, found: "Answers") -> list[dict[str, Any]]:
    """Write scores.json, questions.parquet and requests.parquet; returns the scores."""
    import polars

    from olmo.report.differences import QUESTIONS

    folder.mkdir()
    scores, questions, requests = ([{"scorer": scorer, **row} for row in rows] for rows in found)
    (folder / "scores.json").write_text(to_json(scores, indent=1) + "\n")
    polars.DataFrame(questions, schema=QUESTIONS).write_parquet(folder / "questions.parquet")
    asked = polars.DataFrame(requests, infer_schema_length=None)
    asked.write_parquet(folder / "requests.parquet")
    return scores

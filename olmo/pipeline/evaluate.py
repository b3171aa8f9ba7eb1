"""Evaluation of a finished run, as stages: held-out perplexity, choice tasks, lm-eval; one table.

What is measured is a stage each, so that a changed list of tasks asks the new ones only. Their
answers lie beside the run, in checkpoints/<run>/answers; eval/<run> is made of them.
"""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from olmo.config import TrainConfig
from olmo.corpus.docstrings import DATASET, stdlib_docstrings
from olmo.corpus.listing import read_listing
from olmo.corpus.stdlib import library_digest
from olmo.inspect.documents import digest_of, shards
from olmo.pipeline.recipe import EvaluationConfig
from olmo.runtime.numbers import encode_non_finite, from_json, to_json
from olmo.store.stage import Facts, Folder, Input, Inputs, Output, Unhashed, current_store, stage

OURS, HARNESS = "ours", "lm-eval"  # who asked


def heldout(
    checkpoint: Path, tokens: list[Path], results: Path, tokenizers: tuple[Path, ...] = ()
) -> None:
    """Loss and perplexity of a final checkpoint on the documents a data set held out.

    `tokenizers` must be one and the same: the run's, and that of another data set. Those that the
    store knows the run's tokens and the held-out ones to be made with are compared unasked.
    """
    named = {current_store().digest(path): str(path) for path in tokenizers}
    known = shards(current_store())
    cfg = TrainConfig.load(checkpoint / "config.yaml", foreign=True)
    ours = map(digest_of, cfg.data.paths or [])
    theirs = [entry.sha256 for entry in read_listing(tokens, "heldout-tokens")]
    for digest in (known[name].tokenizer.name for name in (*ours, *theirs) if name in known):
        named.setdefault(digest, f"{digest[:12]}…")
    if len(named) > 1:
        raise ValueError(
            "expected one tokenizer for the run and for the held-out documents, found two: "
            + " and ".join(named.values())
            + ". Give the recipe `tokenizer: {file: …}` of the run's, or take the data set out of "
            "`heldout`"
        )
    heldout = [entry.object for entry in read_listing(tokens, "heldout-tokens") if entry.bytes]
    if not heldout:
        raise ValueError(
            f"expected held-out documents, found none in {len(tokens)} listings, as "
            f"{', '.join(map(str, tokens[:1]))}; set documents.heldout_share in the data set's "
            "recipe, or raise it. Token files that a training config names have none"
        )
    heldout_perplexity(
        model=checkpoint / "model.safetensors",
        config=checkpoint / "config.yaml",
        heldout=heldout,
        labels=[entry.object for entry in read_listing(tokens, "heldout-labels") if entry.bytes]
        or None,
        results=results,
        checkpoint=checkpoint,
    )


def docstrings(folder: Path) -> None:
    """Make the choice task that needs no network, of the running Python's standard library."""
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
) -> None:
    """Ask a finished run what `config` names; tabulate.

    `checkpoint` is a final folder, `hf` its export, `heldout` what `olmo heldout` found, if
    anything was held out, `further` what it found of other data sets (<data set>.json),
    `docstrings` what `olmo docstrings` made. `answers` and `results` are the folders that are
    written.

    Raises ValueError for a task that there is not, that has no answers, or whose data is not here
    and not to be had from the hub.
    """
    from olmo.eval.rows import local_files
    from olmo.eval.tasks import task_of, tasks

    data = None if config.data is None else Path(config.data)
    task_files = [Path(path) for path in config.task_files]

    def place(label: str) -> tuple[Path | None, list[Path]]:
        task = task_of(label)
        folder = docstrings if task.dataset == DATASET else data
        splits = filter(None, (task.split, task.shots_split))
        found = local_files(task.dataset, task.configs, splits, folder) if folder else []
        return folder, found

    for path in task_files:
        if not any(file.is_file() for file in path.rglob("*")):
            raise ValueError(f"task_files: expected a folder with files, found none in {path}")
    found = []
    for label in config.choices:
        folder, rows = place(label)
        choice_task(
            model=checkpoint / "model.safetensors",
            config=checkpoint / "config.yaml",
            tokenizer=tokenizer,
            rows=rows,
            task=dataclasses.asdict(task_of(label)),
            answers=answers / OURS / label,
            checkpoint=checkpoint,
            data=folder,
            batch_size=config.batch_size,
            limit=config.limit,
        )
        found.append(answers / OURS / label)
    if config.harness:
        local = {label: place(label) for label in config.harness if label in tasks()}
        local = {label: (folder, rows) for label, (folder, rows) in local.items() if rows}
        harness_tasks(
            model=sorted(p for p in hf.iterdir() if p.suffix in (".json", ".safetensors"))
            if hf.is_dir()
            else [hf],
            rows=[row for _, rows in local.values() for row in rows],
            files=sorted(p for f in task_files for p in f.rglob("*") if p.is_file()),
            names=sorted(set(config.harness)),
            ours={label: dataclasses.asdict(task_of(label)) for label in local},
            versions={name: version(name) for name in ("lm-eval", "transformers")},
            answers=answers / HARNESS,
            checkpoint=checkpoint,
            hf=hf,
            data={label: folder for label, (folder, _) in local.items() if folder},
            task_files=task_files,
            batch_size=config.batch_size,
            limit=config.limit,
        )
        found.append(answers / HARNESS)
    evaluation(
        heldout=heldout,
        scores=[folder / "scores.json" for folder in found],
        requests=[folder / "requests.parquet" for folder in found],
        results=results,
        further=list(further) or None,
        datasets=tuple(path.stem for path in further),
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
    """Mean loss in nats a token with its standard error, and perplexity, over held-out files.

    `checkpoint` is the folder that holds `model` and `config`; `labels` say which tokens count.
    """
    from olmo.eval.final import perplexity

    found = perplexity(checkpoint, heldout, labels)
    results.write_text(to_json(found, indent=1, sort_keys=True) + "\n")
    return {"facts": encode_non_finite(found), "conditions": circumstances(checkpoint)}


@stage(version=1)
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
    """A multiple-choice task by our own scorer: scores.json and requests.parquet.

    `rows` are its documents' files in `data`; where they are none, the hub is asked, and what it
    answers is no part of the identity.
    """
    from olmo.eval.final import choices
    from olmo.eval.tasks import Task

    asked = Task(**task)
    scores, requests = choices(checkpoint, asked, tokenizer, data, batch_size, limit)
    scores = [{"scorer": OURS, "task": asked.label, **score} for score in scores]
    write_answers(answers, scores, [{"task": asked.label, **row} for row in requests])
    where = circumstances(checkpoint) | {"batch_size": batch_size}
    return {"facts": encode_non_finite({"scores": scores}), "conditions": where}


@stage(version=1)
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
    batch_size: Unhashed[int],
    limit: int | None = None,
) -> Facts:
    """Tasks by lm-evaluation-harness on an export: scores.json and requests.parquet.

    `ours` are tasks of tasks.yaml whose documents, `rows`, are in `data`: the harness is given
    them as tasks of its own. `files` are those of `task_files`.
    """
    import torch

    from olmo.eval.harness import ask, write_task
    from olmo.eval.tasks import Task

    torch.set_num_threads(circumstances(checkpoint)["threads"])
    with TemporaryDirectory() as place:
        for label, fields in ours.items():
            write_task(Task(**fields), data[label], Path(place))
        folders = [*task_files, *([Path(place)] if ours else [])]
        scores, requests = ask(hf, names, folders, batch_size, limit)
    scores = [{"scorer": HARNESS, **score} for score in scores]
    write_answers(answers, scores, requests)
    where = circumstances(checkpoint) | {"batch_size": batch_size}
    return {"facts": encode_non_finite({"scores": scores}), "conditions": where}


@stage(version=1)
def evaluation(
    heldout: Input | None,
    scores: Inputs,
    requests: Inputs,
    results: Folder,
    further: Inputs | None = None,
    datasets: tuple[str, ...] = (),
) -> Facts:
    """All that was measured of a run: results.json, results.parquet, requests.parquet, table.md."""
    import polars

    from olmo.report.scores import SCHEMA, format_run_table, heldout_scores

    rows = heldout_scores(from_json(heldout.read_text()), "heldout") if heldout else []
    for path, dataset in zip(further or (), datasets, strict=True):
        rows += heldout_scores(from_json(path.read_text()), f"heldout of {dataset}")
    for path in scores:
        rows += from_json(path.read_text())
    results.mkdir()
    (results / "results.json").write_text(to_json(rows, indent=1) + "\n")
    frame = polars.DataFrame(rows, schema=SCHEMA)
    frame.write_parquet(results / "results.parquet")
    (results / "table.md").write_text(format_run_table(rows))
    asked = [polars.read_parquet(path) for path in requests]
    if asked:
        polars.concat(asked, how="diagonal").write_parquet(results / "requests.parquet")
    return {"facts": {"scores": len(rows)}}


def write_answers(
    folder: Path, scores: list[dict[str, Any]], requests: list[dict[str, Any]]
) -> None:
    import polars

    folder.mkdir()
    (folder / "scores.json").write_text(to_json(scores, indent=1) + "\n")
    by = scores[0]["scorer"] if scores else HARNESS
    rows = [{"scorer": by, **row} for row in requests]
    polars.DataFrame(rows, infer_schema_length=None).write_parquet(folder / "requests.parquet")


def circumstances(checkpoint: Path) -> dict[str, Any]:
    """What the bits of a measurement depend on besides what was asked."""
    import torch

    cfg = TrainConfig.load(checkpoint / "config.yaml", foreign=True)
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": cfg.intra_op_threads or torch.get_num_threads(),
        "torch": version("torch"),
    }

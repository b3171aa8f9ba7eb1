"""`olmo fork`: the run that would have been, without a document, a source or some steps.

It says first what that costs, and then adds a run to config/config.yaml. Like any other run it is
made by snakemake; its steps before the first difference are those of the run that it comes from.
"""

from __future__ import annotations

import shlex
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from olmo.config import PROJECT_CONFIG, TrainConfig, read_project_config
from olmo.config.identity import identity
from olmo.config.strict import non_default_fields
from olmo.corpus.listing import read_listing
from olmo.corpus.skip import (
    Skip,
    SkipRule,
    check_skipped,
    describe_skipped,
    find_spans,
    merge_spans,
    parse_step_range,
    skipped,
)
from olmo.data.files import token_itemsize
from olmo.inspect.run import find_config
from olmo.io import sealed, untrusted
from olmo.pipeline.new import add_run
from olmo.pipeline.parts import check_can_move_up, order_path
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import RunConfig
from olmo.pipeline.reuse import saved_steps
from olmo.runtime.log import format_duration
from olmo.store.record import Record, parse_record
from olmo.store.stage import Facts, current_store
from olmo.train.chain import STATE, identity_until
from olmo.train.sinks import read_metrics

PACE = "throughput/device/batches_per_second"
KINDS = ("document", "source", "steps")


@dataclass(frozen=True)
class Quote:
    """What a run without something costs."""

    skip: Skip
    facts: Facts  # of the stage `skipped`
    shared: int  # steps that are those of the run that is forked
    place: str  # where their state is
    steps: int  # of the whole run
    seconds: float | None  # of the steps to train; None: not known


def fork(run: str, /, without: list[str], by: SkipRule = SkipRule.mask, name: str = "") -> None:
    """Say what a run would cost without a document, a source or steps; with --name, add that run.

    The order of the data stays. Labels of documents and sources are masked (--by mask), or their
    instances are removed and the next ones move up (--by next); steps are always removed. The steps
    before the first difference are taken from the run, up to its last link or checkpoint there.

    Args:
        run: name in config/config.yaml, of a finished run
        without: ids of documents, names or patterns of sources, steps (5 or 100..119); if one could
            be another, document:ID, source:NAME or steps:5..9
        by: mask or next
        name: of the new run in config/config.yaml; without it nothing is written

    Example:
        olmo fork olmo-tiny --without stdlib-03
        olmo fork olmo-tiny --without 100..119 --name olmo-tiny-without-spike
    """
    plan = Plan(read_project_config())
    record = find_record(plan, run)
    listings = [Path(path) for path in plan.listings(plan.dataset(run), "tokens")]
    entries = read_listing(listings, "tokens")
    if [entry.sha256 for entry in entries] != record["action"]["inputs"]["tokens"]:
        raise ValueError(
            f"checkpoints/{run}/final was trained on other token files than {plan.dataset(run)} "
            f"has now; train it again: uv run snakemake --cores 2 checkpoints/{run}/final"
        )
    skip = parse_without(without, by, [entry.shard for entry in entries])
    quote = make_quote(plan, run, record, skip, listings)
    settings = fork_settings(plan.run(run), skip, quote.shared)
    print(format_quote(run, quote))
    if not name:
        words = ["olmo", "fork", run, "--without", *without, "--by", by, "--name", "NAME"]
        print(f"Add it to {PROJECT_CONFIG}: {shlex.join(words)}")
        return
    untrusted.check_part(name, "olmo fork --name")
    if plan.is_made_here(name):
        raise ValueError(f"--name: expected a new name, found the run {name}; give another one")
    text = add_run(Path(PROJECT_CONFIG).read_text(encoding="utf-8"), name, settings)
    sealed.write_atomic(Path(PROJECT_CONFIG), text)
    print(f"{name} is in {PROJECT_CONFIG}. Train it:")
    print(f"  uv run snakemake --cores 2 checkpoints/{name}/final")


def find_record(plan: Plan, run: str) -> Record:
    """The record of a finished run whose settings are those of config/config.yaml.

    Raises ValueError for a run that is not finished, that skips something, or that has changed.
    """
    settings = plan.run(run)
    if run in plan.pipeline.soups:
        raise ValueError(
            f"expected a run that was trained, found the soup {run}; name one of its "
            f"runs, {', '.join(plan.pipeline.soups[run])}"
        )
    if settings.skip:
        raise ValueError(
            f"expected a run that leaves nothing out, found {run}; fork the run that it comes "
            "from, and name all that is left out"
        )
    path = Path("checkpoints", run, "final", "record.json")
    if not path.exists():
        find_config(run)  # raises, with a remedy, if there is no such run
        raise ValueError(
            f"expected a finished run, found none in {path.parent}; train it: uv run snakemake "
            f"--cores 2 {path.parent}"
        )
    record = parse_record(path.read_bytes(), path)
    cfg = plan.train_config(run).update_with()
    if settings.mixture:
        cfg = cfg.update_with(data=cfg.data.update_with(mixture=True))
    if identity(cfg) != record["action"]["params"]["settings"]:
        raise ValueError(
            f"{path.parent} was trained with other settings than {settings.train} and "
            f"{PROJECT_CONFIG} have now; undo the change, or train it again: uv run snakemake "
            f"--cores 2 {path.parent}"
        )
    return record


def parse_without(words: Sequence[str], by: SkipRule, sources: Sequence[str]) -> Skip:
    """What is left out, of the words on the command line.

    Args:
        sources: their names in the data set.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for word in words:
        kind, colon, rest = word.partition(":")
        if colon and kind in KINDS:
            found[kind].append(rest)
        elif any(fnmatchcase(source, word) for source in sources):
            found["source"].append(word)
        elif word.replace("..", "", 1).isdecimal():
            found["steps"].append(word)
        else:
            found["document"].append(word)
    if not any(found.values()):
        raise ValueError("--without: expected a document, a source or steps, found nothing")
    for steps in found["steps"]:
        parse_step_range(steps)
    return Skip(found["document"], found["source"], found["steps"], by)


def make_quote(plan: Plan, run: str, record: Record, skip: Skip, listings: list[Path]) -> Quote:
    """What the run without something costs.

    Raises ValueError if the run does not use it, or too few instances remain.
    """
    cfg, steps = plan.train_config(run), int(record["facts"]["steps"])
    length, width = cfg.model.max_sequence_length, token_itemsize(cfg.data.memmap_dtype)
    if skip.steps and max(last for _, last in skip.step_ranges) > steps:
        raise ValueError(f"--without: expected steps up to {steps}, where {run} ends")
    if skip.shortens:
        check_can_move_up(plan, run)
    with tempfile.TemporaryDirectory() as folder:
        facts = skipped.build(
            order=Path(order_path(run)),
            remaining=Path(folder, "remaining"),
            holes=Path(folder, "holes"),
            spans=merge_spans(find_spans(listings, skip, length, width)),
            steps=skip.step_ranges,
            sequence_length=length,
            batch_size=cfg.global_train_batch_size,
            by=skip.by,
        )
    if facts["first_step"] is None or (facts["first_step"] > steps and cfg.epoch is None):
        raise ValueError(
            f"{run} was not trained on it: it comes after the run's end in the data order, or in "
            "the incomplete last instance of a file"
        )
    check_skipped(facts, skip, 0, cfg.global_train_batch_size, steps, length)
    states = known_states(run, record)
    shared = max((step for step in states if step < facts["first_step"]), default=0)
    seconds = expect_seconds(record, Path("checkpoints", run, "final"), steps - shared)
    return Quote(skip, facts, shared, states.get(shared, ""), steps, seconds)


def known_states(run: str, record: Record) -> dict[int, str]:
    """The steps at which a run's state is still there, and where."""
    found = {
        step: f"checkpoints/{run}/run/{path.name}"
        for step, path in saved_steps(current_store(), record).items()
    }
    cfg = TrainConfig.new(**record["action"]["params"]["settings"])
    for path in Path("checkpoints", run).glob("step-*/record.json"):
        link = parse_record(path.read_bytes(), path)["action"]
        until = link["params"]["until"]
        is_same = all(
            link["inputs"].get(name) == record["action"]["inputs"].get(name)
            for name in ("tokens", "labels", "start")
        )
        is_same &= all((path.parent / name).exists() for name in STATE)  # gc takes what has no pin
        if is_same and link["params"]["settings"] == identity_until(cfg, until):  # not an old one
            found[until] = str(path.parent)
    return found


def expect_seconds(record: Record, final: Path, steps: int) -> float | None:
    """How long so many steps take, by the run's own time; None if it is not known."""
    paces = [row[PACE] for row in read_metrics(final / "metrics.jsonl") if row.get(PACE)]
    if not paces:
        return None
    pace, facts = statistics.median(paces), record["facts"]
    start, segments = 0.0, facts.get("segments", ())
    if len(segments) == 1 and (wall := record.get("run", {}).get("wall_s")):
        start = max(0.0, wall - (facts["steps"] - segments[0]["after"]) / pace)
    return start + steps / pace


def fork_settings(settings: RunConfig, skip: Skip, shared: int) -> dict[str, Any]:
    """The settings of the run in config/config.yaml."""
    kept = non_default_fields(settings)
    kept |= {f"skip_{name}": value for name, value in non_default_fields(skip).items()}
    return kept | {"skip_after": shared}


def describe_left_out(skip: Skip) -> str:
    """What is left out, for people: what each word was taken for.

    >>> describe_left_out(Skip(documents=["a"], steps=["5", "7..9"]))
    'document a, steps 5, 7..9'
    """
    kinds = {"document": skip.documents, "source": skip.sources, "steps": skip.steps}
    return ", ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names)


def format_quote(run: str, quote: Quote) -> str:
    """The quote for people."""
    to_train, first = quote.steps - quote.shared, quote.facts["first_step"]
    lines = [
        f"{run} without {describe_left_out(quote.skip)}: {describe_skipped(quote.facts)}",
        f"steps shared: {quote.shared:,}" + (f", from {quote.place}" if quote.shared else ""),
        f"steps to train: {to_train:,} of {quote.steps:,} ({to_train / quote.steps:.0%})",
    ]
    if quote.seconds is not None:
        lines.append(f"time: about {format_duration(quote.seconds)}, at the pace of {run}")
    if first - 1 - quote.shared > quote.steps // 10:
        lines.append(
            f"{first - 1 - quote.shared:,} more steps are equal, but {run} has no state there; a "
            "run with link_every keeps some"
        )
    return "\n".join(lines)

"""`olmo diff`: two runs side by side, and only where they differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from olmo.config.identity import identity
from olmo.corpus.mixture import read_parts
from olmo.corpus.skip import read_left_out
from olmo.inspect.documents import TokenShard, find_token_shards, select_shards
from olmo.inspect.run import TrainedRun
from olmo.report.runs import last_metrics
from olmo.report.scores import format_value, read_results
from olmo.report.series import LOSSES
from olmo.runtime.log import format_duration
from olmo.store.lineage import diff_actions, records_by_content
from olmo.store.record import Record
from olmo.store.stage import current_store

Fields = dict[str, Any]


def diff(a: str, b: str, /) -> None:
    """Show where two runs differ: in config, data, code and results, field by field.

    The config is what decides the result. Data and code are those of the stages that made the run's
    tokens.

    Args:
        a: name of a run, finished or not, or its folder
        b: the run to compare with it

    Example:
        olmo diff olmo-tiny olmo-tiny-muon
    """
    before, now = describe_run(a), describe_run(b)
    sections = {name: diff_actions(before[name], now[name], missing="none") for name in before}
    if not any(sections.values()):
        print(f"{a} and {b} do not differ")
        return
    print(f"{a} → {b}")
    for name, changed in sections.items():
        print(
            "".join([f"\n{name}\n", *(f"  {line}\n" for line in changed)]) * bool(changed), end=""
        )


def describe_run(
    name: str,
    known: dict[str, TokenShard] | None = None,
    made_by: dict[str, list[Record]] | None = None,
) -> dict[str, Fields]:
    """What is compared of a run: section → fields, nested ones too.

    Args:
        known: of `find_token_shards`, which reads every record, as does
        made_by: of `records_by_content`.
    """
    run, store = TrainedRun(name), current_store()
    known = find_token_shards(store) if known is None else known
    made_by = records_by_content(store) if made_by is None else made_by
    shards = select_shards(run.cfg.data.paths or [], known)
    stages: dict[str, dict[str, Record]] = {}
    for record in (record for shard in shards for record in shard.ancestry):
        stages.setdefault(record["action"]["stage"], {})[record["key"]] = record
    tokenizers = sorted({shard.tokenizer.name for shard in shards})
    cost: Fields = run.record.get("run", {}) if run.record else {}
    return {
        "config": describe_config(run, made_by),
        "data": {stage: describe_stage(found.values()) for stage, found in stages.items()}
        | {"tokenizer": ", ".join(tokenizers) or "none"},
        "code": {
            "stages": {stage: version_of(found.values()) for stage, found in stages.items()}
            | ({"training": version_of([run.record])} if run.record else {}),
            **{key: cost[key] for key in ("commit", "python", "tools") if cost.get(key)},
        },
        "results": describe_results(run, cost),
    }


def describe_config(run: TrainedRun, made_by: dict[str, list[Record]]) -> Fields:
    """The settings that decide a run's result, and the checkpoint that it starts from."""
    if run.record is None:
        return identity(run.cfg.update_with(load_path=None))
    action = run.record["action"]
    fields: Fields = dict(action["params"].get("settings", action["params"]))
    if start := action["inputs"].get("start"):
        bases = [record["facts"].get("run_name") for record in made_by.get(start[0], [])]
        fields["start_from"] = next(filter(None, bases), start[0])
    if parts := read_parts(action["inputs"].get("order", ""), made_by):
        fields["mixture"] = {
            f"from step {part['from_step']}": {
                row["weight"].partition("=")[0]: f"{row['expected']:.2%}" for row in part["mixture"]
            }
            for part in parts
        }
    if left_out := read_left_out(action["inputs"], made_by):
        fields["skip"] = left_out
    return fields


def describe_stage(records: Iterable[Record]) -> Fields:
    """A stage's parameters, and the sums of what its records count."""
    records = list(records)
    fields: Fields = {"files": len(records)}
    for name in sorted({name for record in records for name in record["action"]["params"]}):
        values = {str(record["action"]["params"].get(name)) for record in records}
        if name != "name":  # of a source file
            fields[name] = values.pop() if len(values) == 1 else f"{len(values)} values"
    for name in sorted({name for record in records for name in record["facts"]}):
        counts = [record["facts"].get(name, 0) for record in records]
        if all(type(count) is int for count in counts):
            fields[name] = f"{sum(counts):,}"
    return fields


def version_of(records: Iterable[Record]) -> str:
    """The version of a stage; of several versions all."""
    return ", ".join(sorted({str(record["action"]["version"]) for record in records}))


def describe_results(run: TrainedRun, cost: Fields) -> Fields:
    """A run's last losses, how far it came and how long it took, and its evaluation."""
    last = last_metrics(run.run_folder / "metrics.jsonl")
    fields: Fields = {
        name: f"{value:.4f}" for name, value in last.items() if name.split("/")[-1] in LOSSES
    }
    if "step" in last:
        fields["steps"] = f"{last['step']:,}"
    if "wall_s" in cost:
        fields["time"] = format_duration(cost["wall_s"])
    folder = Path(run.folder)
    name = folder.parent.name if folder.name in ("final", "run") else folder.name
    evaluation = Path("eval", name)
    if (evaluation / "results.json").exists():
        fields["evaluation"] = {
            f"{row['task']} {row['metric']} ({row['scorer']})": format_value(row)
            for row in read_results(evaluation)
        }
    return fields

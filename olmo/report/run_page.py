"""The page of a run: what is known of it, and how a template shows it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmo.config import read_project_config
from olmo.corpus.mixture import read_parts
from olmo.inspect.documents import find_token_shards, select_shards
from olmo.inspect.run import TrainedRun
from olmo.report import samples as sampling
from olmo.report.card import SOURCES
from olmo.report.charts import choose_charts, curve_specs, describe_curve
from olmo.report.diff import describe_config
from olmo.report.graph import MEAN, Action, Graph, build_graph, public_source
from olmo.report.html import hide_paths, render
from olmo.report.runs import RunState, find_state, training_records
from olmo.report.scores import read_results
from olmo.report.series import (
    LOSS,
    NORM,
    RATE,
    SPEED,
    Series,
    find_metrics,
    pack,
    read_series,
)
from olmo.runtime.log import format_bytes, format_count, format_duration
from olmo.store.lease import held_names
from olmo.store.lineage import records_by_content
from olmo.store.record import Record
from olmo.store.stage import current_store

TABLE_ROWS = 12
BOX_W, BOX_H, GAP_X, GAP_Y = 190, 84, 56, 22  # of the picture of the lineage, in px


def attempt_key(folder: Path) -> str:
    """The key of the action that trains a run now."""
    return (folder / "run").resolve().parent.name


def format_page(name: str, is_live: bool = False) -> str:
    """The page of a run, as HTML. `is_live`: it asks its server for what is new."""
    page = RunPage(name)
    return render("run.html", page.context() | {"is_live": is_live}, page.data(), is_live)


class RunPage:
    """What is known of a run, finished or not."""

    def __init__(self, name: str) -> None:
        store = current_store()
        self.name, self.folder = name, Path("checkpoints", name)
        self.run = TrainedRun(name)
        self.record: Record | None = self.run.record
        self.made_by = records_by_content(store)
        shards = select_shards(
            self.run.cfg.data.paths or [], find_token_shards(store, self.made_by)
        )
        known = [self.record] if self.record else [shard.record for shard in shards]
        self.graph = build_graph(store, known, self.made_by)
        self.records = training_records(self.folder) if self.record else []
        self.keys = {one["key"] for one in self.records} or {attempt_key(self.folder)}
        self.is_mean = bool(self.record and self.record["action"]["stage"] == MEAN)
        self.samples = sampling.read_samples(store, self.keys, self.made_by)
        self.series = read_series(find_metrics(self.folder))
        price = read_project_config().get("price") or {}
        self.state: RunState = find_state(name, held_names(store.root / "leases"), price)

    def data(self) -> dict[str, Any]:
        """What the page's program reads: the curves, and the rows of the lineage."""
        stages = [self.stage_rows(i) for i in range(len(self.graph.stages))]
        return self.curves() | {"stages": stages}

    def curves(self) -> dict[str, Any]:
        """The metrics, exactly, and how they are drawn; what a live page asks for anew."""
        return {
            "state": {"state": self.state.state, "step": self.state.step},
            "tiles": self.tiles(),
            "series": {name: pack(series) for name, series in self.series.items()},
            "charts": curve_specs(self.series),
        }

    def context(self) -> dict[str, Any]:
        """What the template shows."""
        graph = self.graph
        return {
            "name": self.name,
            "state": self.state.state,
            "record": self.record,
            "tiles": self.tiles(),
            "charts": [
                (title, "; ".join(describe_curve(name, self.series[name]) for name in names))
                for title, (names, _) in choose_charts(self.series).items()
            ],
            "table": value_table(self.series),
            "samples": group_by_prompt(self.samples),
            "results": self.results(),
            "picture": picture(graph),
            "stages": graph.stages,
            "drops": [(s.name, why, n) for s in graph.stages for why, n in s.drops.items()],
            "shares": shares(graph, self.keys),
            "mixture": read_parts(self.order, self.made_by),
            "config": flatten(hide_paths(self.config())),
            "is_mean": self.is_mean,
            "environment": environment(self.record),
            "command": reproduce(self.name, self.record),
        }

    @property
    def order(self) -> str:
        """The digest of a finished run's order; else nothing."""
        found: str = self.record["action"]["inputs"].get("order", "") if self.record else ""
        return found

    def config(self) -> dict[str, Any]:
        """What decides the result; of a mean the checkpoints that it is of."""
        if not self.is_mean:
            return describe_config(self.run, self.made_by)
        trainings = [s.name for s in self.graph.stages if s.name.startswith("training")]
        return {"the mean of": sorted(trainings)}

    def results(self) -> list[dict[str, Any]]:
        folder = Path("eval", self.name)
        return read_results(folder) if (folder / "results.json").exists() else []

    def tiles(self) -> list[tuple[str, Any, str, str]]:
        """(name, number, its text, explanation) of what one asks first."""
        state, record = self.state, self.record
        facts = record["facts"] if record else {}
        costs = [one.get("run", {}) for one in self.records]
        length = self.run.cfg.model.max_sequence_length
        energy = add_known([cost.get("machine_energy_j") for cost in costs])
        memory = max((cost.get("peak_memory_bytes") or 0 for cost in costs), default=0)
        attempts = len(facts.get("segments") or ())
        work = "of the averaging" if self.is_mean else "of the training"
        work = f"of the last of {attempts} attempts" if attempts > 1 else work

        def tile(
            name: str, value: Any, write: Callable[[Any], str], note: str = ""
        ) -> tuple[str, Any, str, str]:
            return name, value, "" if value is None else write(value), note

        tiles = [
            tile("steps", state.step, "{:,}".format, f"of {state.steps:,}" if state.steps else ""),
            tile("tokens", facts.get("tokens"), format_count, f"in instances of {length:,}"),
            tile("parameters", count_parameters(record), format_count),
            tile("training loss", state.loss, "{:.4f}".format, "nats a token, the last step"),
            tile("time", add_known([cost.get("wall_s") for cost in costs]), format_duration, work),
            tile("speed", state.tokens_per_s, format_count, "tokens/s of a device, the last"),
            tile("memory", memory or None, format_bytes, "at the peak"),
            tile("energy", energy, lambda j: f"{j / 3.6e6:.3g} kWh", "of the whole machine"),
        ]
        for label, loss in (facts.get("heldout_loss") or {}).items():
            before = f"nats a token; before: {float(loss['first']):.4f}"
            tiles.append(tile(f"loss on {label}", float(loss["last"]), "{:.4f}".format, before))
        for label, bits in (facts.get("heldout_bits_per_byte") or {}).items():
            before = f"of UTF-8; before: {float(bits['first']):.4f}"
            name = f"bits per byte of {label}"
            tiles.append(tile(name, float(bits["last"]), "{:.4f}".format, before))
        tiles = [one for one in tiles if one[1] is not None]
        if record and energy is None:
            tiles.append(("energy", None, "unknown", "this machine does not measure it"))
        if state.cost:
            tiles.append(("cost", None, state.cost, "by `price` of config/config.yaml"))
        return tiles

    def stage_rows(self, number: int) -> dict[str, Any]:
        """The actions of a stage as columns."""
        stage = self.graph.stages[number]
        return {
            "name": stage.name,
            "rows": [self.action_row(action) for action in stage.actions],
        }

    def action_row(self, action: Action) -> dict[str, Any]:
        facts = action.record["facts"]
        is_source = action.record["action"]["stage"] in SOURCES
        source = public_source(action) if is_source else {}
        counts = {n: v for n, v in facts.items() if type(v) is int}
        return {
            "name": hide_paths(action.name),
            "content": action.record["content"],
            "bytes": action.bytes,
            "seconds": action.seconds,
            "counts": counts,
            "parents": action.parents,
            **{k: hide_paths(v) for k, v in source.items() if v},
        }


def add_known(numbers: list[float | None]) -> float | None:
    """A sum, of which nothing is known if a part is not."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def count_parameters(record: Record | None) -> int | None:
    """The numbers in model.safetensors of a final checkpoint, by its header."""
    files = record["outputs"].get("final", {}).get("files", {}) if record else {}
    if "model.safetensors" not in files:
        return None
    path = current_store().object_path(files["model.safetensors"]["sha256"])
    if not path.exists():
        return None
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(one["shape"]) for key, one in header.items() if key != "__metadata__")


def value_table(series: dict[str, Series]) -> dict[str, Any]:
    """Some steps of the main metrics as a table, for those who do not see curves."""
    names = [name for name in (LOSS, RATE, NORM, SPEED) if name in series]
    heads = ["step", "loss", "learning rate", "gradient norm", "tokens/s"]
    if not names:
        return {"head": [], "rows": []}
    steps = series[names[0]].steps
    chosen = sorted({round(i * (len(steps) - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    at = {name: dict(zip(series[name].steps, series[name].values, strict=True)) for name in names}
    return {
        "head": ["step"] + [heads[1 + (LOSS, RATE, NORM, SPEED).index(name)] for name in names],
        "rows": [[steps[i], *(at[name].get(steps[i]) for name in names)] for i in chosen],
    }


def group_by_prompt(samples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in samples:
        found.setdefault(one["prompt"], []).append(one)
    return found


def shares(graph: Graph, trainings: set[str]) -> list[tuple[str, int, float]]:
    """(source, tokens, share of all) of the tokens that a run could learn from."""
    tokens = graph.tokens_by_source(trainings)
    total = sum(tokens.values())
    return [(hide_paths(name), count, count / total) for name, count in tokens.items()]


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The fields of nested settings: ("model.d_model", 128)."""
    if isinstance(value, dict) and value:
        return [
            pair
            for key in sorted(value)
            for pair in flatten(value[key], f"{prefix}.{key}" * bool(prefix) or key)
        ]
    return [(prefix, value)]


def environment(record: Record | None) -> list[tuple[str, str]]:
    """Where and by what a run was trained; nothing that names the machine."""
    if record is None:
        return []
    run, conditions = record.get("run", {}), record.get("conditions", {})
    found = [(name, str(value)) for name, value in (run.get("tools") or {}).items()]
    found += [(name, str(run[name])) for name in ("started", "python", "platform") if name in run]
    commit = run.get("commit") or "not known"
    found += [("commit", commit + ", with changes" * bool(run.get("commit_has_changes")))]
    # Last, since they say more: torch with its build.
    found += [(name, str(value)) for name, value in conditions.items() if value is not None]
    return [(name, hide_paths(value)) for name, value in dict(found).items()]


def reproduce(name: str, record: Record | None) -> str:
    """The command that makes the checkpoint again, from the commit that made it."""
    commit = record.get("run", {}).get("commit") if record else None
    checkout = f"git checkout {commit} && " if commit else ""
    return f"{checkout}uv run snakemake --cores all {shlex.quote(f'checkpoints/{name}/final')}"


def picture(graph: Graph) -> dict[str, Any]:
    """The lineage as boxes and lines, in px: columns of stages, the sources on the left."""
    boxes: dict[int, tuple[float, float]] = {}
    tallest = max((len(column) for column in graph.columns), default=1)
    height = float(tallest * (BOX_H + GAP_Y) - GAP_Y)
    for place, column in enumerate(graph.columns):
        top = (height - len(column) * (BOX_H + GAP_Y) + GAP_Y) / 2
        for row, number in enumerate(column):
            boxes[number] = (place * (BOX_W + GAP_X), top + row * (BOX_H + GAP_Y))
    lines: list[str] = []
    for number, (x, y) in boxes.items():
        for parent in graph.stages[number].parents:
            before_x, before_y = boxes[parent]
            start, end = (before_x + BOX_W, before_y + BOX_H / 2), (x, y + BOX_H / 2)
            bend = (start[0] + end[0]) / 2
            points = (start, (bend, start[1]), (bend, end[1]), end)
            lines.append("M{} C{} {} {}".format(*(f"{px:g},{py:g}" for px, py in points)))
    width = max(len(graph.columns) * (BOX_W + GAP_X) - GAP_X, 1)
    return {
        "width": width,
        "height": height,
        "boxes": boxes,
        "lines": lines,
        "w": BOX_W,
        "h": BOX_H,
    }

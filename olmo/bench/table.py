"""Tables of records, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from olmo.bench.matrix import OURS, Cell, Section

COLUMNS = (
    "shape",
    "whose",
    "attention",
    "compile",
    "microbatch",
    "precision",
    "fp8",
    "switch",
    "status",
    "tokens_per_second",
    "tokens_per_second_p10",
    "tokens_per_second_p90",
    "tokens_per_cpu_second",
    "mfu_palm",
    "mfu_causal",
    "peak_memory_bytes",
    "joules_per_token",
    "first_step_s",
    "first_loss",
    "last_loss",
    "elsewhere",
    "ours_tokens_per_second",
    "ratio",
    "ratio_low",
    "ratio_high",
    "ratio_cpu",
    "parameters",
    "device",
    "torch",
    "started",
    "why",
)
NOTES = """\
{steps} steps are timed after {warmup} others: tokens/s is their median ± half of the distance from
the 10th to the 90th percentile. Per CPU-s: tokens per second of processor time, of all threads.
MFU: in PaLM's convention, then with the causal half of attention; empty where the device's peak is
not known, as for a CPU. Peak: allocated on the GPU, or what a CPU's process takes in a step on top
of weights and optimizer state. J/token: empty where there is no meter. Loss: the mean over labels
at the last step, on synthetic data that can be learnt and is the same for all."""
PAIR_NOTES = """\
Theirs and ours train in turns, {rounds} each, in two processes, from the same weights on the same
ids; the losses of the first step agree. ours/theirs is the median of the rounds' ratios of time,
with the lowest and the highest in brackets. A step is forward, loss, backward, clipping, learning
rate, update and what that side's own trainer reads in every step, without data loading. ai2-olmo
divides its loss by tokens, not labels, which is corrected here. MFU uses our FLOPs per token, which
include a tied head; ai2-olmo's do not. It compiles block by block."""
Record = dict[str, Any]


def record_row(record: Record, section: Section) -> Record:
    """A row of COLUMNS: a record without its single steps, with its cell's settings."""
    ours = {"ours_tokens_per_second": record.get("ours", {}).get("tokens_per_second")}
    elsewhere = {"elsewhere": published(record, section) or None}
    flat = record | record["cell"] | ours | elsewhere
    return {name: flat.get(name) for name in COLUMNS}


def published(record: Record, section: Section) -> str:
    """The speeds that the section's references have for these settings."""
    cell = record["cell"]
    used = record.get("attention_used", cell["attention"])
    return "; ".join(
        f"{r.tokens_per_second:,.0f}"
        for r in section.references
        if cell["whose"] == OURS
        and (r.shape, r.compile) == (cell["shape"], cell["compile"])
        and used in r.attention
        and r.microbatch in (None, cell["microbatch"])
    )


def summary_line(record: Record) -> str:
    """A record's result on one line, for the log."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['why']}"
    line = f"{format_speed(record)} tokens/s"
    if record["mfu_palm"]:
        line += f", MFU {record['mfu_palm']:.1%} (PaLM), {record['mfu_causal']:.1%} (causal)"
    line += f", peak {format_peak(record)} MiB, loss {record['last_loss']:.3f}"
    if "ratio" in record:
        line += f"; ours {format_speed(record['ours'])}, {format_ratio(record)} times as fast"
    return line


def ranking_speed(record: Record) -> float:
    """Tokens per second, 0 without a result; of CPU time on a CPU, which others may use as well."""
    by = "tokens_per_cpu_second" if record["kind"] == "cpu" else "tokens_per_second"
    return float(record.get(by) or 0.0)


def format_speed(side: Record) -> str:
    spread = (side["tokens_per_second_p90"] - side["tokens_per_second_p10"]) / 2
    return f"{side['tokens_per_second']:,.0f} ± {spread:,.0f}"


def format_peak(side: Record) -> str:
    """Peak memory in MiB."""
    return f"{side['peak_memory_bytes'] / 2**20:,.0f}"


def format_mfu(side: Record) -> str:
    return f"{side['mfu_palm']:.1%}, {side['mfu_causal']:.1%}" if side["mfu_palm"] else ""


def format_ratio(record: Record) -> str:
    return f"{record['ratio']:.2f} ({record['ratio_low']:.2f}–{record['ratio_high']:.2f})"


def csv_text(records: list[Record], section: Section) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record_row(record, section) for record in records)
    return text.getvalue()


def markdown(records: list[Record], section: Section, command: str) -> str:
    """Tables of each shape, the fastest cell first, failed ones last with the reason.

    `command` made the records; the peers and threads are added here from the records.
    """
    for peer in dict.fromkeys(r["cell"]["whose"] for r in records if "peer" in r):
        command += f" --peer {peer}=PYTHON"
    threads = {record["threads"] for record in records if record["kind"] == "cpu"}
    if len(threads) == 1:
        command = f"OMP_NUM_THREADS={threads.pop()} {command}"
    lines = ["# Tokens per second", "", *describe_machines(records), f"`{command}`"]
    for shape in section.shapes:
        of_shape = [record for record in records if record["cell"]["shape"] == shape]
        of_shape.sort(key=lambda record: -ranking_speed(record))
        cells = [record for record in of_shape if "beside" not in record]
        pairs = [record for record in of_shape if "beside" in record]
        if of_shape:
            lines += ["", f"## {shape}", "", describe_shape(section, shape)]
        if cells:
            lines += ["", *markdown_table([cell_row(record, section) for record in cells])]
            lines += list_failures(cells)
        references = [r for r in section.references if r.shape == shape]
        lines += [""] * bool(references)
        lines += [f"- {r.tokens_per_second:,.0f}: {r.what}" for r in references]
        if pairs:
            lines += ["", f"### {shape}, beside others", ""]
            lines += markdown_table([pair_row(record) for record in pairs])
            lines += ["", f"Ours: {'; '.join(our_settings(pairs))}."]
            lines += compare_with_fastest(pairs) + list_failures(pairs)
    notes = NOTES.format(warmup=section.warmup, steps=section.steps)
    lines += ["", "## How it was measured", "", notes]
    if section.peers:
        lines += ["", PAIR_NOTES.format(rounds=section.rounds)]
    return "\n".join(lines) + "\n"


def describe_machines(records: list[Record]) -> list[str]:
    """Machine, versions and day."""
    machines = {
        f"{r['device']}, {r['threads']} CPU thread{'s' * (r['threads'] > 1)}; torch {r['torch']}, "
        f"Python {r['python']}"
        for r in records
    }
    peers = {
        f"{name} {version}"
        for r in records
        for name, version in r.get("peer", {}).items()
        if name == r["cell"]["whose"]
    }
    torches = {r["peer"]["torch"] for r in records if "peer" in r} - {r["torch"] for r in records}
    beside = [f"beside {', '.join(sorted(peers))}"] * bool(peers)
    beside += [f"with torch {', '.join(sorted(torches))} for them"] * bool(torches)
    days = sorted({record["started"][:10] for record in records})
    day = " to ".join(dict.fromkeys(days[:1] + days[-1:]))
    return [
        f"{'; '.join([*sorted(machines), *beside])}; {day}.",
        *format_cpu_load_warning(records),
        "",
    ]


def format_cpu_load_warning(records: list[Record]) -> list[str]:
    """A warning where other processes used the CPU that was measured."""
    loads = [(r["load"], r["cores"]) for r in records if r["kind"] == "cpu" and "load" in r]
    # Compiling has more processes than cores for a while.
    if not any(load > 2 * cores for load, cores in loads):
        return []
    (least, _), (most, cores) = min(loads), max(loads)
    return [
        "",
        f"**The machine was busy**: a load of {least:.0f} to {most:.0f} on {cores} cores. "
        "Do not compare speeds of different settings; those of a pair, timed in turns, compare.",
    ]


def describe_shape(section: Section, shape: str) -> str:
    model = section.model | section.shapes[shape]
    names = ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length")
    return ", ".join(f"{name} {model[name]:,}" for name in names)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Lines of Markdown. Columns are the rows' keys, in order, without those that are all empty."""
    keys = dict.fromkeys(key for row in rows for key in row)
    head = [key for key in keys if any(row.get(key, "") != "" for row in rows)]
    lines = [head, ["---"] * len(head), *([str(row.get(key, "")) for key in head] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def settings_row(record: Record) -> dict[str, str]:
    """A cell's settings; for `auto` also the kernel that was used."""
    cell = record["cell"]
    used = record.get("attention_used")
    attention = f"auto: {used}" if cell["attention"] == "auto" and used else cell["attention"]
    row = {"attention": attention, "compile": cell["compile"]}
    return row | {"microbatch": str(cell["microbatch"]), "precision": cell["precision"]}


def format_settings(record: Record) -> str:
    attention, compiled, microbatch, precision = settings_row(record).values()
    parts = [attention, compiled, f"microbatch {microbatch}", precision]
    return ", ".join([*parts, *format_extras(record)])


def format_extras(record: Record) -> list[str]:
    fp8, switch = Cell(**record["cell"]).extras
    return [f"fp8 {fp8}"] * bool(fp8) + [switch] * bool(switch)


def cell_row(record: Record, section: Section) -> dict[str, str]:
    fp8, switch = Cell(**record["cell"]).extras
    row = settings_row(record) | {"fp8": fp8, "switch": switch} | result_columns(record)
    return row | {"elsewhere": published(record, section)}


def result_columns(record: Record) -> dict[str, str]:
    if record["status"] != "ok":
        return {"tokens/s": record["status"]}
    joules = record["joules_per_token"]
    return {
        "tokens/s": format_speed(record),
        "per CPU-s": f"{record['tokens_per_cpu_second']:,.0f}",
        "MFU": format_mfu(record),
        "peak MiB": format_peak(record),
        "J/token": "" if joules is None else f"{joules:.3g}",
        "loss": f"{record['last_loss']:.3f}",
    }


def pair_row(record: Record) -> dict[str, str]:
    row = {"whose": record["cell"]["whose"], **settings_row(record), "tokens/s": record["status"]}
    if record["status"] != "ok":
        return row
    ours = record["ours"]
    return row | {
        "tokens/s": format_speed(record),
        "ours": format_speed(ours),
        "ours/theirs": format_ratio(record),
        "in CPU time": f"{record['ratio_cpu']:.2f}",
        "MFU": format_mfu(record),
        "our MFU": format_mfu(ours),
        "peak MiB": format_peak(record),
        "our peak": format_peak(ours),
        "loss": f"{record['last_loss']:.3f}",
        "our loss": f"{ours['last_loss']:.3f}",
    }


def list_failures(records: list[Record]) -> list[str]:
    """Each reason once, with the settings that it concerns."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            reason = " ".join(str(record["why"]).split())
            peer = [record["cell"]["whose"]] if "beside" in record else []
            settings = " ".join([*peer, format_settings(record)])
            reasons.setdefault(f"{record['status']}: {reason}", []).append(settings)
    lines = [f"- {'; '.join(settings)}: {reason}" for reason, settings in reasons.items()]
    return [""] * bool(lines) + lines


def our_settings(pairs: list[Record]) -> list[str]:
    lines = []
    for record in [pair for pair in pairs if pair["status"] == "ok"] or pairs:
        used = record.get("ours", {}).get("attention_used")
        row = settings_row({"cell": record["beside"], "attention_used": used})
        del row["microbatch"]
        lines.append(", ".join(f"{name} {value}" for name, value in row.items()))
    return list(dict.fromkeys(lines))


def compare_with_fastest(pairs: list[Record]) -> list[str]:
    """Ours beside each peer's fastest setting; `pairs` are sorted, the fastest first."""
    timed = [record for record in pairs if record["status"] == "ok"]
    count = Counter(record["cell"]["whose"] for record in timed)
    fastest = {record["cell"]["whose"]: record for record in reversed(timed)}
    lines = [
        f"- ours is {format_ratio(record)} times as fast as {peer}, fastest of {count[peer]} "
        f"timed ({format_settings(record)}), {record['ratio_cpu']:.2f} times in CPU time"
        for peer, record in sorted(fastest.items(), key=lambda item: timed.index(item[1]))
    ]
    return [""] * bool(lines) + lines

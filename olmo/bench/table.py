"""Records as tables: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
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
The steps that count come after {warmup} others, {steps} of them: tokens/s is their median ± half of
the distance between the 10th and the 90th percentile. Per CPU-s: tokens per second of processor
time, all threads together. MFU: in PaLM's convention, then with the causal half of attention; empty
where the device's peak is not known, as for a CPU. Peak: of the GPU, or what a CPU's process takes
in a step on top of weights and optimizer state. J/token: empty where nothing counts them. Loss: the
mean over labels at the last step, on data that can be learnt and is the same for all."""
PAIR_NOTES = """\
Theirs and ours trained in turns, {rounds} of each, from the same weights on the same ids, in a
process each; the loss of the first step agreed. ours/theirs is the median of the rounds' ratios of
time, the least and the largest of them in brackets. A step is forward, loss, backward, clipping,
learning rate, update and what that side's own trainer reads in every step; its data come for free.
ai2-olmo divides its loss by tokens, not labels, which is put right here; tokens cost what our count
says, which includes a tied head that its own leaves out. It compiles block by block."""


def row(record: dict[str, Any], section: Section) -> dict[str, Any]:
    """A record without its single steps, and its cell's settings as columns."""
    told = "; ".join(references(record, section))
    ours = {"ours_tokens_per_second": record.get("ours", {}).get("tokens_per_second")}
    flat = record | record["cell"] | ours | {"elsewhere": told or None}
    return {name: flat.get(name) for name in COLUMNS}


def references(record: dict[str, Any], section: Section) -> list[str]:
    """What others measured with these settings."""
    cell = record["cell"]
    used = record.get("attention_used", cell["attention"])
    return [
        f"{r.tokens_per_second:,.0f}"
        for r in section.references
        if cell["whose"] == OURS
        and (r.shape, r.compile) == (cell["shape"], cell["compile"])
        and used in r.attention
        and r.microbatch in (None, cell["microbatch"])
    ]


def result(record: dict[str, Any]) -> str:
    """In a few words."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['why']}"
    words = f"{speed(record)} tokens/s"
    if record["mfu_palm"]:
        words += f", MFU {record['mfu_palm']:.1%} (PaLM), {record['mfu_causal']:.1%} (causal)"
    words += f", peak {mebibytes(record)} MiB, loss {record['last_loss']:.3f}"
    if "ratio" in record:
        words += f"; ours {speed(record['ours'])}, {ratio(record)} times as fast"
    return words


def rate(record: dict[str, Any]) -> float:
    """What settings are ranked by, 0 without a result. A CPU is shared: there it is its own time
    that counts, and not what others left of it."""
    by = "tokens_per_cpu_second" if record["kind"] == "cpu" else "tokens_per_second"
    return float(record.get(by) or 0.0)


def speed(side: dict[str, Any]) -> str:
    spread = (side["tokens_per_second_p90"] - side["tokens_per_second_p10"]) / 2
    return f"{side['tokens_per_second']:,.0f} ± {spread:,.0f}"


def mebibytes(side: dict[str, Any]) -> str:
    return f"{side['peak_memory_bytes'] / 2**20:,.0f}"


def mfu(side: dict[str, Any]) -> str:
    return f"{side['mfu_palm']:.1%}, {side['mfu_causal']:.1%}" if side["mfu_palm"] else ""


def ratio(record: dict[str, Any]) -> str:
    return f"{record['ratio']:.2f} ({record['ratio_low']:.2f}–{record['ratio_high']:.2f})"


def csv_text(records: list[dict[str, Any]], section: Section) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(record, section) for record in records)
    return text.getvalue()


def markdown(records: list[dict[str, Any]], section: Section, command: str) -> str:
    """Each shape's tables, the fastest first; what is not available comes last, with the reason.

    `command` is what made them, but for the peers and threads, which the records have.
    """
    for whose in dict.fromkeys(r["cell"]["whose"] for r in records if "peer" in r):
        command += f" --peer {whose}=PYTHON"
    threads = {record["threads"] for record in records if record["kind"] == "cpu"}
    if len(threads) == 1:
        command = f"OMP_NUM_THREADS={threads.pop()} {command}"
    lines = ["# Tokens per second", "", *where(records), f"`{command}`"]
    for shape in section.shapes:
        mine = [record for record in records if record["cell"]["shape"] == shape]
        mine.sort(key=lambda r: -rate(r))
        alone = [record for record in mine if "beside" not in record]
        pairs = [record for record in mine if "beside" in record]
        if mine:
            lines += ["", f"## {shape}", "", describe(section, shape)]
        if alone:
            lines += ["", *table_of(ALONE, (of_cell(record, section) for record in alone))]
            lines += unavailable(alone)
        told = [r for r in section.references if r.shape == shape]
        lines += [""] * bool(told) + [f"- {r.tokens_per_second:,.0f}: {r.what}" for r in told]
        if pairs:
            lines += ["", f"### {shape}, beside others", ""]
            lines += table_of(PAIRS, (of_pair(record) for record in pairs))
            lines += ["", f"Ours: {'; '.join(our_settings(pairs))}."]
            lines += beside_the_fastest(pairs) + unavailable(pairs)
    notes = NOTES.format(warmup=section.warmup, steps=section.steps)
    lines += ["", "## How it was measured", "", notes]
    if section.peers:
        lines += ["", PAIR_NOTES.format(rounds=section.rounds)]
    return "\n".join(lines) + "\n"


def where(records: list[dict[str, Any]]) -> list[str]:
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
    return [f"{'; '.join([*sorted(machines), *beside])}; {day}.", *busy(records), ""]


def busy(records: list[dict[str, Any]]) -> list[str]:
    """A warning where others used the processors that were to be measured."""
    loads = [(r["load"], r["cores"]) for r in records if r["kind"] == "cpu" and "load" in r]
    # What compiles has more processes than there are cores, for a while.
    if not any(load > 2 * cores for load, cores in loads):
        return []
    (least, _), (most, cores) = min(loads), max(loads)
    return [
        "",
        f"**The machine was busy**: a load of {least:.0f} to {most:.0f} on {cores} cores. "
        "Speeds of different settings do not compare then; those of a pair, timed in turns, do.",
    ]


def describe(section: Section, shape: str) -> str:
    model = section.model | section.shapes[shape]
    names = ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length")
    return ", ".join(f"{name} {model[name]:,}" for name in names)


ALONE = (
    "attention",
    "compile",
    "microbatch",
    "precision",
    "fp8",
    "switch",
    "tokens/s",
    "per CPU-s",
    "MFU",
    "peak MiB",
    "J/token",
    "loss",
    "elsewhere",
)
PAIRS = (
    "whose",
    "attention",
    "compile",
    "microbatch",
    "precision",
    "tokens/s",
    "ours",
    "ours/theirs",
    "in CPU time",
    "MFU",
    "our MFU",
    "peak MiB",
    "our peak",
    "loss",
    "our loss",
)


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown, without the columns that nobody fills."""
    rows = list(rows)
    filled = [i for i in range(len(head)) if any(line[i] for line in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line[i] for i in filled)} |" for line in lines]


def settings(record: dict[str, Any]) -> list[str]:
    """What the cell says, and for `auto` what it came to."""
    cell = record["cell"]
    used = record.get("attention_used")
    attention = f"auto: {used}" if cell["attention"] == "auto" and used else cell["attention"]
    return [attention, cell["compile"], str(cell["microbatch"]), cell["precision"]]


def in_words(record: dict[str, Any]) -> str:
    attention, compiled, microbatch, precision = settings(record)
    words = [attention, compiled, f"microbatch {microbatch}", precision]
    return ", ".join([*words, *extras_in_words(record)])


def extras_in_words(record: dict[str, Any]) -> list[str]:
    fp8, switch = Cell(**record["cell"]).extras
    return [f"fp8 {fp8}"] * bool(fp8) + [switch] * bool(switch)


def of_cell(record: dict[str, Any], section: Section) -> list[str]:
    start = [*settings(record), *Cell(**record["cell"]).extras]
    told = "; ".join(references(record, section))
    if record["status"] != "ok":
        return [*start, record["status"], *[""] * 5, told]
    joules = record["joules_per_token"]
    return [
        *start,
        speed(record),
        f"{record['tokens_per_cpu_second']:,.0f}",
        mfu(record),
        mebibytes(record),
        "" if joules is None else f"{joules:.3g}",
        f"{record['last_loss']:.3f}",
        told,
    ]


def of_pair(record: dict[str, Any]) -> list[str]:
    start = [record["cell"]["whose"], *settings(record)]
    if record["status"] != "ok":
        return [*start, record["status"], *[""] * 9]
    ours = record["ours"]
    return [
        *start,
        speed(record),
        speed(ours),
        ratio(record),
        f"{record['ratio_cpu']:.2f}",
        mfu(record),
        mfu(ours),
        mebibytes(record),
        mebibytes(ours),
        f"{record['last_loss']:.3f}",
        f"{ours['last_loss']:.3f}",
    ]


def unavailable(records: list[dict[str, Any]]) -> list[str]:
    """Each reason once, with whom it concerns."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            reason = " ".join(str(record["why"]).split())
            whose = [record["cell"]["whose"]] if "beside" in record else []
            who = " ".join([*whose, in_words(record)])
            reasons.setdefault(f"{record['status']}: {reason}", []).append(who)
    lines = [f"- {'; '.join(who)}: {reason}" for reason, who in reasons.items()]
    return [""] * bool(lines) + lines


def our_settings(pairs: list[dict[str, Any]]) -> list[str]:
    found = []
    for record in [pair for pair in pairs if pair["status"] == "ok"] or pairs:
        used = record.get("ours", {}).get("attention_used")
        attention, compiled, _, precision = settings(
            {"cell": record["beside"], "attention_used": used}
        )
        found.append(f"attention {attention}, compile {compiled}, precision {precision}")
    return list(dict.fromkeys(found))


def beside_the_fastest(pairs: list[dict[str, Any]]) -> list[str]:
    """Ours beside each peer's best setting; `pairs` are sorted, the fastest first."""
    timed = [record for record in pairs if record["status"] == "ok"]
    settings_of = Counter(record["cell"]["whose"] for record in timed)
    best: dict[str, dict[str, Any]] = {}
    for record in timed:
        best.setdefault(record["cell"]["whose"], record)
    lines = [
        f"- ours is {ratio(record)} times as fast as {whose}, fastest of {settings_of[whose]} "
        f"timed ({in_words(record)}), {record['ratio_cpu']:.2f} times in CPU time"
        for whose, record in best.items()
    ]
    return [""] * bool(lines) + lines

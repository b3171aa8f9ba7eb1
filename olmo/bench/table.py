"""Records as tables: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from typing import Any

from olmo.bench.matrix import NONE, Section

COLUMNS = (
    "shape",
    "attention",
    "compile",
    "microbatch",
    "precision",
    "fp8",
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
    "last_loss",
    "parameters",
    "device",
    "torch",
    "started",
    "why",
)


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its single steps, and its cell's settings as columns."""
    flat = record | record["cell"]
    return {name: flat.get(name) for name in COLUMNS}


def result(record: dict[str, Any]) -> str:
    """In a few words."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['why']}"
    spread = record["tokens_per_second_p90"] - record["tokens_per_second_p10"]
    words = f"{record['tokens_per_second']:,.0f} ± {spread / 2:,.0f} tokens/s"
    if record["mfu_palm"]:
        words += f", MFU {record['mfu_palm']:.1%} (PaLM), {record['mfu_causal']:.1%} (causal)"
    words += f", peak {record['peak_memory_bytes'] / 2**20:,.0f} MiB"
    return f"{words}, loss {record['last_loss']:.3f}"


def csv_text(records: list[dict[str, Any]], section: Section) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(record) for record in records)
    return text.getvalue()


def markdown(records: list[dict[str, Any]], section: Section) -> str:
    """A table a shape, the fastest first; what cannot be had last, with the reason."""
    where = {f"{r['device']}, torch {r['torch']}, {r['threads']} CPU threads" for r in records}
    days = sorted({record["started"][:10] for record in records if "started" in record})
    lines = [
        "# Tokens per second",
        "",
        f"{'; '.join(sorted(where))}; {' to '.join(dict.fromkeys(days[:1] + days[-1:]))}. Median "
        f"of {section.steps} steps after {section.warmup}, half of the distance between the 10th "
        "and the 90th percentile. MFU in PaLM's convention, and with the causal half of attention.",
    ]
    for shape in section.shapes:
        mine = [record for record in records if record["cell"]["shape"] == shape]
        if not mine:
            continue
        mine.sort(key=lambda r: -r.get("tokens_per_second", 0.0))
        lines += [
            "",
            f"## {shape}",
            "",
            "| attention | compile | microbatch | precision | fp8 | tokens/s | per CPU-s | MFU "
            "| peak MiB | J/token | loss | elsewhere |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [markdown_row(record, section) for record in mine]
        told = [r for r in section.references if r.shape == shape]
        lines += [""] * bool(told) + [f"- {r.tokens_per_second:,.0f}: {r.what}" for r in told]
    return "\n".join(lines) + "\n"


def markdown_row(record: dict[str, Any], section: Section) -> str:
    cell = record["cell"]
    used = record.get("attention_used", cell["attention"])
    attention = used if cell["attention"] in (used, "auto") else cell["attention"]
    fp8 = "" if cell["fp8"] == NONE else cell["fp8"]
    start = [attention, cell["compile"], str(cell["microbatch"]), cell["precision"], fp8]
    elsewhere = next(
        (
            f"{r.tokens_per_second:,.0f}"
            for r in section.references
            if (r.shape, r.attention, r.compile) == (cell["shape"], used, cell["compile"])
            and r.microbatch in (None, cell["microbatch"])
        ),
        "",
    )
    if record["status"] != "ok":
        why = str(record["why"]).replace("|", "\\|").replace("\n", " ")
        return f"| {' | '.join(start)} | {record['status']}: {why} | | | | | | {elsewhere} |"
    spread = (record["tokens_per_second_p90"] - record["tokens_per_second_p10"]) / 2
    mfu = record["mfu_palm"] and f"{record['mfu_palm']:.1%}, {record['mfu_causal']:.1%}"
    joules = record["joules_per_token"]
    cells = [
        *start,
        f"{record['tokens_per_second']:,.0f} ± {spread:,.0f}",
        f"{record['tokens_per_cpu_second']:,.0f}",
        mfu or "",
        f"{record['peak_memory_bytes'] / 2**20:,.0f}",
        "" if joules is None else f"{joules:.3g}",
        f"{record['last_loss']:.3f}",
        elsewhere,
    ]
    return f"| {' | '.join(cells)} |"

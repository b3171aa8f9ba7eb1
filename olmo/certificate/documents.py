"""The documents of a certificate that are about the run: SLSA provenance, and a page to read.

Each is a dict for JSON, or text, made of the records alone: the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olmo.certificate.history import History, times_of
from olmo.certificate.signature import STATEMENT, UNSIGNED
from olmo.report.card import SOURCES, format_table
from olmo.report.html import hide_paths
from olmo.runtime.log import format_number
from olmo.store.action import canonical_json

PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:olmo:pipeline:v1"  # described in docs/certificate.md
BUILDER = "urn:olmo:snakemake"


def state_provenance(history: History, documents: Mapping[str, str]) -> dict[str, Any]:
    """The in-toto statement with SLSA provenance; `documents`: name → sha256 of the others.

    Source: https://slsa.dev/spec/v1.0/provenance
    """
    record = history.record
    sources = [
        {
            **({"uri": source.url} if source.url else {}),
            "name": source.name,
            "digest": {"sha256": source.sha256},
            "annotations": {"licence": source.licence, "of": source.owner}
            | ({"origin": source.origin} if source.origin else {}),
        }
        for source in history.sources
    ]
    commits = [
        {"name": "olmo", "digest": {"gitCommit": c}, "annotations": {"has_changes": changed}}
        for c, changed in history.commits.items()
    ]
    started, finished = times_of([record])
    times = {"startedOn": started, "finishedOn": finished}
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": f"{release.folder}/{name}", "digest": {"sha256": digest}}
            for release in history.releases
            for name, digest in release.digests.items()
        ],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "run": history.run,
                    "stages": list_stages(history),
                },
                "internalParameters": {
                    "content": history.content,
                    "conditions": hide_paths(record.get("conditions", {})),
                    "tools": history.tools,
                },
                "resolvedDependencies": sources + commits,
            },
            "runDetails": {
                "builder": {"id": BUILDER},
                "metadata": {"invocationId": record["key"]}
                | {name: time for name, time in times.items() if time},
                "byproducts": [
                    {"name": name, "digest": {"sha256": digest}}
                    for name, digest in sorted(documents.items())
                ],
            },
        },
    }


def list_stages(history: History) -> list[dict[str, Any]]:
    """What was asked of each stage, from the first to the run's own, and of how many actions."""
    found: dict[bytes, dict[str, Any]] = {}
    for record in history.records:
        action = record["action"]
        if action["stage"] in SOURCES:
            continue
        params = {name: value for name, value in action["params"].items() if name != "name"}
        key = canonical_json({**action, "params": params, "inputs": {}})
        entry = {"stage": action["stage"], "version": action["version"], "actions": 0}
        found.setdefault(key, entry | {"parameters": hide_paths(params)})["actions"] += 1
    return list(found.values())


def format_readme(history: History) -> str:
    """README.md: what the certificate says, and how to check it."""
    release = history.releases[0]
    rows = [(name, f"`{digest}`") for name, digest in release.digests.items()]
    data = [
        (owner, f"{len(sources):,}", ", ".join(sorted({s.licence for s in sources})))
        for owner, sources in history.owners.items()
    ]
    made = "".join(f"; {n} steps" for n in [history.record["facts"].get("steps")] if n)
    checks = [
        f"model_signing verify key {folder} --signature {signature} --public_key key.pub"
        for folder, signature in [
            (".", "certificate.sig"),
            *((f"../../{one.folder}", one.signature) for one in history.releases),
        ]
    ]
    publisher = history.settings.publisher
    return "\n".join(
        [
            f"# The certificate of {history.run}\n",
            f"Content `{history.content}`{made}. Licence: {history.settings.licence}."
            + f" Released by {publisher}." * bool(publisher)
            + "\n",
            format_table(("file", "sha256"), rows),
            f"Made from {format_number(len(history.sources), 'source')}, each with its sha256 and "
            "licence in `provenance.json`:\n",
            format_table(("of", "sources", "licence"), data),
            "Check it, with the public key of whoever released it:\n",
            f"```bash\nolmo certificate verify . --checkpoint ../../{release.folder} "
            "--public-key key.pub\n```\n",
            "Or with other tools alone (`pip install model-signing pyopenssl`). "
            f"{' and '.join(f'`{name}`' for name in UNSIGNED)} are not signed:\n",
            "```bash\n" + "\n".join(checks) + "\n```\n",
        ]
    )

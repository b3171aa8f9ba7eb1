"""The ML-BOM: a CycloneDX bill of materials of a checkpoint, its data and its libraries.

Plain JSON, since cyclonedx-python-lib has no model cards. In the tests it validates the result.

Source: https://cyclonedx.org/docs/1.6/json
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from olmo.certificate.history import NO_LICENCE, History, Source, times_of
from olmo.config import TrainConfig
from olmo.report.card import CHECKPOINTS
from olmo.report.run_page import add_known

MODEL = "model"  # its bom-ref


def state_bom(history: History) -> dict[str, Any]:
    """The bill of materials; its serial number is one of the content."""
    data = [describe_owner(name, sources) for name, sources in history.owners.items()]
    tools = history.tools.items()
    libraries = [describe_library(name, number) for name, numbers in tools for number in numbers]
    finished = times_of([history.record])[1]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, 'sha256:' + history.content)}",
        "version": 1,
        "metadata": {
            **({"timestamp": finished} if finished else {}),
            "tools": {
                "components": [
                    {"type": "application", "name": "olmo", "version": commit}
                    for commit in history.commits or {"unknown": False}
                ]
            },
            "component": describe_model(history),
        },
        "components": data + libraries,
        "dependencies": [
            {"ref": MODEL, "dependsOn": [component["bom-ref"] for component in data + libraries]}
        ],
    }


def describe_model(history: History) -> dict[str, Any]:
    """The checkpoint, with its model card and files."""
    record, settings = history.record, history.settings
    cfg = TrainConfig.load(f"{history.releases[0].folder}/config.yaml", untrusted=True)
    facts, publisher = record["facts"], settings.publisher
    losses = facts.get("heldout_loss", {})
    energy = add_known([one.get("run", {}).get("machine_energy_j") for one in history.records])
    known = {
        "olmo:run": history.run,
        "olmo:content": history.content,
        "olmo:action": record["key"],
        "olmo:steps": facts.get("steps"),
        "olmo:tokens": facts.get("tokens"),
        "olmo:energy_j": energy,
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": history.run,
        "version": history.content[:12],
        "licenses": state_licences([settings.licence or ""]),
        **({"supplier": {"name": publisher}} if publisher else {}),
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": f"OLMo, {cfg.model.n_layers} layers of {cfg.model.d_model}",
                "datasets": [{"ref": f"data:{name}"} for name in history.datasets],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {
                        "type": "loss on held-out documents, nats a token",
                        "slice": label,
                        "value": str(loss["last"]),
                    }
                    for label, loss in losses.items()
                ]
            },
        },
        "components": [
            {
                "type": "file",
                "bom-ref": f"file:{release.folder}/{name}",
                "name": f"{release.folder}/{name}",
                "hashes": state_hash(digest),
            }
            for release in history.releases
            for name, digest in release.digests.items()
        ],
        "properties": [{"name": n, "value": str(v)} for n, v in known.items() if v is not None],
    }


def describe_owner(owner: str, sources: list[Source]) -> dict[str, Any]:
    """A data set, or a checkpoint from elsewhere, with its files."""
    is_model = sources[0].kind in CHECKPOINTS
    licences = sorted({source.licence for source in sources})
    prefix = "start" if is_model else "data"
    return {
        "type": "machine-learning-model" if is_model else "data",
        "bom-ref": f"{prefix}:{owner}",
        "name": owner,
        "licenses": state_licences(licences),
        "components": [
            {
                "type": "file",
                "bom-ref": f"{prefix}:{owner}:{source.sha256}",
                "name": source.name,
                "hashes": state_hash(source.sha256),
                "licenses": state_licences([source.licence]),
                **({"description": source.origin} if source.origin else {}),
                **({"externalReferences": link(source)} if source.url else {}),
            }
            for source in sources
        ],
    }


def link(source: Source) -> list[dict[str, Any]]:
    reference = {"type": "distribution", "url": source.url, "hashes": state_hash(source.sha256)}
    return [reference]


def describe_library(name: str, number: str) -> dict[str, Any]:
    is_package = name != "python" and re.fullmatch(r"[\w.+!-]+", number)
    # A build's local version, as +cu130, is not on the index.
    purl = f"pkg:pypi/{name}@{number.partition('+')[0]}" if is_package else None
    return {
        "type": "library" if name != "python" else "platform",
        "bom-ref": f"tool:{name}@{number}",
        "name": name,
        "version": number,
        **({"purl": purl} if purl else {}),
    }


def state_hash(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def state_licences(texts: list[str]) -> list[dict[str, Any]]:
    """Licences: SPDX identifiers, an expression where it is the only one, other texts as names."""
    found = [state_licence(text) for text in texts]
    if len(found) == 1:
        return found
    pairs = zip(texts, found, strict=True)
    return [{"license": {"name": t}} if "expression" in one else one for t, one in pairs]


def state_licence(text: str) -> dict[str, Any]:
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    if text == NO_LICENCE:
        return {"license": {"name": text}}
    try:
        found = canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        return {"license": {"name": text}}
    is_one = " " not in found and not found.startswith("LicenseRef")
    return {"license": {"id": found}} if is_one else {"expression": found}

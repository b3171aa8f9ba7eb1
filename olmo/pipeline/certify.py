"""What the rule `certificate` needs, checked before anything is trained."""

from __future__ import annotations

from typing import Any

from olmo.certificate.history import licence_error, list_owners
from olmo.certificate.make import check_settings
from olmo.corpus.sources import GENERATED
from olmo.pipeline.plan import Plan


def certificate_inputs(plan: Plan, run: str) -> list[str]:
    """The folders that a certificate is about.

    Raises:
        ValueError: there is no key to sign with, or the licence of the run or of a source is not
            known.
    """
    plan.run(run)
    settings = plan.pipeline.certificate
    check_settings(settings)
    datasets = {plan.dataset(name) for name in plan.pipeline.runs}
    unknown: dict[str, str] = {}
    owners = list_owners(run)
    for name in owners:
        base = plan.pipeline.runs[name].start_from if name in plan.pipeline.runs else None
        if base and not plan.is_made_here(base) and name not in settings.licences:
            unknown[base] = name
    for dataset in owners:
        if dataset not in datasets or dataset in settings.licences:
            continue
        section = plan.recipe(dataset).sources
        is_generated = any(getattr(section, kind) for kind in GENERATED)
        if not is_generated and not plan.needs_source_list(dataset):
            unknown |= {s.place: dataset for s in plan.sources(dataset) if not s.licence}
    if unknown:
        raise licence_error(run, unknown)
    return [f"checkpoints/{run}/final"] + [f"hf/{run}"] * settings.export


def certificate_terms(plan: Plan) -> dict[str, Any]:
    """What a certificate depends on besides the run; the key by its public half."""
    settings = plan.pipeline.certificate
    return {**vars(settings), "key": check_settings(settings)}

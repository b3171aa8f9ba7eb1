"""The parts of a run: the files with its order, one to the end of each part of its mixture, and the
links that it is cut into.
"""

import math
import shlex

from olmo.config.strict import check_range
from olmo.corpus.mixture import check_parts
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import json_flag, json_text, prefix_errors
from olmo.train.chain import count_steps, list_link_steps


def order_path(run: str, step: int | str | None = None) -> str:
    """The file with a run's order, or with that of its steps up to the end of a mixture's part."""
    return f"checkpoints/{run}/global_indices{'' if step is None else f'-until-{step}'}.npy"


def order_flags(plan: Plan, run: str, step: str | None = None) -> str:
    """The settings that determine the order of a run's instances, and how many it needs.

    Args:
        step: where a part of the run's mixture ends; None: where the run ends.
    """
    cfg = plan.train_config(run)
    length = cfg.model.max_sequence_length
    words = ["--sequence-length", length, "--seed", cfg.data_seed]
    words += ["--dtype", cfg.data.memmap_dtype, "--batch-size", cfg.global_train_batch_size]
    if cfg.epoch:  # the epoch in which the run begins
        words += ["--epoch", cfg.epoch]
    mixture, ends = plan.run(run).mixture, part_ends(plan, run)
    if step is not None and int(step) not in ends:
        raise ValueError(
            f"{order_path(run, step)}: expected a step at which a part of the run's mixture ends, "
            f"{', '.join(map(str, ends)) or 'of which it has none'}; found {step}"
        )
    if mixture:
        number = len(ends) if step is None else ends.index(int(step))
        end = int(step or count_steps(cfg) or 0)
        words += ["--steps", end - mixture[number].from_step]
        words += shlex.split(json_flag("mixture", mixture[number]))
    return shlex.join(map(str, words))


def ladder_flags(plan: Plan, run: str) -> str:
    """For a ladder's run: the steps that the first epoch must have for the longest run of all."""
    if run not in plan.ladder_of:
        return ""
    longest = max(branch.tokens for branch in plan.branches(plan.ladder_of[run]))
    cfg = plan.train_config(run)
    step_tokens = cfg.global_train_batch_size * cfg.model.max_sequence_length
    return f"--one-epoch {math.ceil(longest / step_tokens)}"


def ladder_runs(plan: Plan, name: str, held_out: bool) -> list[str]:
    """The runs of a ladder: those of the size that is held out, or of the others."""
    size = plan.ladder(name).held_out
    return [b.name for b in plan.branches(name) if (b.size == size) == held_out]


def part_ends(plan: Plan, run: str) -> list[int]:
    """The steps at which the parts of a run's mixture end, but for the last one.

    Raises:
        ValueError: the run does not reach a part, or the weights do not fit the sources.
    """
    mixture, dataset = plan.run(run).mixture, plan.dataset(run)
    if not mixture:
        return []
    cfg = plan.train_config(run)
    with prefix_errors(f"config/config.yaml: runs.{run}.mixture: "):
        check_parts(mixture, count_steps(cfg))
        if cfg.epoch:
            raise ValueError(f"expected epoch 0 in {plan.run(run).train}, found {cfg.epoch}")
        if not plan.needs_source_list(dataset):
            names = [source.name for source in plan.sources(dataset)]
            for part in mixture:
                part.find_groups(names)
    return [part.from_step for part in mixture[1:]]


def order_before(plan: Plan, run: str, step: str | None) -> list[str]:
    """The order up to the part of a run's mixture that ends at `step`, or with the run."""
    before = [end for end in part_ends(plan, run) if step is None or end < int(step)]
    return [order_path(run, end) for end in before[-1:]]


def order_until(plan: Plan, run: str, step: str | None) -> str:
    """The order by which a run, or its link that ends at `step`, is trained.

    That of a link has the parts of the mixture up to its own only, so that a change of a later
    one does not train it again. A link before anything is skipped has the order of all.
    """
    if skips_before(plan, run, step):
        return f"checkpoints/{run}/global_indices-remaining.npy"
    later = [end for end in part_ends(plan, run) if step is not None and end >= int(step)]
    return order_path(run, next(iter(later), None))


def previous_link(plan: Plan, run: str, step: str | None = None) -> list[str]:
    """The link before the run's end, or before its link at `step`; [] if it is the first.

    Raises:
        ValueError: the run has no link at `step`.
    """
    settings = plan.run(run)
    known = list_link_steps(plan.train_config(run), settings.links, settings.link_every)
    known = sorted({*known, *part_ends(plan, run), *filter(None, [skip_after(plan, run)])})
    end = None if step is None else int(step)
    if end is not None and end not in known:
        raise ValueError(
            f"checkpoints/{run}/step-{step}: expected one of the steps "
            f"{known or 'that links or link_every of the run name, found neither'}"
        )
    before = [cut for cut in known if end is None or cut < end]
    return [f"checkpoints/{run}/step-{cut}" for cut in before[-1:]]


def link_flags(plan: Plan, run: str, step: str | None = None) -> str:
    """Where a link of a run begins and ends."""
    words = [word for link in previous_link(plan, run, step) for word in ("--after", link)]
    return shlex.join(words + (["--until", step] if step else []))


def skip_after(plan: Plan, run: str) -> int | None:
    """The step after which a run skips something, None if it skips nothing.

    Raises:
        ValueError: the run has no such step, or one of its skip_steps, or no known end.
    """
    settings, cfg = plan.run(run), plan.train_config(run)
    if not (skip := settings.skip):
        return None
    after, end = settings.skip_after, count_steps(cfg)
    ranges = skip.step_ranges
    with prefix_errors(f"config/config.yaml: runs.{run}."):
        if skip.shortens:
            check_can_move_up(plan, run)
        if ranges and max(last for _, last in ranges) > (end or 0):
            raise ValueError(f"skip_steps: expected steps up to {end}, found {skip.steps}")
        first = min((first for first, _ in ranges), default=None)
        if after is None:
            only_steps = first is not None and not (skip.documents or skip.sources)
            return first - 1 if only_steps and first else 0
        check_range("skip_after", after, 0, min(first or math.inf, end or math.inf) - 1)
    return after


def check_can_move_up(plan: Plan, run: str) -> None:
    """Raises ValueError for a run without instances to take the place of those that it skips."""
    cfg = plan.train_config(run)
    if plan.run(run).mixture:
        found = "found a mixture, whose order has the instances of the run's own steps only"
    elif count_steps(cfg) is None:
        found = "found a max_duration in epochs, which have all instances; set it in steps"
    elif cfg.epoch:
        found = f"found epoch {cfg.epoch} in {plan.run(run).train}, at which the order begins"
    else:
        return
    raise ValueError(
        "skip_steps, skip_by: next: expected a run whose next instances can move up, "
        f"{found}; or skip documents or sources by mask"
    )


def skips_before(plan: Plan, run: str, step: str | None) -> bool:
    """Whether a run, or its link that ends at `step`, is trained without something."""
    after = skip_after(plan, run)
    return after is not None and (step is None or int(step) > after)


def skip_flags(plan: Plan, run: str) -> str:
    """Of which order a run leaves something out, and after which step."""
    cfg = plan.train_config(run)
    if (after := skip_after(plan, run)) is None:
        raise ValueError(
            f"config/config.yaml: runs.{run}: expected skip_documents, skip_sources or skip_steps, "
            "found none of them"
        )
    words = ["--sequence-length", cfg.model.max_sequence_length, "--dtype", cfg.data.memmap_dtype]
    words += ["--batch-size", cfg.global_train_batch_size, "--after", after]
    if (steps := count_steps(cfg)) is not None:
        words += ["--steps", steps]
    return shlex.join(map(str, words))


def left_out(plan: Plan, run: str) -> str:
    """What a run leaves out, as JSON."""
    return json_text(plan.run(run).skip)


def skip_outputs(plan: Plan, run: str) -> list[str]:
    """What a run is trained without is known, and checked, before its first step."""
    return [] if skip_after(plan, run) is None else [f"checkpoints/{run}/holes.npy"]


def holes_path(plan: Plan, run: str, step: str | None) -> list[str]:
    """The file with the tokens that a run, or its link that ends at `step`, does not learn."""
    masks = plan.run(run).skip.masks and skips_before(plan, run, step)
    return [f"checkpoints/{run}/holes.npy"] * masks


def override_flags(plan: Plan, run: str, step: str | None = None) -> str:
    """Overrides of the training config as a flag of `olmo train`."""
    settings = plan.run(run)
    is_shorter = settings.skip.shortens and skips_before(plan, run, step)
    words = settings.overrides + ["data.mixture=true"] * bool(settings.mixture or is_shorter)
    return f"--overrides {shlex.join(words)}" if words else ""


def document_losses(plan: Plan, run: str) -> list[str]:
    """The loss of each held-out document, beside each result on held-out documents."""
    results = [*plan.heldout_results(run), *plan.further_heldout_results(run)]
    return [result.removesuffix(".json") + ".parquet" for result in results]

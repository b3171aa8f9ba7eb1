"""The parts of a run: the files with its order, one to the end of each part of its mixture, and the
links that it is cut into.
"""

import shlex

from olmo.corpus.mixture import check_parts
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import json_flag, prefix_errors
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
    one does not train it again.
    """
    later = [end for end in part_ends(plan, run) if step is not None and end >= int(step)]
    return order_path(run, next(iter(later), None))


def previous_link(plan: Plan, run: str, step: str | None = None) -> list[str]:
    """The link before the run's end, or before its link at `step`; [] if it is the first.

    Raises:
        ValueError: the run has no link at `step`.
    """
    settings = plan.run(run)
    known = list_link_steps(plan.train_config(run), settings.links, settings.link_every)
    known = sorted({*known, *part_ends(plan, run)})
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

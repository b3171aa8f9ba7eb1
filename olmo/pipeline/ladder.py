"""A ladder: runs of several sizes and lengths, from which the loss of a larger size is predicted.

`ladders:` of config/config.yaml expands here, and only here, into ordinary runs named
`<ladder>-<size>-<budget>`. The runs of one size are branches of one trunk: its learning rate stays
constant after the warm-up, and each branch leaves it to decay at its own step (Hu et al. 2024,
arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392). A branch has links at the places where it
and the shorter ones leave the trunk; links do not depend on what comes after them
(olmo/train/chain.py), so the trunk is trained once.
"""

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from olmo.config import (
    SchedulerType,
    SchedulerUnits,
    TrainConfig,
    name_ladder_run,
)
from olmo.config.conversion import Mistakes, each_mistake
from olmo.config.model_size import count_head, count_non_embedding, count_parameters
from olmo.config.strict import BaseConfig, check_range
from olmo.pipeline.targets import suggest_name
from olmo.report.scaling import count_numbers

BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([xT])")
MAX_BUDGET = 1e18  # more tokens than there are
NAME = re.compile(r"\w[\w.-]*")
# What a ladder sets itself, of each of its runs.
OWN_KEYS = ("max_duration", "stop_at", "scheduler.name", "scheduler.t_decay", "scheduler.t_max")


@dataclass
class LadderConfig(BaseConfig):
    """Runs of several sizes and lengths that share trunks, and a size whose loss they predict.

    Each is a run like any other, `<ladder>-<size>-<budget>`.
    """

    train: str  # the training config of all sizes
    dataset: str  # the recipe: config/data/DATASET.yaml
    # Size → its overrides: small: [model.d_model=64, model.n_heads=4, optimizer.learning_rate=4e-3]
    sizes: dict[str, list[str]]
    # The lengths of the runs of a size, rising. 20x: 20 tokens for each parameter without
    # embeddings; 4e6T: tokens.
    budgets: list[str]
    held_out: str  # the size that is predicted; the prediction knows no run of it
    overrides: list[str] = field(default_factory=list)  # of all sizes, before a size's own
    decay_share: float = 0.2  # of a run's steps, at its end, in which the learning rate decays
    confidence: float = 0.9  # of the prediction's interval
    evaluation: str | None = None  # a file in config/eval
    processes: int = 1  # that train a run; with GPUs, one per GPU

    def check(self) -> None:
        """Raises ValueError for a ladder that cannot be."""
        for name in ("decay_share", "confidence"):
            if not 0 < (found := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, found {found}")
        check_range("processes", self.processes, 1)
        if self.held_out not in self.sizes:
            raise ValueError(
                f"held_out: expected one of the sizes {', '.join(self.sizes) or '(none)'}, found "
                f"{self.held_out}; add it to sizes, or name another"
            )
        if len(self.sizes) < 3:
            raise ValueError(
                "sizes: expected at least two and the one that is held out, found "
                f"{', '.join(self.sizes)}; add some"
            )
        for name in self.sizes:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"sizes: expected names of letters, digits, _, . and -, found {name!r}; "
                    "rename it"
                )
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise ValueError(
                f"budgets: expected lengths, each once, found {', '.join(self.budgets) or 'none'}"
            )
        for budget in self.budgets:
            if not (match := BUDGET.fullmatch(budget)) or not 0 < float(match[1]) <= MAX_BUDGET:
                raise ValueError(
                    "budgets: expected tokens per parameter, as 20x, or tokens, as 4e6T, up to "
                    f"{MAX_BUDGET:.0e}; found {budget!r}"
                )
        for override in [*self.overrides, *(word for own in self.sizes.values() for word in own)]:
            if (key := override.lstrip("-").partition("=")[0]) in OWN_KEYS:
                raise ValueError(
                    f"overrides: expected none of {key}, which budgets and decay_share decide, "
                    f"found {override}; remove it"
                )

    @property
    def fitted_sizes(self) -> list[str]:
        """The sizes whose runs predict the loss of the one that is held out."""
        return [size for size in self.sizes if size != self.held_out]


@dataclass(frozen=True)
class Branch:
    """One run of a ladder.

    Fields:
        parameters: without embeddings, biases and norms
        all_parameters: with embeddings
        steps: of the whole run
        trunk_steps: of these, before the learning rate decays
        decay: the rest, in the unit of the schedule, steps or tokens
        step_tokens: tokens of a step
        flops: of the whole run, 6 for each token and weight that multiplies it
    """

    name: str
    size: str
    budget: str
    parameters: int
    all_parameters: int
    steps: int
    trunk_steps: int
    decay: int
    step_tokens: int
    flops: float

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens


def list_branches(name: str, ladder: LadderConfig) -> list[Branch]:
    """The runs of a ladder, by size and length.

    Raises:
        ValueError: the budgets of a size do not rise, or one decays within the warm-up; the runs
            are too few, or too much alike, to predict another.
    """
    branches = [
        branch
        for size in ladder.sizes
        for branch in list_branches_of_size(name, ladder, size, load_size(name, ladder, size))
    ]
    check_enough(name, [branch for branch in branches if branch.size != ladder.held_out])
    return branches


def check_enough(name: str, fitted: Sequence[Branch]) -> None:
    """Raises ValueError for runs that no law can be fitted to; they would be trained in vain."""
    by_parameters: dict[int, str] = {}
    for branch in fitted:
        if (other := by_parameters.setdefault(branch.parameters, branch.size)) != branch.size:
            raise ValueError(
                f"ladders.{name}.sizes: expected another number of parameters of each size, found "
                f"{branch.parameters:,} without embeddings of {other} and of {branch.size}; "
                "change model.d_model or model.n_layers of one"
            )
    numbers = count_numbers([(branch.parameters, branch.tokens) for branch in fitted])
    if len(fitted) <= numbers:
        raise ValueError(
            f"ladders.{name}: expected more runs to predict from than the law has numbers, "
            f"{numbers}; found {len(fitted)}; add a size, or a budget"
        )


def load_size(name: str, ladder: LadderConfig, size: str) -> TrainConfig:
    """The training config of a size, without length and schedule.

    Raises ValueError for a mistake in it, or in the size's overrides.
    """
    words = [*ladder.overrides, *ladder.sizes[size]]
    try:
        cfg = TrainConfig.load(ladder.train, words, validate_paths=False)
        check_range("global_train_batch_size", cfg.global_train_batch_size, 1)
        # They would end or decay a branch elsewhere than its budget says.
        for key, found in (("stop_at", cfg.stop_at), ("scheduler.t_max", cfg.scheduler.t_max)):
            if found is not None:
                raise ValueError(
                    f"{key}: expected none in the training config of a ladder, whose budgets "
                    f"decide it, found {found}; remove it from {ladder.train}"
                )
        return cfg
    except FileNotFoundError as error:
        raise Mistakes([f"ladders.{name}.train: {error}"]) from error
    except ValueError as error:
        where = f"ladders.{name}.sizes.{size}"
        raise Mistakes([f"{where}: {mistake}" for mistake in each_mistake(error)]) from error


def list_branches_of_size(
    name: str, ladder: LadderConfig, size: str, cfg: TrainConfig
) -> list[Branch]:
    """The runs of one size, the shortest first."""
    step_tokens = cfg.global_train_batch_size * cfg.model.max_sequence_length
    parameters = count_non_embedding(cfg.model)
    unit = step_tokens if cfg.scheduler.units == SchedulerUnits.tokens else 1
    warmup = math.ceil(cfg.scheduler.t_warmup / unit)
    found: list[Branch] = []
    for budget in ladder.budgets:
        run = name_ladder_run(name, size, budget)
        steps = max(2, round(count_tokens(budget, parameters) / step_tokens))
        trunk = steps - max(1, round(ladder.decay_share * steps))
        if trunk <= warmup:
            raise ValueError(
                f"ladders.{name}.budgets: expected {run} to decay after its warm-up of {warmup:,} "
                f"steps, found that it would from step {trunk:,} of {steps:,} on; "
                f"take more than {budget}, or a smaller scheduler.t_warmup"
            )
        if found and trunk <= found[-1].trunk_steps:
            raise ValueError(
                f"ladders.{name}.budgets: expected rising ones, found that {run} with {steps:,} "
                f"steps leaves the trunk no later than {found[-1].name} with "
                f"{found[-1].steps:,}; put the shortest first, further apart"
            )
        flops = 6.0 * (parameters + count_head(cfg.model)) * steps * step_tokens
        decay = (steps - trunk) * unit
        found.append(
            Branch(
                run,
                size,
                budget,
                parameters,
                count_parameters(cfg.model),
                steps,
                trunk,
                decay,
                step_tokens,
                flops,
            )
        )
    return found


def count_tokens(budget: str, parameters: int) -> float:
    """The tokens of a budget.

    >>> count_tokens("20x", 1000), count_tokens("4e6T", 1000)
    (20000.0, 4000000.0)
    """
    number, unit = float(budget[:-1]), budget[-1]
    return number * parameters if unit == "x" else number


def find_ladder(ladders: Mapping[str, LadderConfig], name: str) -> LadderConfig:
    """The ladder of a name. ValueError for an unknown one."""
    if name not in ladders:
        raise ValueError(
            f"config/config.yaml: expected one of the ladders {', '.join(ladders) or '(none)'}, "
            f"found {name}; " + suggest_name(name, ladders, f"add {name} to ladders")
        )
    return ladders[name]


def list_names(ladders: Mapping[str, LadderConfig], taken: Container[str]) -> dict[str, str]:
    """The names of all runs of the ladders, each with its ladder; no training config is read.

    Args:
        taken: the names of other runs, and of soups.

    Raises:
        ValueError: a ladder cannot be, or a run of one has a name that another has.
    """
    found: dict[str, str] = {}
    for name, ladder in ladders.items():
        if not NAME.fullmatch(name) or name == "check":
            raise ValueError(
                "ladders: expected names of letters, digits, _, . and -, and not check, which is a "
                f"command, found {name!r}; rename it"
            )
        try:
            ladder.check()
        except ValueError as error:
            raise ValueError(f"ladders.{name}.{error}") from error
        for size, budget in product(ladder.sizes, ladder.budgets):
            if (run := name_ladder_run(name, size, budget)) in found or run in taken:
                other = "a run or a soup" if run in taken else f"the ladder {found[run]}"
                raise ValueError(
                    f"ladders.{name}.sizes: expected names of its own for its runs, found {run}, "
                    f"which {other} has, too; rename the ladder or the size"
                )
            found[run] = name
    return found


def run_settings(ladder: LadderConfig) -> dict[str, Any]:
    """What all runs of a ladder have in common, of the settings of a run."""
    return {
        "train": ladder.train,
        "dataset": ladder.dataset,
        "evaluation": ladder.evaluation,
        "processes": ladder.processes,
    }


def branch_settings(
    ladder: LadderConfig, branch: Branch, branches: Sequence[Branch]
) -> dict[str, Any]:
    """The other settings of a branch: its links are where it and shorter ones leave the trunk."""
    schedule = {
        "max_duration": branch.steps,
        "scheduler.name": SchedulerType.warmup_stable_decay.value,
        "scheduler.t_decay": branch.decay,
    }
    shorter = [one for one in branches if one.size == branch.size and one.steps <= branch.steps]
    return {
        "overrides": [
            *ladder.overrides,
            *ladder.sizes[branch.size],
            *(f"{key}={value}" for key, value in schedule.items()),
        ],
        "links": [one.trunk_steps for one in shorter],
    }

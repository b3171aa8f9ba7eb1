"""The settings of a cluster: the defaults of profiles/slurm/config.yaml, and a site's own values.

The profile lists all settings with their defaults; a site's file overrides some of them. The
profile, a YTE template, calls the functions of this module to fill itself in.
"""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SITE = "OLMO_SITE"  # the environment variable that names a site's file
DEFAULT_SITE = Path("profiles/slurm/site.yaml")
TRAINING = ("train", "link")
ON_ONE_GPU = ("heldout", "heldout_of", "evaluate", "bench_tps")  # training: see the run's config


def load_settings(defaults: dict[str, Any]) -> Any:
    """The settings of this site: `defaults`, overridden by the file $OLMO_SITE or site.yaml.

    Raises:
        ValueError: $OLMO_SITE does not exist, or the file has an unknown setting.
    """
    merged: Any = OmegaConf.create(defaults)
    path = Path(os.environ.get(SITE) or DEFAULT_SITE)
    if not path.exists():
        if os.environ.get(SITE):
            raise ValueError(f"${SITE}: expected a file of settings, found no {path}")
        return merged
    OmegaConf.set_struct(merged, True)  # an unknown setting is an error
    try:
        site = OmegaConf.load(path)
        if not isinstance(site, DictConfig):
            raise ValueError(f"{path}: expected `setting: value`, found a list")
        settings: Any = OmegaConf.merge(merged, site)
        for name, value in defaults.items():
            if isinstance(value, dict) and not isinstance(settings[name], DictConfig):
                raise ValueError(f"{path}: {name}: expected {', '.join(value)}, each with settings")
        check_jobs(settings, path)
        return settings
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{path}: {str(error).splitlines()[0]}; profiles/slurm/config.yaml lists "
            "all settings at its top"
        ) from error


def check_jobs(site: Any, path: Path) -> None:
    """Check `arrays` and `together`: known stages, each once, whose requests to SLURM agree.

    Raises:
        ValueError: they are wrong. Snakemake would ignore an unknown stage; on stages with
            different requests it fails when the first one is submitted, and then hangs.
    """
    listed = [*site.arrays, *(stage for stages in site.together for stage in stages)]
    for stage in listed:
        if stage not in site.stages:
            raise ValueError(f"{path}: expected one of {', '.join(site.stages)}, found {stage}")
        if listed.count(stage) > 1:
            raise ValueError(
                f"{path}: expected {stage} once in `arrays` and `together`, found it twice"
            )
    for stages in site.together:
        for stage in stages[1:]:
            if slurm_resources(site, stage) != slurm_resources(site, stages[0]):
                raise ValueError(
                    f"{path}: together: expected stages with the same SLURM resources, found "
                    f"{stages[0]} with {slurm_resources(site, stages[0])} and {stage} with "
                    f"{slurm_resources(site, stage)}; remove one of them"
                )


def slurm_resources(site: Any, stage: str) -> dict[str, str]:
    """The resources of a stage's job that are text: partition, GPU, further options of sbatch.

    Training gets --no-kill, so that a run with min_nodes survives the loss of a node (any other
    run ends by itself), and a signal before its time limit.
    """
    training = stage in TRAINING
    extra = (
        ["--no-kill", site.extra, signal_option(site.warning_seconds)] if training else [site.extra]
    )
    gpu_partition = site.gpu_partition if training or stage in ON_ONE_GPU else None
    resources = {
        "slurm_partition": gpu_partition or site.partition,
        "gres": f"{site.gpu}:1" if stage in ON_ONE_GPU and site.gpu else None,
        "slurm_extra": " ".join(filter(None, extra)),
    }
    return {name: str(text) for name, text in resources.items() if text}


def grow_with_attempt(first: int, most: int) -> str:
    """A resource that grows with each attempt, as an expression that snakemake evaluates."""
    return f"min(attempt * {first}, {most})"


def stages_per_job(site: Any, stage: str) -> int:
    """The number of stages that share the job of this one, and so its time limit."""
    return next((len(stages) for stages in site.together if stage in stages), 1)


def signal_option(seconds: int) -> str:
    """The option of sbatch that sends SIGUSR1 so many seconds before a time limit; 0: none."""
    return f"--signal=USR1@{seconds}" if seconds else ""

"""What a cluster is like: the settings on top of profiles/slurm/config.yaml, and a site's own.

The profile holds the settings and their defaults; a second file says what is different here. This
module joins the two for the profile to fill in. SLURM does the scheduling.
"""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SITE = "OLMO_SITE"  # names a site's file; the default lies beside the profile
BESIDE = Path("profiles/slurm/site.yaml")


def settings(defaults: dict[str, Any]) -> Any:
    """The settings of this site: `defaults`, and what $OLMO_SITE or site.yaml says otherwise.

    Raises:
        ValueError: the file is not there, or sets what there is no such setting for.
    """
    merged: Any = OmegaConf.create(defaults)
    path = Path(os.environ.get(SITE) or BESIDE)
    if not path.exists():
        if os.environ.get(SITE):
            raise ValueError(f"${SITE}: expected a file of a site's settings, found no {path}")
        return merged
    OmegaConf.set_struct(merged, True)  # a setting that the profile does not know is an error
    try:
        site = OmegaConf.load(path)
        if not isinstance(site, DictConfig):
            raise ValueError(f"{path}: expected `setting: value`, found a list")
        joined: Any = OmegaConf.merge(merged, site)
        for name, value in defaults.items():
            if isinstance(value, dict) and not isinstance(joined[name], DictConfig):
                raise ValueError(f"{path}: {name}: expected {', '.join(value)}, each with settings")
        check_jobs(joined, path)
        return joined
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{path}: {str(error).splitlines()[0]}; the settings that there are stand on top of "
            "profiles/slurm/config.yaml"
        ) from error


def check_jobs(site: Any, path: Path) -> None:
    """Whether `arrays` and `together` name stages that there are, each once.

    Raises:
        ValueError: they do not; snakemake would pass over it.
    """
    named = [*site.arrays, *(stage for stages in site.together for stage in stages)]
    for stage in named:
        if stage not in site.stages:
            raise ValueError(f"{path}: expected one of {', '.join(site.stages)}, found {stage}")
        if named.count(stage) > 1:
            raise ValueError(f"{path}: {stage} is named twice in `arrays` and `together`")


def growing(first: int, most: int) -> str:
    """A resource that grows with each attempt, in the words that snakemake evaluates."""
    return f"min(attempt * {first}, {most})"


def stages_of_a_job(site: Any, stage: str) -> int:
    """How many stages share the job of this one, and so its minutes."""
    return next((len(stages) for stages in site.together if stage in stages), 1)


def warned(seconds: int) -> str:
    """How sbatch is asked to send SIGUSR1 so long before a time limit; 0: not at all."""
    return f"--signal=USR1@{seconds}" if seconds else ""

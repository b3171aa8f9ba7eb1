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
TRAINING = ("train", "link")
ON_A_GPU = ("heldout", "heldout_of", "evaluate", "bench_tps")  # one; of training its run says more


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
    """Whether `arrays` and `together` name stages that there are, each once, and those fit.

    Raises:
        ValueError: they do not. Snakemake would pass over a stage that there is not; and over
            stages that do not fit it breaks when the first one is submitted, and waits for ever.
    """
    named = [*site.arrays, *(stage for stages in site.together for stage in stages)]
    for stage in named:
        if stage not in site.stages:
            raise ValueError(f"{path}: expected one of {', '.join(site.stages)}, found {stage}")
        if named.count(stage) > 1:
            raise ValueError(f"{path}: {stage} is named twice in `arrays` and `together`")
    for stages in site.together:
        for stage in stages[1:]:
            if words(site, stage) != words(site, stages[0]):
                raise ValueError(
                    f"{path}: together: expected stages that ask the same of SLURM, found "
                    f"{stages[0]} with {words(site, stages[0])} and {stage} with "
                    f"{words(site, stage)}; leave one of them out"
                )


def words(site: Any, stage: str) -> dict[str, str]:
    """What a stage's job asks of SLURM that is no number: partition, GPU, more words for sbatch.

    Training whose run may go on with fewer nodes (min_nodes) outlives one (--no-kill); any other
    ends by itself. It is warned before its time is up.
    """
    training = stage in TRAINING
    extra = ["--no-kill", site.extra, warned(site.warning_seconds)] if training else [site.extra]
    own = site.gpu_partition if training or stage in ON_A_GPU else None
    found = {
        "slurm_partition": own or site.partition,
        "gres": f"{site.gpu}:1" if stage in ON_A_GPU and site.gpu else None,
        "slurm_extra": " ".join(filter(None, extra)),
    }
    return {resource: str(word) for resource, word in found.items() if word}


def growing(first: int, most: int) -> str:
    """A resource that grows with each attempt, in the words that snakemake evaluates."""
    return f"min(attempt * {first}, {most})"


def stages_of_a_job(site: Any, stage: str) -> int:
    """How many stages share the job of this one, and so its minutes."""
    return next((len(stages) for stages in site.together if stage in stages), 1)


def warned(seconds: int) -> str:
    """How sbatch is asked to send SIGUSR1 so long before a time limit; 0: not at all."""
    return f"--signal=USR1@{seconds}" if seconds else ""

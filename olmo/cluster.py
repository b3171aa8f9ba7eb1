"""What a cluster is like: the settings on top of profiles/slurm/config.yaml, and a site's own.

The profile holds the settings and their defaults; a second file says what is different here. This
module joins the two, for the profile to fill in, and nothing else: SLURM does the scheduling.
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
        return joined
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{path}: {str(error).splitlines()[0]}; the settings that there are stand on top of "
            "profiles/slurm/config.yaml"
        ) from error


def growing(first: int, most: int) -> str:
    """A resource that grows with each attempt, in the words that snakemake evaluates."""
    return f"min(attempt * {first}, {most})"

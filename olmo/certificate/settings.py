"""The section `certificate` of config/config.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from olmo.config import BaseConfig


@dataclass
class CertificateConfig(BaseConfig):
    """What `snakemake certificate/RUN` states, and the key that signs it."""

    key: str | None = None  # the private key's file, in PEM; $OLMO_SIGNING_KEY is another
    licence: str | None = None  # of the checkpoint: its SPDX identifier, as Apache-2.0
    # Of data sets, where the records of their sources have none, and of the checkpoints from
    # elsewhere that runs start from, by the run; NOASSERTION states that it is not known.
    licences: dict[str, str] = field(default_factory=dict)
    publisher: str | None = None  # who releases it: a name, or a URL
    export: bool = False  # hf/RUN is released with it

"""Snakemake's logger plugin `olmo`: snakemake finds a plugin by the name of its module."""

from olmo.pipeline.screen import LogHandler

__all__ = ["LogHandler"]

"""The matrix: which settings are timed, from a YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from olmo.config import BaseConfig, FP8Backend, TrainConfig
from olmo.model.attention import Backend

EAGER, NONE, MSAMP = "eager", "none", "msamp"
COMPILE_MODES = (
    EAGER,
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)


@dataclass(frozen=True, order=True)
class Cell:
    """One setting."""

    shape: str
    attention: str = "auto"  # a kernel of olmo.model.attention, or the trainer's own choice
    compile: str = EAGER  # or a mode of torch.compile
    microbatch: int = 1
    precision: str = "fp32"
    fp8: str = NONE  # or a backend of olmo.precision, or msamp

    @property
    def name(self) -> str:
        """For people and for files: olmo-250m.auto.default.mb8.amp_bf16.none"""
        parts = (self.shape, self.attention, self.compile, f"mb{self.microbatch}")
        return ".".join((*parts, self.precision, self.fp8))


@dataclass
class Group(BaseConfig):
    """Cells: each value with each of the others."""

    shape: list[str]
    attention: list[str] = field(default_factory=lambda: ["auto"])
    compile: list[str] = field(default_factory=lambda: [EAGER])
    microbatch: list[int] = field(default_factory=lambda: [1])
    precision: list[str] = field(default_factory=lambda: ["fp32"])
    fp8: list[str] = field(default_factory=lambda: [NONE])

    def cells(self) -> list[Cell]:
        values = (self.shape, self.attention, self.compile, self.microbatch, self.precision)
        return [Cell(*choice) for choice in product(*values, self.fp8)]


@dataclass
class Reference(BaseConfig):
    """A speed that somebody else measured, and with what."""

    shape: str
    tokens_per_second: float
    what: str
    attention: str = "auto"
    compile: str = EAGER
    microbatch: int | None = None


@dataclass
class Section(BaseConfig):
    """What is timed on one kind of device."""

    model: dict[str, Any]  # what all shapes share
    shapes: dict[str, dict[str, Any]]
    groups: list[Group]
    warmup: int = 5  # steps before those that count
    steps: int = 20
    limit_s: float = 600  # of one cell's process
    references: list[Reference] = field(default_factory=list)

    def cells(self) -> list[Cell]:
        """Each cell once, in the order of the groups.

        Raises:
            ValueError: a value that there is not.
        """
        known: dict[str, Iterable[str]] = {
            "shape": self.shapes,
            "attention": ["auto", *Backend],
            "compile": COMPILE_MODES,
            "fp8": [NONE, *FP8Backend, MSAMP],
        }
        found = list(dict.fromkeys(cell for group in self.groups for cell in group.cells()))
        for cell in found:
            for name, values in known.items():
                if (value := getattr(cell, name)) not in values:
                    raise ValueError(
                        f"{name}: expected one of {', '.join(values)}; found {value!r}"
                    )
        return found

    def train_config(self, cell: Cell) -> TrainConfig:
        """What the trainer is given for a cell; a step is one microbatch.

        Raises:
            ValueError: a setting that there is not.
        """
        settings: dict[str, Any] = {
            "model": self.model | self.shapes[cell.shape],
            "precision": cell.precision,
            "device_train_microbatch_size": cell.microbatch,
            "global_train_batch_size": cell.microbatch,
            "max_duration": self.warmup + self.steps,
            "optimizer": {"name": "adamw", "learning_rate": 4e-4, "weight_decay": 0.1},
            "scheduler": {"name": "constant", "t_warmup": 0},
            "max_grad_norm": 1.0,
        }
        if cell.compile != EAGER:
            mode = None if cell.compile == "default" else cell.compile
            settings["compile"] = {"mode": mode, "fullgraph": True}
        if cell.fp8 == MSAMP:
            settings["use_msamp"] = True
        elif cell.fp8 != NONE:
            settings["fp8"] = {"backend": cell.fp8}
        return TrainConfig.new(**settings)


@dataclass
class Matrix(BaseConfig):
    """A file of config/bench."""

    cpu: Section
    cuda: Section


def load(path: Path, kind: str) -> Section:
    """The section of a matrix file for a kind of device, cpu or cuda."""
    try:
        section: Section = getattr(Matrix.load(path), kind)
        for cell in section.cells():
            _ = section.train_config(cell).autocast_precision
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return section


def as_plain(cell: Cell) -> dict[str, Any]:
    return asdict(cell)

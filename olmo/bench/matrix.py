"""The matrix: which settings are timed, from a YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmo.config import BaseConfig, FP8Backend, TrainConfig
from olmo.config.strict import check_range
from olmo.model.attention import Backend

EAGER, NONE, MSAMP, OURS = "eager", "none", "msamp", "ours"
# Whose step ours is held against, and by what it may compute attention.
PEERS = {
    "ai2-olmo": ("sdpa", "flash-attn"),
    "transformers": ("sdpa", "math", "flash-attn"),
}
OWN = ("attention", "compile", "precision", "fp8", "switch")  # ours beside a peer
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
    switch: str = NONE  # or one of the matrix's switches
    whose: str = OURS  # or one of PEERS

    @property
    def name(self) -> str:
        """For people and for files: olmo-250m.auto.default.mb8.amp_bf16.none"""
        parts = (self.shape, self.attention, self.compile, f"mb{self.microbatch}")
        whose = () if self.whose == OURS else (self.whose,)
        switch = () if self.switch == NONE else (self.switch,)
        return ".".join((*whose, *parts, self.precision, self.fp8, *switch))

    @property
    def extras(self) -> tuple[str, str]:
        """fp8 and switch, empty where there are none."""
        return ("" if self.fp8 == NONE else self.fp8, "" if self.switch == NONE else self.switch)


@dataclass(frozen=True)
class Pair:
    """Theirs and ours, timed in turns: the same shape, microbatch and data."""

    theirs: Cell
    ours: Cell

    @property
    def name(self) -> str:
        return f"{self.theirs.name}.beside.{self.ours.attention}.{self.ours.compile}"


@dataclass
class Group(BaseConfig):
    """Cells: each value with each of the others."""

    shape: list[str]
    attention: list[str] = field(default_factory=lambda: ["auto"])
    compile: list[str] = field(default_factory=lambda: [EAGER])
    microbatch: list[int] = field(default_factory=lambda: [1])
    precision: list[str] = field(default_factory=lambda: ["fp32"])
    fp8: list[str] = field(default_factory=lambda: [NONE])
    switch: list[str] = field(default_factory=lambda: [NONE])

    def cells(self) -> list[Cell]:
        values = (self.shape, self.attention, self.compile, self.microbatch, self.precision)
        return [Cell(*choice) for choice in product(*values, self.fp8, self.switch)]


@dataclass
class Peers(BaseConfig):
    """Pairs: each value with each of the others for them, one setting for us."""

    shape: list[str]
    peer: list[str] = field(default_factory=lambda: list(PEERS))
    attention: list[str] = field(default_factory=lambda: ["sdpa"])
    compile: list[str] = field(default_factory=lambda: [EAGER])
    microbatch: list[int] = field(default_factory=lambda: [1])
    precision: list[str] = field(default_factory=lambda: ["fp32"])
    ours: dict[str, str] = field(default_factory=dict)  # what is not as theirs is, see OWN

    def pairs(self) -> list[Pair]:
        values = (self.shape, self.attention, self.compile, self.microbatch, self.precision)
        theirs = [Cell(*choice, whose=peer) for peer in self.peer for choice in product(*values)]
        return [Pair(cell, replace(cell, **self.of_ours())) for cell in theirs]

    def of_ours(self) -> dict[str, Any]:
        if unknown := self.ours.keys() - set(OWN):
            raise ValueError(
                f"ours: expected {', '.join(OWN)}; found {', '.join(sorted(unknown))}. Shape and "
                "microbatch are those of the peer"
            )
        return {"attention": "auto", "whose": OURS} | self.ours


@dataclass
class Reference(BaseConfig):
    """A speed that somebody else measured, and with what."""

    shape: str
    tokens_per_second: float
    what: str
    attention: list[str] = field(default_factory=lambda: ["auto"])  # any of them
    compile: str = EAGER
    microbatch: int | None = None  # None: whatever it is


@dataclass
class Section(BaseConfig):
    """What is timed on one kind of device."""

    model: dict[str, Any]  # what all shapes share
    shapes: dict[str, dict[str, Any]]
    groups: list[Group]
    switches: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each changes
    warmup: int = 5  # steps before those that count
    steps: int = 20
    limit_s: float = 600  # of one cell's process, and twice that of a pair's
    memory_bytes: int | None = None  # of one process on a CPU; None: what is free
    peers: list[Peers] = field(default_factory=list)
    rounds: int = 5  # of a pair: theirs, ours; each time a share of the steps
    references: list[Reference] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("warmup", 0), ("steps", 1), ("rounds", 1), ("limit_s", 0.1)):
            check_range(name, getattr(self, name), least)

    def cells(self) -> list[Cell]:
        """Each cell once, in the order of the groups.

        Raises:
            ValueError: a value that there is not.
        """
        found = list(dict.fromkeys(cell for group in self.groups for cell in group.cells()))
        for cell in found:
            self.check(cell)
        return found

    def pairs(self) -> list[Pair]:
        """Each pair once.

        Raises:
            ValueError: a value that there is not.
        """
        found = list(dict.fromkeys(pair for group in self.peers for pair in group.pairs()))
        for pair in found:
            self.check(pair.theirs)
            self.check(pair.ours)
        return found

    def check(self, cell: Cell) -> None:
        known: dict[str, Iterable[str]] = {
            "shape": self.shapes,
            "peer": [OURS, *PEERS],
            "attention": PEERS.get(cell.whose, ["auto", *Backend]),
            "compile": COMPILE_MODES,
            "fp8": [NONE, *FP8Backend, MSAMP],
            "switch": [NONE, *self.switches],
        }
        for name, values in known.items():
            if (value := getattr(cell, "whose" if name == "peer" else name)) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}; found {value!r}")

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What any trainer is given for a cell, by OLMo's names; a step is one microbatch."""
        return {
            "model": self.model | self.shapes[cell.shape],
            "precision": cell.precision,
            "device_train_microbatch_size": cell.microbatch,
            "global_train_batch_size": cell.microbatch,
            "max_duration": self.warmup + self.steps,
            "optimizer": {
                "name": "adamw",
                "learning_rate": 4e-4,
                "weight_decay": 0.1,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
            },
            "scheduler": {"name": "constant", "t_warmup": 0},
            "max_grad_norm": 1.0,
        }

    def train_config(self, cell: Cell) -> TrainConfig:
        """What our trainer is given for a cell.

        Raises:
            ValueError: a setting that there is not.
        """
        settings = self.settings(cell)
        if cell.attention != "auto":
            settings["attention"] = cell.attention
        if cell.compile != EAGER:
            mode = None if cell.compile == "default" else cell.compile
            settings["compile"] = {"mode": mode, "fullgraph": True}
        if cell.fp8 == MSAMP:
            settings["use_msamp"] = True
        elif cell.fp8 != NONE:
            settings["fp8"] = {"backend": cell.fp8}
        switched = OmegaConf.merge(settings, self.switches.get(cell.switch, {}))
        whole: Any = OmegaConf.to_container(switched)
        return TrainConfig.new(**whole)


@dataclass
class Matrix(BaseConfig):
    """A file of config/bench."""

    cpu: Section
    cuda: Section


def load(path: Path, kind: str) -> Section:
    """The section of a matrix file for a kind of device, cpu or cuda."""
    section: Section = getattr(Matrix.load(path), kind)
    try:
        ours = [pair.ours for pair in section.pairs()]
        for cell in [*section.cells(), *ours]:
            _ = section.train_config(cell).autocast_precision
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return section


def as_plain(cell: Cell) -> dict[str, Any]:
    """As a record has it."""
    return asdict(cell)

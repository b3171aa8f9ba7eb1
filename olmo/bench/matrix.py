"""The matrix of settings to time, read from a YAML file (config/bench)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmo.config import BaseConfig, FP8Backend, TrainConfig
from olmo.config.strict import check_range
from olmo.model.attention import Backend

EAGER, NONE, MSAMP, OURS = "eager", "none", "msamp", "ours"
# Other trainers, with the attention kernels that they can use.
PEERS = {
    "ai2-olmo": ("sdpa", "flash-attn"),
    "transformers": ("sdpa", "math", "flash-attn"),
}
OURS_FIELDS = ("attention", "compile", "precision", "fp8", "switch")  # may differ from the peer's
COMPILE_MODES = (
    EAGER,
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)


@dataclass(frozen=True, order=True)
class Cell:
    """One combination of settings."""

    shape: str
    attention: str = "auto"  # a kernel of olmo.model.attention; auto: the trainer chooses
    compile: str = EAGER  # or a mode of torch.compile
    microbatch: int = 1
    precision: str = "fp32"
    fp8: str = NONE  # or a backend of olmo.precision, or msamp
    switch: str = NONE  # or one of the matrix's switches
    whose: str = OURS  # or one of PEERS

    @property
    def name(self) -> str:
        """In reports and file names: olmo-250m.auto.default.mb8.amp_bf16.none"""
        parts = [self.shape, self.attention, self.compile, f"mb{self.microbatch}"]
        parts += [self.precision, self.fp8]
        peer = [self.whose] * (self.whose != OURS)
        return ".".join(peer + parts + [self.switch] * (self.switch != NONE))

    @property
    def extras(self) -> tuple[str, str]:
        """fp8 and switch; empty strings for `none`."""
        return ("" if self.fp8 == NONE else self.fp8, "" if self.switch == NONE else self.switch)


@dataclass(frozen=True)
class Pair:
    """A peer's cell and ours, timed in turns with the same shape, microbatch and data."""

    theirs: Cell
    ours: Cell

    @property
    def name(self) -> str:
        return f"{self.theirs.name}.beside.{self.ours.attention}.{self.ours.compile}"


@dataclass
class Group(BaseConfig):
    """Cells: the product of these values."""

    shape: list[str]
    attention: list[str] = field(default_factory=lambda: ["auto"])
    compile: list[str] = field(default_factory=lambda: [EAGER])
    microbatch: list[int] = field(default_factory=lambda: [1])
    precision: list[str] = field(default_factory=lambda: ["fp32"])
    fp8: list[str] = field(default_factory=lambda: [NONE])
    switch: list[str] = field(default_factory=lambda: [NONE])

    def cells(self) -> list[Cell]:
        return [Cell(*values) for values in product(*astuple(self))]


@dataclass
class PeerGroup(BaseConfig):
    """Pairs: the product of the peers' values, each with one setting of ours."""

    shape: list[str]
    peer: list[str] = field(default_factory=lambda: list(PEERS))
    attention: list[str] = field(default_factory=lambda: ["sdpa"])
    compile: list[str] = field(default_factory=lambda: [EAGER])
    microbatch: list[int] = field(default_factory=lambda: [1])
    precision: list[str] = field(default_factory=lambda: ["fp32"])
    ours: dict[str, str] = field(default_factory=dict)  # OURS_FIELDS that differ from the peer's

    def pairs(self) -> list[Pair]:
        """Raises ValueError for an unknown field in `ours`."""
        if unknown := self.ours.keys() - set(OURS_FIELDS):
            raise ValueError(
                f"ours: expected {', '.join(OURS_FIELDS)}; found {', '.join(sorted(unknown))}. "
                "Shape and microbatch are those of the peer"
            )
        changes: dict[str, Any] = {"attention": "auto", "whose": OURS} | self.ours
        values = (self.shape, self.attention, self.compile, self.microbatch, self.precision)
        theirs = [Cell(*choice, whose=peer) for peer in self.peer for choice in product(*values)]
        return [Pair(cell, replace(cell, **changes)) for cell in theirs]


@dataclass
class Reference(BaseConfig):
    """A published speed, with its settings."""

    shape: str
    tokens_per_second: float
    what: str
    attention: list[str] = field(default_factory=lambda: ["auto"])  # one of these
    compile: str = EAGER
    microbatch: int | None = None  # None: any


@dataclass
class Section(BaseConfig):
    """What to time on one kind of device."""

    model: dict[str, Any]  # shared by all shapes
    shapes: dict[str, dict[str, Any]]
    groups: list[Group]
    switches: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # name → changes of a train config
    warmup: int = 5  # steps before the timed ones
    steps: int = 20
    limit_s: float = 600  # of one cell; a pair has twice that
    memory_bytes: int | None = None  # of one process on a CPU; None: the free memory
    peers: list[PeerGroup] = field(default_factory=list)
    rounds: int = 5  # of a pair: a share of the steps by the peer, then by us
    references: list[Reference] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("warmup", 0), ("steps", 1), ("rounds", 1), ("limit_s", 0.1)):
            check_range(name, getattr(self, name), least)

    def restricted_to(self, shapes: Sequence[str]) -> Section:
        """The section with these shapes alone, or all if none is named. Raises ValueError."""
        if unknown := set(shapes) - self.shapes.keys():
            raise ValueError(
                f"shape: expected {', '.join(self.shapes)}; found {', '.join(sorted(unknown))}"
            )

        def restricted(group: Any) -> Any:
            return replace(group, shape=[s for s in group.shape if not shapes or s in shapes])

        groups, peers = (list(map(restricted, some)) for some in (self.groups, self.peers))
        return replace(self, groups=groups, peers=peers)

    def cells(self) -> list[Cell]:
        """Each cell once, in the order of the groups. Raises ValueError for an unknown value."""
        return self._validated(cell for group in self.groups for cell in group.cells())

    def pairs(self) -> list[Pair]:
        """Each pair once, in the order of the groups. Raises ValueError for an unknown value."""
        pairs = list(dict.fromkeys(pair for group in self.peers for pair in group.pairs()))
        self._validated(cell for pair in pairs for cell in (pair.theirs, pair.ours))
        return pairs

    def _validated(self, cells: Iterable[Cell]) -> list[Cell]:
        unique = list(dict.fromkeys(cells))
        for cell in unique:
            self.validate(cell)
        return unique

    def validate(self, cell: Cell) -> None:
        """Raises ValueError for an unknown value."""
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

    def shared_config(self, cell: Cell) -> dict[str, Any]:
        """The train config of a cell that ours and ai2-olmo share. A step is one microbatch."""
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
        """The train config of a cell for our trainer. Raises ValueError for an unknown setting."""
        settings = self.shared_config(cell)
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
        config: Any = OmegaConf.to_container(switched)
        return TrainConfig.new(**config)


@dataclass
class Matrix(BaseConfig):
    """A file of config/bench."""

    cpu: Section
    cuda: Section


def load_section(path: Path, kind: str) -> Section:
    """The section of a matrix file for a kind of device, cpu or cuda. Raises ValueError."""
    section: Section = getattr(Matrix.load(path), kind)
    try:
        for cell in [*section.cells(), *(pair.ours for pair in section.pairs())]:
            _ = section.train_config(cell).autocast_precision
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return section

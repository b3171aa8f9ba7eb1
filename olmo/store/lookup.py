"""A store that finds and never makes: what `olmo plan` calls a project's commands on.

An action that is not in the store gets a predicted record, so that the actions after it can be
looked at, too. Nothing is written to the real store or the project: this store's folder is a
temporary one, in which objects/ and actions/ link to the real ones.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo.store import naming
from olmo.store.action import Action
from olmo.store.record import Record, content, output_files
from olmo.store.store import Store

FOUND, REBUILT, NEW = "found", "rebuilt", "new"
# A larger file that is not in the store is not read for a plan: what it gives is not looked up.
MAX_READ_BYTES = 256 << 20


@dataclass
class Lookup:
    """One call of a stage: what was asked, and whether the store has it."""

    action: Action
    state: str  # FOUND, REBUILT (a lost object of a known action) or NEW
    names: dict[str, Path]  # output → its path
    arguments: Mapping[str, Any]
    record: Record


@dataclass(frozen=True)
class Prediction:
    """Sizes of an action's outputs, by name: bytes, or for a folder bytes by file."""

    outputs: dict[str, int | dict[str, int]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


Size = Callable[[str], int]  # digest → bytes
# The action, its outputs' paths, the call's arguments, the sizes of its inputs → what it will give.
Predict = Callable[[Action, Mapping[str, Path], Mapping[str, Any], Size], Prediction]


class LookupStore(Store):
    """See the module.

    Args:
        real: the store that is looked at.
        folder: an empty folder.
        predict: the sizes of what an action will give that the store does not have.
    """

    def __init__(self, real: Store, folder: Path, predict: Predict) -> None:
        super().__init__(folder)
        self.predict, self.lookups = predict, list[Lookup]()
        self._predicted: dict[str, int] = {}  # digest → bytes, of contents that do not exist
        for name in ("objects", "actions"):
            (folder / name).symlink_to(real.root / name)

    def find(self, action: Action, names: dict[str, Path], arguments: Mapping[str, Any]) -> Record:
        """The record of an action, or a predicted one; its outputs get their names."""
        record, state = self.record(action.key), FOUND
        if record is None:
            state = NEW
            prediction = self.predict(action, names, arguments, self.size)
            record = self._predicted_record(action, names, prediction)
        elif lost := [f for f in output_files(record) if not self.is_intact(f["sha256"])]:
            state = REBUILT
            self._predicted |= {file["sha256"]: file["size"] for file in lost}
        self.lookups.append(Lookup(action, state, names, arguments, record))
        for name, path in names.items():
            if not Path(path).absolute().is_relative_to(self.root.parent):
                raise ValueError(f"{path}: expected a path in the folder of the plan")
            naming.link_output(self, record, name, path)
        return record

    def _predicted_record(
        self, action: Action, names: dict[str, Path], given: Prediction
    ) -> Record:
        def guess(name: str, size: int) -> dict[str, Any]:
            digest = hashlib.sha256(f"{action.key} {name}".encode()).hexdigest()
            self._predicted[digest] = size
            return {"sha256": digest, "size": size}

        outputs: dict[str, Any] = {}
        for name in names:
            size = given.outputs.get(name, 0)
            if isinstance(size, dict):
                files = {path: guess(f"{name}/{path}", bytes) for path, bytes in size.items()}
                outputs[name] = {"files": files, "aside": {}}
            else:
                outputs[name] = guess(name, size)
        return Record(
            key=action.key,
            action=action.as_dict(),
            content=content(outputs),
            outputs=outputs,
            facts=given.facts,
            conditions={},
        )

    @property
    def has_predictions(self) -> bool:
        """Whether some contents are predicted, which a command cannot read."""
        return any(call.state != FOUND for call in self.lookups)

    def size(self, digest: str) -> int:
        """The bytes of a content, real or predicted; 0 if it is lost."""
        if digest in self._predicted:
            return self._predicted[digest]
        path = self.object_path(digest)
        return path.stat().st_size if path.exists() else 0

    # What a store does, without a write to the real one.

    def is_intact(self, digest: str, size: int | None = None) -> bool:
        path = self.object_path(digest)
        exists = path.exists() and size in (None, path.stat().st_size)
        return exists or digest in self._predicted

    def digest(self, path: Path) -> str:
        target = path.resolve()
        if self.is_object(path) or not target.is_file():
            return super().digest(path)
        size = target.stat().st_size
        if size <= MAX_READ_BYTES:
            digest = super().digest(path)
        else:
            digest = hashlib.sha256(f"{target} {target.stat().st_mtime_ns}".encode()).hexdigest()
        self._predicted.setdefault(digest, size)
        return digest

    def quarantine(self, path: Path, reason: str) -> None:
        pass

    def _write_record(self, record: Record) -> None:
        pass

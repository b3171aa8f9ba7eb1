"""`olmo store pull`, and what of a run's data its steps need: a laptop takes that, not the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np

from olmo.config import TrainConfig
from olmo.inspect import history
from olmo.inspect.history import OrderSource
from olmo.inspect.order import parse_steps
from olmo.store import remote as second
from olmo.store.lineage import ancestors
from olmo.store.naming import record_of
from olmo.store.record import output_files
from olmo.store.remote import Remote, TransferStats
from olmo.store.stage import current_store
from olmo.store.store import Store


def pull(
    source: str, patterns: list[str], /, inputs: bool = False, steps: str | None = None
) -> None:
    """Take what PATTERNS name, or all names there, from a second store: also by http(s).

    Each object is hashed as it arrives. With --inputs also the contents that they were made from,
    so that snakemake finds everything done. With --steps 5..9, of a final checkpoint's data the
    token shards that hold what these steps saw.
    """
    there = Remote(source)
    pulled, moved = second.pull_names(current_store(), there, patterns, inputs)
    print(f"{source}: {len(pulled):,} names; {moved}")
    if steps is None:
        return
    for final in [Path(name) for name in pulled if Path(name, "config.yaml").exists()]:
        moved = pull_shards(current_store(), there, final, parse_steps(steps))
        print(f"steps {steps} of {final}: {moved}")


def pull_shards(store: Store, remote: Remote, final: Path, steps: Iterable[int]) -> TransferStats:
    """Bring the order of a run, and the shards of tokens and labels that these steps saw.

    Args:
        final: the run's final checkpoint, which is here.
        steps: from 1 on.

    Raises:
        ValueError: `final` is no checkpoint of the pipeline's; a step that the run has not.
    """
    record = record_of(store, final)
    cfg = TrainConfig.load(final / "config.yaml", foreign=True)
    last = record["facts"].get("steps", 0)
    if wrong := [step for step in steps if not 1 <= step <= last]:
        raise ValueError(f"{final}: expected steps from 1 to {last}, found {wrong[0]}")
    sizes = {f["sha256"]: f["size"] for _, r in ancestors(store, record) for f in output_files(r)}
    given = record["action"]["inputs"]
    of_order: str = given.get("order", "")
    of_tokens: list[str] = given.get("tokens", [])
    of_labels: list[str] = given.get("labels", [])  # one for each, where there are any
    if not of_tokens or any(digest not in sizes for digest in (of_order, *of_tokens, *of_labels)):
        raise ValueError(
            f"{final}: expected the records of its order and its tokens, found some missing; pull "
            "it again from a store that was pushed to by who trained it"
        )
    with store.temp_folder() as folder:
        moved = second.fetch_objects(store, remote, {of_order: sizes[of_order]}, folder)
        width = np.dtype(cfg.data.effective_memmap_dtype).itemsize * cfg.model.max_sequence_length
        ends = list(accumulate(sizes[digest] // width for digest in of_tokens))
        place = str(store.object_path(of_order))
        origin = OrderSource(cfg, ends[-1], place, given=True, fixed=True)
        found = history.build_step_ranges(history.collect_segments(store, record), origin)
        batches = [history.find_step_range(step, found).seen.instances(step) for step in steps]
        instances = np.concatenate(batches)
        which = set(np.searchsorted(ends, instances, side="right").tolist())
        needed = {digests[i] for digests in (of_tokens, of_labels) if digests for i in which}
        wanted = {digest: sizes[digest] for digest in sorted(needed)}
        return moved + second.fetch_objects(store, remote, wanted, folder)

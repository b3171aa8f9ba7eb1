"""`olmo store pull`, and the part of a run's data that some steps need: it fits on a laptop."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np

from olmo.config import TrainConfig
from olmo.data.order import parse_steps
from olmo.inspect import history
from olmo.inspect.history import OrderSource
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
    """Copy what PATTERNS name, or all names, from a second store, also by http(s).

    Each object is hashed as it arrives.

    Args:
        source: folder or URL of the second store
        patterns: paths in its project, with * and **
        inputs: also the objects that they were made from, so that snakemake has nothing to do
        steps: also the token shards that these steps, 5..9, of a final checkpoint's run saw

    Example:
        olmo store pull s3://lab/store checkpoints/olmo-tiny/final --steps 5..9
    """
    remote = Remote(source)
    pulled, stats = second.pull_names(current_store(), remote, patterns, inputs)
    print(f"{source}: {len(pulled):,} names; {stats}")
    if steps is None:
        return
    for final in [Path(name) for name in pulled if Path(name, "config.yaml").exists()]:
        stats = pull_shards(current_store(), remote, final, parse_steps(steps))
        print(f"steps {steps} of {final}: {stats}")


def pull_shards(store: Store, remote: Remote, final: Path, steps: Iterable[int]) -> TransferStats:
    """Copy the order of a run, and the token and label shards that some steps were trained on.

    Args:
        final: the run's final checkpoint, in the local store.
        steps: counted from 1.

    Raises ValueError if `final` is not the pipeline's, or the run has no such step.
    """
    record = record_of(store, final)
    cfg = TrainConfig.load(final / "config.yaml", untrusted=True)
    last = record["facts"].get("steps", 0)
    if wrong := [step for step in steps if not 1 <= step <= last]:
        raise ValueError(f"{final}: expected steps from 1 to {last}, found {wrong[0]}")
    sizes = {f["sha256"]: f["size"] for _, r in ancestors(store, record) for f in output_files(r)}
    inputs = record["action"]["inputs"]
    order: str = inputs.get("order", "")
    tokens: list[str] = inputs.get("tokens", [])
    labels: list[str] = inputs.get("labels", [])  # none, or one for each of `tokens`
    if not tokens or any(digest not in sizes for digest in (order, *tokens, *labels)):
        raise ValueError(
            f"{final}: expected the records of its order and its tokens, found some missing; push "
            "it again from the store that trained it, and pull again"
        )
    with store.temp_folder() as folder:
        stats = second.fetch_objects(store, remote, {order: sizes[order]}, folder)
        width = np.dtype(cfg.data.effective_memmap_dtype).itemsize * cfg.model.max_sequence_length
        ends = list(accumulate(sizes[digest] // width for digest in tokens))
        path = str(store.object_path(order))
        origin = OrderSource(cfg, ends[-1], path, is_given=True, is_fixed=True)
        ranges = history.build_step_ranges(history.collect_segments(store, record), origin)
        batches = [history.find_step_range(step, ranges).seen.instances(step) for step in steps]
        files = np.searchsorted(ends, np.concatenate(batches), side="right")
        needed = {
            digests[i] for digests in (tokens, labels) if digests for i in set(files.tolist())
        }
        wanted = {digest: sizes[digest] for digest in sorted(needed)}
        return stats + second.fetch_objects(store, remote, wanted, folder)

"""How well `olmo blame` finds what made the loss of a step rise, on a CPU.

    python bench/blame.py [--documents 5000] [--budget 400] [--truth 3]

For k = 1, 3 and 10 a small model is trained on the standard library's text, of which k documents
were replaced: one of random characters in the blamed step, and in k - 1 of the 20 steps before one
of a single character, repeated (easy: their gradients are large) or one of shuffled words (hard:
real words, ordinary gradients). The optimizer is AdamW with eps 1 and beta1 0, which is gradient
descent: AdamW's own normalization keeps a single document from doing harm.

Recall@k is the share of the planted documents that are among the first k of the table. For
k = `--truth` every document of the window is left out alone, too: the share of the k largest of
these effects that the table begins with. Gradient norms need a backward pass for each instance.
"""

import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit"))

from poisoned_run import DESCENT, plant, spread

from olmo.bench.script import describe_run, parse_options
from olmo.inspect.blame import Findings, find_causes
from olmo.inspect.replay import find_start_checkpoint
from olmo.inspect.run import TrainedRun
from olmo.inspect.window import Seen, Window

LAST, WINDOW = 150, 20  # steps


def find(run: TrainedRun, budget: int) -> tuple[Findings, float]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        found = find_causes(run, LAST, LAST - WINDOW, budget, Path(work))
    return found, time.monotonic() - began


def measure_all(run: TrainedRun, found: Findings) -> dict[Seen, float]:
    """The effect of each document of the window, left out alone."""
    effects = {c.seen: c.effect or 0.0 for c in found.causes if c.seen.step == LAST}
    with tempfile.TemporaryDirectory() as work:
        _, place = find_start_checkpoint(run, LAST - WINDOW, Path(work, "start"))
        window = Window(run, LAST - WINDOW, LAST, place, Path(work))
        window.train()
        for seen in window.seen:
            if seen.step < LAST:
                effects[seen] = window.losses[LAST] - window.loss_without([seen])
    return effects


def main() -> None:
    options = parse_options(__doc__, documents=5000, budget=400, truth=3)
    print(describe_run())
    # At the rate of the test, which trains 40 steps, the loss diverges.
    settings = DESCENT | {"optimizer": DESCENT["optimizer"] | {"learning_rate": 0.3}}
    for kind in ("repeated", "shuffled"):
        for k in (1, 3, 10):
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
                plants: list[tuple[int, str]] = [(LAST, "random"), *spread(k - 1, LAST, kind)]
                planted = plant(Path(folder), plants, LAST, options.documents, **settings)
                run = TrainedRun(str(planted.folder))
                found, seconds = find(run, options.budget)
                line = describe(found, planted.ids, seconds)
                if k == options.truth:
                    line += describe_truth(measure_all(run, found), found, k)
            print(f"{kind}, k = {k}: {line}", flush=True)


def describe(found: Findings, ids: list[str], seconds: float) -> str:
    first = {cause.seen.document.id for cause in found.causes[: len(ids)]}
    moved = [
        "(not measured)" if c.effect is None else f"{c.effect:+.3f}"
        for c in found.causes
        if c.seen.document.id in ids
    ]
    return (
        f"recall@k {len(first & set(ids)) / len(ids):.2f}, loss {found.losses[LAST]:.3f} after "
        f"{found.losses[LAST - 1]:.3f}, {found.searched} steps in {found.tests} tests and "
        f"{found.replayed - found.searched} before, {seconds:.1f} s; they move the loss by "
        f"{', '.join(moved)}"
    )


def describe_truth(effects: dict[Seen, float], found: Findings, k: int) -> str:
    def name(seen: Seen) -> Any:
        return seen.step, seen.document.id

    largest = sorted(effects, key=lambda seen: -effects[seen])[:k]
    first = {name(cause.seen) for cause in found.causes[:k]}
    share = len(first & {name(seen) for seen in largest}) / k
    return f"; of the {k} largest of all {len(effects)} effects it has {share:.2f}"


if __name__ == "__main__":
    main()

"""`olmo report`: a page for a run, and one that compares all runs; each is one file."""

from __future__ import annotations

from pathlib import Path

from olmo.config import list_shown_runs
from olmo.inspect.documents import find_token_shards, select_shards
from olmo.inspect.run import TrainedRun
from olmo.io import sealed, untrusted
from olmo.report import samples as sampling
from olmo.report.index_page import format_index
from olmo.report.run_page import attempt_key, format_page
from olmo.runtime.log import format_bytes, log
from olmo.store.naming import check_not_in_store
from olmo.store.stage import current_store

SAMPLED = 4  # checkpoints of a run


def report(runs: list[str], /, folder: Path = Path("report"), samples: int = SAMPLED) -> None:
    """Write a page about each run: what trained it, how it went, what it cost, how good it is.

    Without a run it writes FOLDER/index.html, which lists all runs and compares any two. A page is
    one file. It needs no network, and has no path and no secret of this machine.

    Args:
        runs: names of runs, finished or not
        folder: where the pages are written
        samples: checkpoints of a run that write a text; 0 for none

    Example:
        olmo report olmo-tiny
        olmo report
    """
    if "index" in runs:
        raise ValueError("expected a run, found index, which is the page of all runs: olmo report")
    pages = [folder / f"{untrusted.check_part(run, 'olmo report')}.html" for run in runs]
    check_not_in_store(*pages, folder / "index.html")
    for run, page in zip(runs, pages, strict=True):
        if samples:
            try:
                sample(run, samples)
            except (ValueError, OSError) as error:  # all else that is known is shown
                log.warning(f"{run}: its checkpoints write no text: {error}")
        write_page(page, format_page(run))
    if not runs:
        write_page(folder / "index.html", format_index(list_shown_runs(), folder))


def write_page(path: Path, text: str) -> None:
    sealed.write_atomic(path, text)
    print(f"{path}: {format_bytes(len(text.encode()))}")


def sample(name: str, most: int) -> None:
    """Let checkpoints of a run write texts; those that have do not again."""
    run, store, folder = TrainedRun(name), current_store(), Path("checkpoints", name)
    shards = select_shards(run.cfg.data.paths or [], find_token_shards(store))
    if not shards:
        return  # its tokens were made elsewhere: nothing is known of its text
    heldout = [r for shard in shards for r in shard.ancestry if "heldout" in r["outputs"]]
    key = run.record["key"] if run.record else attempt_key(folder)
    prompts = sampling.choose_prompts(store, heldout)
    sampling.sample_checkpoints(folder, run.cfg, shards[0].tokenizer, key, most, prompts)

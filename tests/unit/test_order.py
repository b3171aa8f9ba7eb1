"""An order is made only where there is memory for it, and can be read as OLMo's README does."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ranks import forked

from olmo.corpus import listing
from olmo.corpus.order import order as order_command
from olmo.data import order
from olmo.store.stage import current_store

GIB = 2**30


def machine(tmp_path, *, available, groups):
    """A /proc and a /sys/fs/cgroup that say so: group → (most, now, of these cached)."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {available // 1024} kB\n")
    (proc / "self/cgroup").write_text("0::/job_7/step_0\n")
    for name, (most, now, cached) in groups.items():
        folder = cgroup / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{now}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return {"proc": proc, "cgroup": cgroup}


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({}, 8 * GIB),
        ({"job_7/step_0": ("max", 5, 0)}, 8 * GIB),
        ({"job_7/step_0": (4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
        ({"job_7/step_0": ("max", 0, 0), "job_7": (2 * GIB, GIB, 0)}, GIB),
        ({"job_7": (64 * GIB, GIB, 0)}, 8 * GIB),
    ],
)
def test_what_is_free_is_the_least_of_the_machine_s_and_the_groups(tmp_path, groups, free):
    assert order.available_memory(**machine(tmp_path, available=8 * GIB, groups=groups)) == free


def test_where_the_kernel_does_not_tell_nothing_is_refused(tmp_path, monkeypatch):
    assert order.available_memory(tmp_path, tmp_path) is None
    monkeypatch.setattr(order, "available_memory", lambda: None)
    assert len(order.global_indices(10, seed=1)) == 10


def test_an_order_that_does_not_fit_is_refused_before_it_is_begun(monkeypatch):
    monkeypatch.setattr(order, "available_memory", lambda: 4_000_000_000)
    expected = "needs 4,000,000,004 bytes of memory, and 4,000,000,000 are free"
    with pytest.raises(ValueError, match=expected):
        order.global_indices(1_000_000_001, seed=1)
    with pytest.raises(ValueError, match="has at most 4294967294 instances"):
        order.global_indices(2**32 - 1, seed=1)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that an ordinary user may look into, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OLMO_STORE", raising=False)
    yield folder
    shutil.rmtree(folder)


def map_as_an_ordinary_user(made: Path, expected: list[int]) -> None:
    if os.geteuid() == 0:  # root may open everything
        for path in (made.resolve(), made.parent):
            os.chown(path, 65534, 65534)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    global_indices = np.memmap(made, mode="r+", dtype=np.uint32)
    assert global_indices[0:100].tolist() == expected


@pytest.mark.slow
def test_the_readmes_snippet_maps_the_order_of_an_ordinary_user(place: Path) -> None:
    entry = listing.Entry("part-0", "tokens", "part-0.npy", "0" * 64, 2 * 8 * 100)
    listing.write_listing(Path("tokens.tsv"), [entry])
    made = place / "checkpoints/small/global_indices.npy"
    order_command([Path("tokens.tsv")], made, sequence_length=8, seed=1)
    expected = order.read_order(made)[:].tolist()
    child = forked(map_as_an_ordinary_user, made.absolute(), expected)
    child.join(60)
    assert child.exitcode == 0
    # To look is no change; what is written is noticed, and made again.
    assert current_store().is_intact(current_store().digest(made))
    mapped = np.memmap(made, mode="r+", dtype=np.uint32)
    mapped[0] += 1
    mapped.flush()
    order_command([Path("tokens.tsv")], made, sequence_length=8, seed=1)
    assert order.read_order(made)[:].tolist() == expected
    assert len(list(Path("store/quarantine").iterdir())) == 1


def test_too_few_instances_are_told_before_training(place: Path) -> None:
    def make(training: int, held_out: int) -> None:
        entries = [
            listing.Entry("a", "tokens", "a.npy", "0" * 64, 2 * training),
            listing.Entry("b", "tokens", "b.npy", "1" * 64, 2 * 7),
            listing.Entry("a", "heldout-tokens", "c.npy", "2" * 64, 2 * held_out),
        ]
        listing.write_listing(Path("tokens.tsv"), entries)
        order_command([Path("tokens.tsv")], place / "order", 8, seed=1, batch_size=4)

    with pytest.raises(ValueError, match=r"at least 4 instances of 8 .* found 3 in 38 tokens"):
        make(31, 8)
    with pytest.raises(ValueError, match=r"a held-out instance of 8 .* found 7 .*heldout_share"):
        make(32, 7)
    make(32, 0)
    assert sorted(order.read_order(place / "order")[:]) == [0, 1, 2, 3]

"""An order is made only where there is memory for it."""

import pytest

from olmo.data import order

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
    assert order.free_memory(**machine(tmp_path, available=8 * GIB, groups=groups)) == free


def test_where_the_kernel_does_not_tell_nothing_is_refused(tmp_path, monkeypatch):
    assert order.free_memory(tmp_path, tmp_path) is None
    monkeypatch.setattr(order, "free_memory", lambda: None)
    assert len(order.global_indices(10, seed=1)) == 10


def test_an_order_that_does_not_fit_is_refused_before_it_is_begun(monkeypatch):
    monkeypatch.setattr(order, "free_memory", lambda: 4_000_000_000)
    expected = "needs 4,000,000,004 bytes of memory, and 4,000,000,000 are free"
    with pytest.raises(ValueError, match=expected):
        order.global_indices(1_000_000_001, seed=1)
    with pytest.raises(ValueError, match="holds up to 4294967294 instances"):
        order.global_indices(2**32 - 1, seed=1)

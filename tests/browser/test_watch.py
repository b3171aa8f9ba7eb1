"""A run that is killed and resumed, watched in a terminal and on its live page."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from project import Project, until

from olmo.report.series import LOSS, MetricsFollower, find_metrics
from olmo.report.watch import PageServer, frame, look

pytestmark = pytest.mark.slow


@contextmanager
def serving(run: str) -> Iterator[str]:
    server = PageServer(run)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_that_is_killed_and_resumed(
    open_page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "project")
    project.change("config/train/small.yaml", max_duration=120, save_interval_unsharded=40)
    monkeypatch.setenv("OLMO_STORE", str(project.store))
    process = project.start("checkpoints/small/final", mark="watched")
    until(lambda: project.steps() > 50, 120)
    with chdir(project.root), serving("small") as address:
        metrics = MetricsFollower(partial(find_metrics, Path("checkpoints/small")))
        assert metrics.update()
        before = metrics.series[LOSS]
        assert before.steps == list(range(1, before.steps[-1] + 1)) and before.steps[-1] > 49
        opened = open_page(address)
        assert "running" in opened.page.locator("#state").inner_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached = project.steps()
        project.run("checkpoints/small/final", timeout=120)
        metrics.update()
        after, rows = metrics.series[LOSS], project.metrics()
        expected = {row["step"]: row[LOSS] for row in rows if LOSS in row}
        assert reached > 40 and dict(zip(after.steps, after.values, strict=True)) == expected
        assert after.steps == list(range(1, 121)), "no gap, and no step twice"
        opened.page.wait_for_function("document.querySelector('#state').textContent === 'done'")
        tiles = opened.page.locator("#tiles").inner_text()
        assert f"{expected[120]:.4f}" in tiles and "parameters" in tiles
        drawn = opened.page.evaluate(f"[[...series['{LOSS}'].steps], [...series['{LOSS}'].values]]")
        assert dict(zip(*drawn, strict=True)) == expected
        assert {url.removeprefix(address) for url in opened.requests} == {"", "data"}
        shown = frame(look("small"), metrics.series, 80)
        assert shown[0] == "small: done, step 120/120" and len(shown) < 20
        assert all(len(line) <= 80 for line in map(without_colors, shown))
        assert f"loss {expected[120]:.4f}" in shown[-1] + shown[-2]
    told = project.olmo("watch", "small")
    assert told.status == 0 and "small: done, step 120/120" in told.output


def test_another_host_name_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    monkeypatch.setenv("OLMO_STORE", str(project.store))
    with chdir(project.root), serving("small") as address:
        assert requests.get(address, timeout=20).status_code == 200
        assert requests.get(f"{address}data", timeout=20).headers["ETag"]
        foreign = {"Host": "elsewhere.example"}
        assert requests.get(address, headers=foreign, timeout=20).status_code == 403
        assert requests.get(f"{address}record.json", timeout=20).status_code == 404
        known = requests.get(f"{address}data", timeout=20).headers["ETag"]
        same = requests.get(f"{address}data", headers={"If-None-Match": known}, timeout=20)
        assert same.status_code == 304


def without_colors(line: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", line)

"""Pages in a real browser: Debian's chromium, driven by playwright, with axe for accessibility.

    uv run --group browser pytest tests/browser

Without them the tests are skipped, with the reason.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from project import Project

collect_ignore: list[str] = []


@dataclass
class Opened:
    """A page, and what it did while it was open."""

    page: Any
    errors: list[str] = field(default_factory=list)  # of the console and of its programs
    requests: list[str] = field(default_factory=list)

    def data_values(self, selector: str) -> list[str]:
        """The exact numbers that elements show."""
        values: list[str] = self.page.eval_on_selector_all(
            f"{selector} data", "all => all.map(one => one.value)"
        )
        return values

    def violations(self) -> list[tuple[str, str]]:
        """What axe finds serious: (rule, element)."""
        from axe_playwright_python.base import AXE_FILE_PATH

        self.page.evaluate(Path(AXE_FILE_PATH).read_text())
        found: list[dict[str, Any]] = self.page.evaluate("axe.run().then(r => r.violations)")
        return [
            (one["id"], node["html"][:120])
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="uv run --group browser pytest tests/browser"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a file or an address, and wait until it is drawn."""
    contexts = []

    def open_one(place: Path | str, **options: Any) -> Opened:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on(
            "console",
            lambda one: found.errors.append(one.text) if one.type in ("error", "warning") else None,
        )
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(place if isinstance(place, str) else place.absolute().as_uri())
        found.page.wait_for_selector("html[data-ready]", timeout=60_000)
        return found

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def project(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose two runs differ in their learning rate, with all their pages."""
    made = Project(tmp_path_factory.mktemp("pages") / "project")
    run = {"train": "config/train/small.yaml", "dataset": "small"}
    faster = {**run, "overrides": ["optimizer.learning_rate=6e-3"]}
    made.change("config/config.yaml", runs={"small": run, "faster": faster})
    made.run("report/small.html", "report/faster.html")
    made.run("report/index.html")
    return made

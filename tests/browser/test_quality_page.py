"""The page of a data set's quality, in a browser."""

from pathlib import Path
from typing import Any

import pytest
from project import Project

pytestmark = pytest.mark.slow
WORDS = "gopher_v1__gopher_v1__word_count"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = Project(tmp_path_factory.mktemp("quality") / "project")
    quality = {"taggers": ["gopher_v1", "c4_v2"], "keep": [f"{WORDS} >= 60", f"{WORDS} < 100"]}
    project.change("config/data/small.yaml", quality=quality)
    project.run("data/small/quality.html")
    return project.root / "data/small/quality.html"


def test_every_tag_has_a_histogram_with_its_limits(page_file: Path, open_page: Any) -> None:
    opened = open_page(page_file)
    assert opened.errors == [] and len(opened.requests) == 1
    page = opened.page
    drawn = page.locator("[data-chart] svg").count()
    assert drawn == page.locator("[data-chart]").count() > 15
    first = page.locator("[data-chart='0'] svg")
    assert first.locator("line[stroke='#d73a49']").count() == 2
    assert first.locator(".mark-rect path").count() > 5
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [one.bounding_box() for one in page.locator("[data-chart] svg").all()]
    assert all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    page.locator("summary").first.click()
    assert page.locator("details[open] pre").count() >= 2
    assert opened.violations() == []
    old = page.locator("[data-chart='0'] svg").element_handle()
    page.locator("#theme").click()
    page.wait_for_function("old => !old.isConnected", arg=old)
    assert opened.errors == []

"""The page of a run with 100,000 steps and 5,000 sources: its size, and that no peak is lost."""

from pathlib import Path
from typing import Any

import large_run
import pytest

from olmo.report.run_page import format_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    with large_run.project(root, steps=100_000, sources=5_000):
        (root / "large.html").write_text(format_page("large"))
    return root / "large.html"


def test_no_peak_is_lost(page: Path, open_page: Any) -> None:
    assert page.stat().st_size <= 15_000_000
    opened = open_page(page)
    assert opened.errors == []
    shown = opened.page.evaluate("page.charts[0].view.data('points').length")
    assert shown < 10_000
    for step in large_run.PEAKS:
        value = large_run.loss(step)
        is_shown = f"p.kind === 'raw' && p.step === {step}"
        of_step = f"page.charts[0].view.data('points').filter(p => {is_shown})"
        assert [one["value"] for one in opened.page.evaluate(of_step)] == [value]
    # What lies between two points is there as soon as one looks closer.
    opened.page.evaluate("zoom(50_000, 50_200)")
    steps = "page.charts[0].view.data('points').filter(p => p.kind === 'raw').map(p => p.step)"
    opened.page.wait_for_function(f"{steps}.length < 300")
    assert opened.page.evaluate(steps) == list(range(50_000, 50_201))


def test_a_source_is_found_among_thousands(page: Path, open_page: Any) -> None:
    opened = open_page(page)
    found = opened.page
    found.locator("svg.lineage a", has_text="download").click()
    rows = found.locator("details[open] tbody tr")
    assert rows.count() == 50
    found.get_by_label("Search the rows").fill("/part-4321.json.gz")
    found.get_by_label("Search the rows").press("Enter")
    found.wait_for_function("document.querySelectorAll('details[open] tbody tr').length === 1")
    shown = rows.first.inner_text()
    assert large_run.url(4321) in shown and large_run.digest("source", 4321) in shown
    assert "<b>ODC-BY</b>" in shown, "a licence is text"


def test_rows_are_turned_and_the_way_back_chooses_one(page: Path, open_page: Any) -> None:
    found = open_page(page).page

    def stage(name: str) -> Any:
        return found.locator(f"details.stage:has(summary b:text-is('{name}'))")

    stage("tokens").locator("summary").press("Enter")
    rows = stage("tokens").locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == 50
    stage("tokens").get_by_role("button", name="Next").click()
    assert rows.first.get_attribute("data-row") == "50"
    assert "51 to 100 of 5,000" in stage("tokens").inner_text()
    way = rows.nth(20).locator("a", has_text="documents: ")
    name = way.inner_text().removeprefix("documents: ")
    way.click()
    chosen = found.locator("tr.chosen")
    assert chosen.count() == 1 and chosen.locator("td").first.inner_text() == name
    assert int(chosen.get_attribute("data-row")) >= 50, "not on the first page of rows"
    stage("training: large").locator("summary").press("Enter")
    made_from = stage("training: large").locator("tbody td").last
    made_from.wait_for()
    assert made_from.locator("a").count() == 8 and "and 4,993 more" in made_from.inner_text()

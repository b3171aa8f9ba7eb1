"""The page of all runs, in a browser."""

from typing import Any

import pytest
from project import Project

pytestmark = pytest.mark.slow


def test_one_learning_rate_is_the_only_difference(project: Project, open_page: Any) -> None:
    opened = open_page(project.root / "report/index.html")
    assert opened.errors == [] and len(opened.requests) == 1
    page = opened.page
    cells = "rows => rows.map(row => [...row.children].map(one => one.textContent))"
    changed = page.eval_on_selector_all("#changes [data-part=config] tbody tr", cells)
    assert changed == [["optimizer.learning_rate", "0.003", "0.006"]]
    assert page.locator("p[data-part=data]").inner_text() == "data: the same"
    assert page.locator("p[data-part=code]").inner_text() == "code: the same"
    results = page.eval_on_selector_all("#changes [data-part=results] tbody tr", cells)
    assert {"eval/heldout/CrossEntropyLoss"} <= {row[0] for row in results}
    page.locator("#after").select_option("small")
    assert page.locator("#changes").inner_text().split("\n\n") == [
        f"{part}: the same" for part in ("config", "data", "code", "results")
    ]


def test_runs_are_sorted_and_their_curves_chosen(project: Project, open_page: Any) -> None:
    page = open_page(project.root / "report/index.html").page
    names = "rows => rows.map(row => row.children[0].textContent)"

    def order() -> list[str]:
        found: list[str] = page.eval_on_selector_all("#runs tbody tr", names)
        return found

    assert set(order()) == {"small", "faster"}
    page.get_by_role("button", name="held-out loss").click()
    by_loss = order()
    cells = "#runs tbody td:nth-child(5) data"
    losses = page.eval_on_selector_all(cells, "all => all.map(one => +one.value)")
    assert losses == sorted(losses)
    page.get_by_role("button", name="held-out loss").click()
    assert order() == by_loss[::-1]
    drawn = "[...new Set(page.charts[0].view.data('points').map(one => one.series))].sort()"
    assert page.evaluate(drawn) == ["faster", "small"]
    page.get_by_role("checkbox", name="faster").uncheck()
    page.wait_for_function(f"{drawn}.length === 1")
    page.locator("#runs a", has_text="small").click()
    page.wait_for_selector("html[data-ready]")
    assert page.url.endswith("report/small.html")


def test_what_is_not_known_comes_last(project: Project, open_page: Any) -> None:
    page = open_page(project.root / "report/index.html").page
    page.evaluate("findAll('#runs tbody tr')[0].children[4].dataset.value = ''")
    unknown = page.locator("#runs tbody tr").first.locator("th").inner_text()
    for _ in range(2):  # up, and down
        page.get_by_role("button", name="held-out loss").click()
        assert page.locator("#runs tbody tr").last.locator("th").inner_text() == unknown

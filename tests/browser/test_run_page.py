"""The page of a run, made by the real Snakefile and opened from its file."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from project import REPOSITORY, Project, page_text, write_source

from olmo.report.series import LOSS, smooth

pytestmark = pytest.mark.slow
SERIES = """
Object.fromEntries(Object.entries(series).map(([n, s]) => [n, [[...s.steps], [...s.values]]]))
"""


@pytest.fixture
def page(project: Project) -> Path:
    return project.root / "report/small.html"


def record(project: Project, run: str = "small") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (project.root / f"checkpoints/{run}/final/record.json").read_text()
    )
    return found


def test_it_needs_no_network_and_says_no_error(page: Path, open_page: Any) -> None:
    opened = open_page(page)
    assert opened.errors == [] and opened.requests == [page.absolute().as_uri()]
    assert page.stat().st_size <= 3_000_000
    assert opened.page.locator(".plot svg").count() >= 4


def test_every_number_is_the_records(page: Path, project: Project, open_page: Any) -> None:
    opened, made = open_page(page), record(project)
    facts, run = made["facts"], made["run"]
    tiles = dict(
        zip(
            opened.page.locator(".tiles div:has(data) dt").all_inner_texts(),
            map(float, opened.data_values(".tiles")),
            strict=True,
        )
    )
    metrics = project.metrics()
    last = metrics[-1]
    assert tiles == {
        "steps": facts["steps"],
        "tokens": facts["tokens"],
        "parameters": 512 * 32 + 2 * (4 * 32 * 32 + 32 * 128 + 64 * 32),
        "training loss": last["train/CrossEntropyLoss"],
        "time": run["wall_s"],
        "speed": last["throughput/device/tokens_per_second"],
        "memory": run["peak_memory_bytes"],
        "loss on heldout": facts["heldout_loss"]["heldout"]["last"],
        "bits per byte of heldout": last["eval/heldout/BitsPerByte"],
    }
    drawn = opened.page.evaluate(SERIES)
    assert {"train/CrossEntropyLoss", "eval/heldout/CrossEntropyLoss"} <= drawn.keys()
    for name, (steps, values) in drawn.items():
        expected = [(row["step"], row[name]) for row in metrics if name in row]
        assert list(zip(steps, values, strict=True)) == expected, name
    results = json.loads((project.root / "eval/small/results.json").read_text())
    expected = [n for row in results for n in (row["value"], row["stderr"], row["documents"])]
    shown = opened.data_values("section[aria-labelledby=results] table")
    assert [float(n) for n in shown] == [n for n in expected if n is not None]
    # The first and the last step of the table that stands for the curves.
    rows = opened.page.eval_on_selector_all(
        "section[aria-labelledby=curves] tbody tr",
        "rows => rows.map(row => [...row.querySelectorAll('data')].map(one => Number(one.value)))",
    )
    assert rows[0][:2] == [1, metrics[1]["train/CrossEntropyLoss"]]
    assert rows[-1][:2] == [24, last["train/CrossEntropyLoss"]]


def test_counts_of_the_lineage(page: Path, project: Project, open_page: Any) -> None:
    opened = open_page(page)
    found = opened.page.evaluate("Object.fromEntries(page.stages.map((s) => [s.name, s.rows]))")
    by_key = {
        path.stem: json.loads(path.read_text()) for path in project.store.glob("actions/*/*.json")
    }
    contents = {one["content"]: one for one in by_key.values()}
    stages = {"local_source", "documents", "tokens", "trained_tokenizer", "training: small"}
    assert stages <= found.keys()
    assert "huggingface_export" not in found, "what is made of a checkpoint is none of its sources"
    for rows in found.values():
        for row in rows:
            one = contents[row["content"]]
            expected = {k: v for k, v in one["facts"].items() if type(v) is int}
            assert row["counts"] == expected and row["seconds"] == one["run"]["wall_s"]
    tokens = [row["counts"]["tokens"] for row in found["tokens"]]
    shares = opened.data_values("#shares + .scroll tbody")
    assert sum(map(float, shares[::2])) == sum(tokens)
    assert sum(map(float, shares[1::2])) == pytest.approx(1)


def test_the_way_from_the_checkpoint_to_a_source(
    page: Path, project: Project, open_page: Any
) -> None:
    opened = open_page(page)
    click = opened.page.locator
    click("svg.lineage a", has_text="training: small").click()
    click("details[open] a", has_text="tokens:").first.click()
    click("tr.chosen a", has_text="documents:").last.click()
    chosen = click("tr.chosen", has_text="documents/")
    chosen.locator("a", has_text="local_source:").click()
    source = click("tr.chosen", has_text="text_bytes").last
    digest = re.search(r"[0-9a-f]{64}", source.inner_text())
    assert digest and (project.store / f"objects/{digest[0][:2]}/{digest[0]}").exists()


def test_zoom_hover_theme_and_keyboard(page: Path, open_page: Any) -> None:
    opened = open_page(page, color_scheme="light")
    one = opened.page
    assert one.locator("#range").inner_text() == "steps 0 to 24"
    one.get_by_role("button", name="Zoom in").press("Enter")
    assert one.locator("#range").inner_text() == "steps 6 to 18"
    for _ in range(3):
        one.get_by_role("button", name="Earlier").press("Enter")
    assert one.locator("#range").inner_text() == "steps 0 to 12", "as wide as before"
    one.get_by_role("button", name="Whole run").press("Enter")
    described = one.locator("[data-chart=Loss]").get_attribute("aria-label")
    assert described.startswith("Loss. training: ") and "lowest" in described
    box = one.locator("[data-chart=Loss] svg").bounding_box()
    one.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    one.wait_for_selector("#vg-tooltip-element.visible")
    shown = one.locator("#vg-tooltip-element").inner_text()
    step = int(re.search(r"step\s*(\d+)", shown)[1])
    drawn = one.evaluate(SERIES)
    values = {
        name: dict(zip(*drawn[name], strict=True)).get(step)
        for name in ("train/CrossEntropyLoss", "eval/heldout/CrossEntropyLoss")
    }
    assert float(re.search(r"value\s*([\d.]+)", shown)[1]) in values.values()
    one.mouse.down()
    one.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 60, steps=5)
    one.mouse.up()
    one.wait_for_function("!find('#range').textContent.startsWith('steps 0 ')")
    for expected in ("dark", "light"):
        one.locator("#theme").press("Enter")
        assert one.evaluate("document.documentElement.dataset.theme") == expected
    one.get_by_role("button", name="Whole run").press("Enter")
    one.evaluate(f"series['{LOSS}'].values[3] = 0")
    one.locator("#log").press("Space")
    one.wait_for_function("page.charts[0].log")
    assert one.evaluate("page.charts[0].view.data('points').every(p => p.value > 0)")
    one.locator("#smoothing").press("Home")
    one.wait_for_function("!page.charts[0].view.data('points').some(p => p.kind === 'smooth')")
    assert opened.errors == []


def test_curves_are_smoothed_as_elsewhere_and_zoom_shows_every_step(
    page: Path, project: Project, open_page: Any
) -> None:
    one = open_page(page).page
    losses = {row["step"]: row[LOSS] for row in project.metrics() if LOSS in row}
    drawn = "page.charts[0].view.data('points').filter(p => p.kind === '{}')"
    drawn += ".map(p => [p.step, p.value])"
    expected = zip(losses, smooth(losses.values()), strict=True)
    assert one.evaluate(drawn.format("smooth")) == [[s, pytest.approx(v)] for s, v in expected]
    assert one.evaluate(drawn.format("raw")) == [list(pair) for pair in losses.items()]
    one.get_by_role("button", name="Zoom in").press("Enter")
    one.wait_for_function("page.charts[0].view.data('points').length < 40")
    assert [step for step, _ in one.evaluate(drawn.format("raw"))] == list(range(6, 19))
    one.get_by_role("button", name="Zoom out").press("Enter")
    assert one.locator("#range").inner_text() == "steps 0 to 24"
    one.get_by_role("button", name="Zoom in").press("Enter")
    for _ in range(3):
        one.get_by_role("button", name="Later").press("Enter")
    assert one.locator("#range").inner_text() == "steps 12 to 24"
    one.get_by_role("button", name="Whole run").press("Enter")
    assert one.locator("#range").inner_text() == "steps 0 to 24"
    # A metric that begins later or ends sooner than others does not narrow the whole run.
    one.evaluate("series.short = { steps: [3, 4], values: [1, 1] }")
    assert one.evaluate("wholeRange()") == [0, 24]


def test_curves_change_with_the_theme_and_are_light_on_paper(page: Path, open_page: Any) -> None:
    one = open_page(page, color_scheme="light").page
    label = "getComputedStyle(document.querySelector('[data-chart=Loss] svg text')).fill"
    colors = {name: one.evaluate(f"palettes.{name}.text") for name in ("light", "dark")}

    def wait_for(name: str) -> None:
        rgb = tuple(int(colors[name][i : i + 2], 16) for i in (1, 3, 5))
        one.wait_for_function(f"{label} === 'rgb{rgb}'")

    wait_for("light")
    one.locator("#theme").press("Enter")
    wait_for("dark")
    one.pdf()
    wait_for("light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["small", "index"])
def test_axe_finds_nothing_serious(
    name: str, scheme: str, project: Project, open_page: Any
) -> None:
    opened = open_page(project.root / f"report/{name}.html", color_scheme=scheme)
    opened.page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    opened.page.wait_for_timeout(100)
    assert opened.violations() == [] and opened.errors == []


def test_a_phone_scrolls_in_one_direction(project: Project, open_page: Any) -> None:
    for name in ("small", "index"):
        phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}
        opened = open_page(project.root / f"report/{name}.html", **phone)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_it_names_no_path_of_the_machine(project: Project) -> None:
    for name in ("small", "index"):
        text = page_text(project.root / f"report/{name}.html")
        for hidden in (project.root, REPOSITORY, Path.home(), platform.node()):
            found = re.search(rf"(?<!\w){re.escape(str(hidden))}(?!\w)", text)
            assert not found, (name, text[found.start() - 50 :][:150])


def test_markup_in_names_and_texts_is_text(
    project: Project, open_page: Any, tmp_path: Path
) -> None:
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    other = project.copy(tmp_path / "project")
    lines = [{"id": f"{evil}{i}", "text": f"{evil} and more words {i}"} for i in range(400)]
    write_source(other.root / "sources/<img src=x onerror=window.hacked=1>.json.gz", lines)
    other.change("config/data/small.yaml", documents={"heldout_share": 0.2})
    other.change("config/train/small.yaml", run_name=evil, max_duration=8, eval_interval=8)
    evaluator = {"label": evil, "data": {"paths": [], "drop_last": False}}
    shard = next((other.root / "data/small/heldout").rglob("*.npy")).resolve()
    evaluator["data"]["paths"] = [str(shard)]
    other.change("config/train/small.yaml", evaluators=[evaluator])
    other.run("report/small.html")
    opened = open_page(other.root / "report/small.html")
    opened.page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.hacked") is None and opened.errors == []
    shown = opened.page.locator("body").inner_text()
    assert shown.count("<script>window.hacked = 1</script>") >= 2  # a prompt, a loss
    assert len(opened.requests) == 1

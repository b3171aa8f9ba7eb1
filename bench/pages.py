"""How large the pages of `olmo report` are, and how long a browser takes to draw them.

    uv run --group browser python bench/pages.py report/olmo-tiny.html [--large] [--rounds 5]

`--large` also makes the page of a run with 100,000 steps and 5,000 sources. Prints for each page
its bytes, and the median, least and most seconds from opening its file to the last curve, in
Debian's chromium with a fresh context each time.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/browser"))


def make_large(folder: Path) -> Path:
    import large_run

    from olmo.report.run_page import format_page

    page = folder / "large.html"
    with large_run.project(folder / "project", steps=100_000, sources=5_000):
        start = time.perf_counter()
        page.write_text(format_page("large"))
        print(f"{page.name}: written in {time.perf_counter() - start:.1f} s")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("expected chromium, found none; apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = [page.absolute() for page in options.pages]
        pages += [make_large(Path(folder).absolute())] if options.large else []
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for page in pages:
            seconds = []
            for _ in range(options.rounds):
                opened = browser.new_context().new_page()
                start = time.perf_counter()
                opened.goto(page.as_uri())
                opened.wait_for_selector("html[data-ready]", timeout=120_000)
                seconds.append(time.perf_counter() - start)
                opened.context.close()
            size, median = page.stat().st_size, statistics.median(seconds)
            print(f"{page.name}: {size:,} bytes, {median:.2f} s", end=" ")
            print(f"({min(seconds):.2f} to {max(seconds):.2f}, {options.rounds} rounds)")
        browser.close()


if __name__ == "__main__":
    main()

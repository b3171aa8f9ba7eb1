"""Take the pictures of pages that the docs show: docs/pictures/*.png.

    uv run snakemake --cores 2 report/olmo-tiny.html report/olmo-tiny-muon.html
    uv run snakemake --cores 2 report/index.html
    uv run --group browser python docs/screenshots.py

They show this project's own runs, in Debian's chromium.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DESKTOP, PHONE = {"width": 1280, "height": 1500}, {"width": 390, "height": 844}
# Picture → page, the context's options, and what is scrolled to the top.
PICTURES = {
    "page-light": ("olmo-tiny", {"viewport": DESKTOP, "color_scheme": "light"}, "header"),
    "page-dark": ("olmo-tiny", {"viewport": DESKTOP, "color_scheme": "dark"}, "header"),
    "page-lineage": ("olmo-tiny", {"viewport": DESKTOP, "color_scheme": "light"}, "#lineage"),
    "page-phone": ("olmo-tiny", {"viewport": PHONE, "is_mobile": True}, "header"),
    "index": ("index", {"viewport": DESKTOP, "color_scheme": "light"}, "header"),
}


def main() -> None:
    chromium = shutil.which("chromium")
    missing = [f"report/{name}.html" for name, *_ in PICTURES.values()]
    missing = [path for path in dict.fromkeys(missing) if not Path(path).exists()]
    if chromium is None or missing:
        sys.exit(f"expected chromium and {', '.join(missing) or 'the pages'}; see the docstring")
    folder = Path(__file__).with_name("pictures")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for picture, (name, options, top) in PICTURES.items():
            page = browser.new_context(**options).new_page()
            page.goto(Path(f"report/{name}.html").absolute().as_uri())
            page.wait_for_selector("html[data-ready]")
            page.eval_on_selector(top, "one => one.scrollIntoView()")
            page.screenshot(path=folder / f"{picture}.png")
            print(folder / f"{picture}.png")
        browser.close()


if __name__ == "__main__":
    main()

"""A picture of one section of a report, in a real Chromium, with the numbers of one piece of token credit shown.

Example: python docs/results/screenshot.py runs/quickstart/report/report.html docs/results/token-credit.png --reply 2 --piece 8
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", help="report.html")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--section", default="credit", help="id of the section to begin with")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1250)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--reply", type=int, help="number of the credited reply pointed at; none: nothing is pointed at")
    parser.add_argument("--piece", type=int, default=0, help="number of the piece in it")
    asked = parser.parse_args()

    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"])
        size = {"width": asked.width, "height": asked.height}
        page = browser.new_context(viewport=size, color_scheme=asked.scheme, reduced_motion="reduce").new_page()
        page.goto(Path(asked.report).resolve().as_uri())
        page.locator(f"#{asked.section}").evaluate("node => node.scrollIntoView()")
        if asked.reply is not None:
            page.locator(".pieces").nth(asked.reply).locator(".c").nth(asked.piece).hover()
        page.wait_for_timeout(300)
        page.screenshot(path=asked.picture)
        browser.close()


if __name__ == "__main__":
    main()

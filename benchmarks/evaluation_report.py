"""The page of a comparison in headless Chromium: violations that axe finds, and requests besides the page itself.

    python benchmarks/evaluation_report.py [FOLDER]

A folder with a comparison is opened as it is; without one, scikit-learn's digits are compared first, small. Needs the extra `dev`
and Chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import axe_playwright_python
from playwright.sync_api import sync_playwright
from results import record

from featherweight import compare
from featherweight.tasks import find_task

CHROMIUM = "/usr/bin/chromium"
LOOKS = (
    {"color_scheme": "light"},
    {"color_scheme": "dark"},
    {"color_scheme": "light", "viewport": {"width": 390, "height": 800}},
)


def page_of(folder: Path) -> Path:
    """Return the page of a comparison in the folder, which is made where there is none."""
    if not (folder / "report.html").exists():
        compare(find_task("digits"), "channels,bits", "4x,16x", out=folder, seeds=1, epochs=1, name="digits")
    return folder / "report.html"


def looked_at(page: Path) -> tuple[list[str], list[str]]:
    """Return what axe finds in any look of the page, and every request besides the page."""
    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
    violations: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for look in LOOKS:
            opened = browser.new_context(bypass_csp=True, **look).new_page()
            opened.on("request", lambda request: requests.append(request.url))
            opened.goto(page.resolve().as_uri())
            opened.wait_for_load_state("networkidle")
            opened.evaluate(axe)
            violations += [f"{one['id']} ({len(one['nodes'])})" for one in opened.evaluate("axe.run()")["violations"]]
        browser.close()
    own = page.resolve().as_uri()
    return violations, [url for url in requests if url != own and not url.startswith("data:")]


def main() -> None:
    """Open the page and write both rows."""
    with tempfile.TemporaryDirectory() as temporary:
        page = page_of(Path(sys.argv[1]) if sys.argv[1:] else Path(temporary))
        violations, requests = looked_at(page)
        size = page.stat().st_size
    how = f"report.html of a comparison, {size:,} bytes, in light, dark and on a phone's screen, Chromium without a window"
    record(
        "evaluation_report", "evaluation.axe", len(violations), 1, f"{how}: {', '.join(violations) or 'nothing found'}"
    )
    record("evaluation_report", "evaluation.network", len(requests), 1, f"{how}: {', '.join(requests) or 'none'}")


if __name__ == "__main__":
    main()

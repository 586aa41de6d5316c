"""Pages opened in a real browser that is offered no network; for the tests that look at pages."""

import importlib.util
from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
needs_charts = pytest.mark.skipif(
    importlib.util.find_spec("altair") is None or importlib.util.find_spec("vl_convert") is None,
    reason="the extra 'report' is not installed",
)
needs_browser = pytest.mark.skipif(
    not Path(CHROMIUM).exists() or importlib.util.find_spec("playwright") is None,
    reason=f"needs {CHROMIUM} and the Python package playwright",
)


def visit(browser, path, idle=False, **context):
    """Open the page; return it with the requests besides its own and what the console said."""
    page = browser.new_context(**context).new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle" if idle else "load")
    others = [url for url in requests if url != path.as_uri() and not url.startswith("data:")]
    return page, others, said

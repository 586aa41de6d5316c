"""The page of a comparison: facts, fronts, heat maps, and the page in a real browser, checked for accessibility by axe."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
from browsing import needs_browser, needs_charts, visit

from featherweight.report.compared import Comparison
from featherweight.report.compared_page import write_comparison
from featherweight.report.fronts import anchor, pareto
from featherweight.report.heat import heats

PAYLOAD = (
    "</text></svg></style></title><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
)
RECIPES = (
    ("dense", "baseline"),
    ("scratch", "baseline"),
    ("bits", "technique"),
    ("slim", "combination"),
    ("joint", "search"),
)


def cell(recipe, kind, budget, size, drop, seed=0):
    layers = [
        {"path": f"layer.{i}", "kept": 0.5, "zeros": 0.1 * i, "bits": 4.0, "rank": 3 if i else None} for i in range(3)
    ]
    return {
        "recipe": recipe, "kind": kind, "budget": budget, "seed": seed, "status": "done", "bytes": size, "allowed": size + 5, "met": True,
        "score": 0.9 - drop, "score_before": 0.9, "drop": drop, "p_value": 0.03, "milliseconds": 0.5 + drop, "layers": layers,
        "classes": [drop, 3 * drop, None], "command": f"featherweight compress digits --recipe {recipe}.yaml",
        "energy": "estimate: time x 10 W",
    }  # fmt: skip


def rank(row):
    return {
        **{key: row[key] for key in ("recipe", "kind", "budget", "bytes", "score", "drop", "milliseconds", "met", "allowed")},
        "seeds": [0], "ratio": 1e5 / row["bytes"], "speedup": 2.0, "macs": 1000, "peak_bytes": 1e7, "millijoules": 5.0, "seconds": 70.0,
        "agreement": 0.95, "calibration_error": 0.02, "drop_low": row["drop"] - 0.01, "drop_high": row["drop"] + 0.02, "share": True,
        "drop_spread": 0.01, "worst_class": 3 * row["drop"], "as_good_as_best": row["drop"] < 0.02,
    }  # fmt: skip


def made(**changes):
    rows = [cell("dense", "baseline", "1x", 90_000, -0.001)]
    for place, (recipe, kind) in enumerate(RECIPES[1:]):
        rows += [
            cell(recipe, kind, "4x", 25_000 - place, 0.3 / (1 + 5 * place)),
            cell(recipe, kind, "16x", 6_000 - place, 0.01 * place),
        ]
    failed = {
        "recipe": "slim",
        "budget": "64x",
        "seed": 0,
        "status": "not applicable",
        "reason": "too small",
        "allowed": 1,
        "kind": "file",
    }
    original = {"seed": 0, "bytes": 100_000, "score": 0.9, "score_name": "accuracy", "higher_is_better": True}
    facts = {
        "task": "digits",
        "command": "featherweight compare digits --out here",
        "created": "2026-03-01T10:00:00+00:00",
        "protocol": {"epochs": 3, "budgets": ["4x", "16x"], "seeds": [0], "versions": {"torch": "2.13.0"}},
        "machine": {"cpu": "a processor", "features": ["avx2"]},
        "contenders": [{"name": name, "kind": kind, "about": f"what {name} does"} for name, kind in RECIPES],
        "originals": [{**original, "sensitivity": {"layer.0": 0.5, "layer.1": 0.01}}],
        "rows": [*rows, failed],
        "ranking": [rank(row) for row in rows],
        "answers": [{"budget": "16x", "allowed": 6_005, "recipe": "bits", "text": "For at most 6,005 B take bits: 5,999 B, it loses 1."}],
    }  # fmt: skip
    return Comparison(**copy.deepcopy({**facts, **changes}))


def test_a_front_holds_what_nothing_is_better_than():
    rows = [
        {"bytes": size, "score": score}
        for size, score in ((10, 0.5), (20, 0.4), (30, 0.7), (30, 0.8), (40, 0.8), (50, 0.9))
    ]
    assert [(row["bytes"], row["score"]) for row in pareto(rows, "bytes", True)] == [(10, 0.5), (30, 0.8), (50, 0.9)]
    assert [(row["bytes"], row["score"]) for row in pareto(rows, "bytes", False)] == [(10, 0.5), (20, 0.4)]


def test_heat_maps_show_layers_and_classes_where_the_budget_is_tight():
    maps = {heat.id: heat for heat in heats(made())}
    assert list(maps) == ["sensitivity", "kept", "zeros", "bits", "rank", "classes"]
    assert [entry.text for _, (entry,) in maps["sensitivity"].rows] == ["0.5", "0.01", ""]
    assert maps["sensitivity"].rows[0][1][0].shade == 1.0
    assert "16x" in maps["zeros"].caption
    assert [entry.text for entry in maps["zeros"].rows[2][1]] == ["20%"] * 4
    name, entries = maps["classes"].rows[0]
    assert (name, [entry.text for entry in entries]) == ("joint", ["3", "9", ""])


@needs_charts
def test_the_page_and_its_stills_are_written(tmp_path):
    written = write_comparison(made(), tmp_path)
    assert [path.suffix for path in written] == [".html", *[".svg", ".png"] * 4]
    assert all(path.stat().st_size > 1000 for path in written)
    text = written[0].read_text()
    assert written[0].stat().st_size < 250_000
    for row in made().ranking:
        assert text.count(f'id="{anchor(row)}"') == 1
        assert text.count(f'href="#{anchor(row)}"') == 2  # a mark in each front
    for words in (
        "featherweight compress digits --recipe bits.yaml",
        "too small",
        "a processor",
        "estimate: time x 10 W",
    ):
        assert words in text
    assert "<script" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)


@needs_charts
@pytest.mark.parametrize("missing", ["rows", "answers", "machine", "protocol", "contenders"])
def test_the_page_copes_with_a_missing_part(tmp_path, missing):
    assert "digits" in write_comparison(made(**{missing: type(getattr(made(), missing))()}), tmp_path)[0].read_text()


@needs_charts
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_loaded(browser, tmp_path, scheme):
    axe = importlib.util.find_spec("axe_playwright_python")
    if axe is None:
        pytest.skip("needs the Python package axe-playwright-python")
    page, others, said = visit(
        browser, write_comparison(made(), tmp_path)[0], idle=True, color_scheme=scheme, bypass_csp=True
    )
    assert (others, said) == ([], [])
    page.evaluate((Path(axe.origin).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
    assert len(found["passes"]) > 20


@needs_charts
@needs_browser
def test_marks_lead_to_rows_and_can_be_hidden(browser, tmp_path):
    page, _, _ = visit(browser, write_comparison(made(), tmp_path)[0], viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    mark = page.locator("svg a").first
    assert mark.get_attribute("aria-label") == "dense at 1x: 0.9010, 90,000 B, 0.499 ms"
    marks = page.locator(".c2_marks").first
    assert marks.is_visible()
    page.get_by_role("checkbox", name="bits").uncheck()
    assert not marks.is_visible()
    mark.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('tr:target').id") == "row-dense-1x"
    page.emulate_media(media="print")
    assert not page.locator("fieldset").is_visible()


@needs_charts
@needs_browser
def test_names_from_strangers_stay_text(browser, tmp_path):
    facts = made().to_dict()
    strange = made(
        task=PAYLOAD,
        command=PAYLOAD,
        machine={PAYLOAD: PAYLOAD},
        protocol={**facts["protocol"], PAYLOAD: PAYLOAD},
        contenders=[{**one, "about": PAYLOAD, "name": PAYLOAD if one["name"] == "bits" else one["name"]} for one in facts["contenders"]],
        rows=[{**row, "recipe": PAYLOAD if row["recipe"] == "bits" else row["recipe"], "command": PAYLOAD} for row in facts["rows"]],
        ranking=[{**row, "recipe": PAYLOAD if row["recipe"] == "bits" else row["recipe"]} for row in facts["ranking"]],
        answers=[{"budget": PAYLOAD, "text": PAYLOAD}],
    )  # fmt: skip
    page, others, said = visit(browser, write_comparison(strange, tmp_path)[0], idle=True)
    assert (others, said) == ([], [])
    assert page.evaluate("document.querySelectorAll('script, img, [onerror]').length") == 0
    assert page.title() != "owned"

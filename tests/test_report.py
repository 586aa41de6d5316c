"""The report: facts, terminal at 80 columns, and the page in a real browser that is offered no network."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browsing import needs_browser, needs_charts, visit
from rich.console import Console

from featherweight.budget import Budget
from featherweight.errors import ArtifactError, ExportError
from featherweight.measurement import Latency, Measurement
from featherweight.report.facts import Report
from featherweight.report.figures import comparison, headline, limits, lost, remarks, sentence
from featherweight.report.html import check_available, write_html
from featherweight.report.terminal import summary
from featherweight.report.wording import clean, duration, percent, shorten, times

PAYLOAD = (
    "</text></svg></style></title><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
)


def measured(**changes):
    facts = {
        "params": 266_610,
        "nonzero": 266_610,
        "size_bytes": 1_066_440,
        "macs": 266_200,
        "score": 0.9842,
        "score_error": 0.0012,
        "score_name": "accuracy",
        "latency": {"onnxruntime": Latency(4.0e-4, 3.9e-4, 4.3e-4, 500)},
        "peak_bytes": 4_000_000,
    }
    return Measurement(**{**facts, **changes})


def report(judged="size<=2%, drop<=0.5pt, latency<=50%", **changes):
    before = measured()
    after = measured(
        nonzero=21_000,
        size_bytes=13_868,
        score=0.981,
        uncounted={"aten.topk": 3},
        latency={"onnxruntime": Latency(1.0e-4, 0.9e-4, 1.2e-4, 500)},
    )
    step = {"score": 0.98, "latency_seconds": 2e-4, "macs": 266_200, "seconds": 75.0, "note": "one layer left alone"}
    facts = {
        "task": "lenet300",
        "command": "featherweight compress lenet300 --budget 'size<=2%' --seed 7",
        "created": "2026-03-01T10:00:00+00:00",
        "machine": {"cpu": "a processor", "features": ["avx2"], "threads": 1, "torch": "2.13.0"},
        "seed": 7,
        "budget": judged,
        "verdict": Budget.parse(judged).judge(before, after).to_dict(),
        "before": before.to_dict(),
        "after": after.to_dict(),
        "agreement": {"max_abs": 3.1e-5, "sqnr_db": 74.2, "top1": 0.9995},
        "recipe": "format: 1\nsteps:\n  - technique: quantize_weights\n    bits: 3\n",
        "steps": [
            {**step, "step": "original", "size_bytes": 1_066_440, "note": ""},
            {**step, "step": "QuantizeWeights(bits=3)", "size_bytes": 20_000, "speedup": 2.0},
            {**step, "step": "QuantizeWeights(bits=3)", "size_bytes": 13_868, "speedup": 4.0},
        ],
        "parts": {"manifest": 600, "graph": 1_268, **{f"layers[{i}].weight": 1_000 for i in range(12)}},
        "layers": [
            {"path": f"layers[{i}]", "kind": "Linear", "parameters": 900, "nonzero": 90, "bits": 3, "bytes": 1_000}
            for i in range(30)
        ],
        "untouched": [{"path": f"layers[{i}]", "step": "prune_channels", "reason": "tied"} for i in range(11)],
        "trials": [
            {
                "recipe": f"bits={i}",
                "size_bytes": 9_000 + 2_000 * i,
                "score": 0.97 + i / 1000,
                "drop": 0.01,
                "met": i > 6,
                "seconds": 30,
            }
            for i in range(12)
        ],
        "notes": ["10 % of the training data was split off to choose by."],
    }
    return Report(**{**facts, **changes})


def empty():
    return Report("bare", "", "")


def on_terminal(made, width=80):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary(made))
    return console.export_text()


class Outline(HTMLParser):
    """What a reader without a screen gets: headings, tables with their captions, tags that would run or load."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


# --- facts


def test_round_trip_through_json():
    made = report()
    assert Report.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made


def test_what_json_cannot_hold_becomes_plain():
    made = report(seed=np.int64(3), agreement={"max_abs": np.float32(0.5), "sqnr_db": float("inf"), "top1": (1,)})
    facts = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert facts["seed"] == 3
    assert facts["agreement"] == {"max_abs": 0.5, "sqnr_db": None, "top1": [1]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": []}, ["stepz", "steps"]),
        ({"steps": {}}, ["steps", "list", "dict"]),
        ({"seed": "zero"}, ["seed", "int", "zero"]),
        ({"format": 99}, ["format", "99"]),
    ],
)
def test_a_foreign_report_is_refused_by_name(changes, words):
    with pytest.raises(ArtifactError) as caught:
        Report.from_dict({**report().to_dict(), **changes})
    assert all(word in str(caught.value) for word in words)


def test_a_report_that_lacks_facts_says_which():
    with pytest.raises(ArtifactError, match="command, created"):
        Report.from_dict({"format": 1, "task": "x"})
    with pytest.raises(ArtifactError, match="list"):
        Report.from_dict([])


# --- figures


def test_sentence_has_verdict_gain_and_price():
    assert sentence(report()) == "Budget met: 76.9x smaller, 0.32 pt of accuracy lost"
    assert sentence(report("size<=1%")) == "Budget missed (size): 76.9x smaller, 0.32 pt of accuracy lost"
    assert sentence(report(verdict={})) == "76.9x smaller, 0.32 pt of accuracy lost"
    assert sentence(empty()) == "Nothing was measured"


def test_limits_say_the_gap():
    after = measured(size_bytes=13_868, score=0.981, peak_bytes=None)
    verdict = Budget.parse("size<=2%, drop<=0.1pt, memory<=1%").judge(measured(), after)
    met, missed, unknown = limits(report(verdict=verdict.to_dict()))
    assert (met.state, met.gap) == ("met", "35 % to spare")
    assert (missed.state, missed.after, missed.gap) == ("missed", "0.32 pt", "0.22 pt over")
    assert unknown.state == "unknown"
    assert "not measured" in unknown.gap


def test_a_drop_of_zero_allowed_is_judged():
    (line,) = limits(report("drop<=0pt"))
    assert (line.state, line.allowed, line.gap) == ("missed", "0 pt", "0.32 pt over")


@pytest.mark.parametrize(
    ("before", "after", "higher", "expected"),
    [
        (0.90, 0.91, True, ("1 pt", "gained")),
        (0.90, 0.90, True, ("0 pt", "unchanged")),
        (12.0, 12.5, False, ("0.5", "lost")),
        (12.5, 12.0, False, ("0.5", "gained")),
        (None, 0.9, True, ("", "")),
    ],
)
def test_lost_knows_the_direction_and_the_unit(before, after, higher, expected):
    made = report(
        before=measured(score=before).to_dict(), after=measured(score=after, higher_is_better=higher).to_dict()
    )
    assert lost(made) == expected


def test_slower_and_larger_are_said_so():
    slow = measured(size_bytes=2_132_880, latency={"onnxruntime": Latency(8e-4, 7e-4, 9e-4, 50)})
    made = report(after=slow.to_dict())
    labels = [(figure.value, figure.label) for figure in headline(made)]
    assert ("2.0x", "larger") in labels
    assert ("2.0x", "slower") in labels
    assert [row.change for row in comparison(made) if "latency" in row.metric] == ["2.0x slower"]


def test_headline_near_one_is_a_share():
    figure = headline(report(after=measured(size_bytes=1_045_111, latency={}, macs=266_200).to_dict()))[0]
    assert figure == ("2 %", "smaller", "1.066 MB to 1.045 MB")
    assert headline(report(after=measured(latency={}).to_dict()))[0][:2] == ("1x", "smaller")


def test_what_was_not_counted_is_said():
    said = " ".join(remarks(report()))
    assert "aten.topk (3x)" in said
    assert "99.95 %" in said


def test_wording():
    assert times(100, 101, "smaller", "larger") == "1 % larger"
    assert times(100, 98, "smaller", "larger") == "2 % smaller"
    assert times(100, 80, "smaller", "larger") == "1.25x smaller"
    assert times(100, 0, "smaller", "larger") == ""
    assert [duration(seconds) for seconds in (0.25, 59.4, 59.7, 3599.8, 4210)] == [
        "0.2 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "1 h 10 min",
    ]
    assert [percent(share) for share in (0, 0.0951, 0.24, 1e-6)] == ["0 %", "9.5 %", "24 %", "less than 0.01 %"]
    assert [shorten("0123456789", 6, tail) for tail in (0, 0.5, 1)] == ["01234…", "01…789", "…56789"]
    assert clean("a\x1b[31m\u202eb\ud800\nc") == "a\ufffd[31m\ufffdb\ufffd\nc"


# --- terminal


def test_terminal_has_the_figures_in_80_columns():
    text = on_terminal(report())
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "76.9x smaller",
        "0.32 pt",
        "13,868 B",
        "35 % to spare",
        "4.0x faster",
        "layers[3]",
        "and 3 more, 11 in all",
        "12 trials",
    ):
        assert words in text
    assert re.search(r"accuracy +0\.9842 ± 0\.0012 +0\.9810 ± 0\.0012", text)


def test_terminal_says_what_was_missed():
    text = on_terminal(report("size<=1%"))
    assert "Budget missed (size)" in text
    assert "MISSED, 30 % over" in text


def test_terminal_takes_names_literally():
    made = report(untouched=[{"path": "[bold]a[/bold]\x1b]0;owned\x07", "step": "x", "reason": "[link=http://x]y"}])
    text = on_terminal(made, width=200)
    assert "[bold]a[/bold]\ufffd]0;owned\ufffd (x): [link=http://x]y" in text


@pytest.mark.parametrize("missing", [*Report.__dataclass_fields__][3:])
def test_terminal_copes_with_a_missing_part(missing):
    default = empty()
    assert "lenet300" in on_terminal(report(**{missing: getattr(default, missing)}))


def test_terminal_copes_with_nothing():
    assert "bare: Nothing was measured" in on_terminal(empty())


# --- page


def write(made, folder):
    path = folder / "report.html"
    assert write_html(made, path) == path.stat().st_size
    return path


def test_a_missing_package_is_named_before_any_work(monkeypatch):
    def without(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(
        ExportError, match=r"the HTML report needs the package 'altair': pip install 'featherweight\[report\]'"
    ):
        check_available()


@needs_charts
@pytest.mark.parametrize("place", ["missing/report.html", "folder"])
def test_an_unwritable_path_is_named_and_leaves_nothing(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / place))):
        write_html(empty(), tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@needs_charts
def test_page_is_small_and_for_everybody(tmp_path):
    path = write(report(), tmp_path)
    text = path.read_text()
    page = Outline(text)
    assert path.stat().st_size < 250_000
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table")) == 7
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    drawings = [attrs for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(drawings) == len(page.all("svg")) == 4
    assert all(len(attrs["aria-label"]) > 40 for attrs in drawings)
    identifiers = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    targets = [attrs[key] for _, attrs in page.found for key in ("aria-labelledby",) if key in attrs]
    assert set(targets) <= set(identifiers)
    assert {attrs["href"].removeprefix("#") for attrs in page.all("a")} <= set(identifiers)
    assert not page.all("script")
    assert not page.all("img")
    for words in ("featherweight compress lenet300", "quantize_weights", "a processor", "split off", "aten.topk (3x)"):
        assert words in text


@needs_charts
@pytest.mark.parametrize("missing", [*Report.__dataclass_fields__][3:])
def test_page_copes_with_a_missing_part(tmp_path, missing):
    assert "lenet300" in write(report(**{missing: getattr(empty(), missing)}), tmp_path).read_text()


@needs_charts
def test_page_copes_with_empty_rows(tmp_path):
    rows = {
        "steps": [{}, {}],
        "layers": [{}],
        "untouched": [{}],
        "trials": [{}],
        "parts": {"": 0},
        "before": {},
        "after": {},
    }
    write(report(**rows, verdict={"rows": [{}]}, agreement={"top1": None}), tmp_path)
    on_terminal(report(**rows, verdict={"rows": [{}]}, agreement={"top1": None}))


@needs_charts
@needs_browser
def test_browser_loads_nothing_and_says_nothing(browser, tmp_path):
    page, others, said = visit(browser, write(report(), tmp_path), idle=True)
    assert (others, said) == ([], [])
    assert "Budget met: 76.9x smaller" in page.locator("h1").inner_text().replace("\xa0", " ")
    titles = page.locator("h2").all_inner_texts()
    assert titles[:2] == ["Budget", "Before and after"]
    assert {"Charts", "Steps", "Layers", "Left untouched", "Search", "Reproduce", "How it was measured"} <= set(titles)


@needs_charts
@needs_browser
@pytest.mark.parametrize("long", [False, True])
def test_phone_does_not_scroll_sideways(browser, tmp_path, long):
    name = "a_module_with_a_name_longer_than_any_phone_is_wide." * 4
    changes = {
        "untouched": [{"path": name, "step": name, "reason": name}],
        "task": name,
        "command": name,
        "recipe": name,
    }
    made = report(**changes, notes=[name], budget=name) if long else report()
    page, _, _ = visit(browser, write(made, tmp_path), viewport={"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


RATIO = """selector => {
  const light = text => text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(selector)].map(node => {
    const style = getComputedStyle(node), own = light(node.closest('svg') ? style.fill : style.color);
    return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
  });
}"""


@needs_charts
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_themes(browser, tmp_path, scheme):
    page, _, said = visit(browser, write(report("size<=1%, drop<=1pt"), tmp_path), color_scheme=scheme)
    assert not said
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    text = page.evaluate(RATIO, "h1, h2, p, th, td, caption, dt, dd, a, figcaption, .state, svg text")
    assert len(text) > 100
    assert min(text) >= 4.5
    drawn = page.evaluate(RATIO, ".charts svg .mark-symbol path, .charts svg .mark-rect path:not([fill='#e6e9ed'])")
    assert len(drawn) > 20
    assert min(drawn) >= 3


@needs_charts
@needs_browser
def test_names_from_strangers_stay_text(browser, tmp_path):
    made = report(
        task=PAYLOAD,
        command=PAYLOAD,
        created=PAYLOAD,
        budget=PAYLOAD,
        recipe=PAYLOAD,
        machine={PAYLOAD: PAYLOAD},
        parts={PAYLOAD: 10, "b": 5},
        layers=[{"path": PAYLOAD, "kind": PAYLOAD, "parameters": 1, "nonzero": 1, "bits": 8, "bytes": 9}],
        untouched=[{"path": PAYLOAD, "step": PAYLOAD, "reason": PAYLOAD}],
        steps=[{"step": PAYLOAD, "size_bytes": 10, "note": PAYLOAD}] * 2,
        trials=[{"recipe": PAYLOAD, "size_bytes": 9, "score": 0.9, "met": True}],
        notes=[PAYLOAD],
        after=measured(score_name=PAYLOAD, uncounted={PAYLOAD: 1}, runtime=PAYLOAD).to_dict(),
        verdict={"met": False, "rows": [{"metric": PAYLOAD, "limit_text": PAYLOAD, "met": False, "reason": PAYLOAD}]},
    )
    page, others, said = visit(browser, write(made, tmp_path), idle=True)
    assert (others, said) == ([], [])
    assert page.evaluate("document.querySelectorAll('script, img, [onerror]').length") == 0
    assert page.title() != "owned"
    assert page.locator("pre").first.inner_text() == PAYLOAD
    assert page.locator("svg").count() == 4


@needs_charts
@needs_browser
def test_print_shows_every_row(browser, tmp_path):
    path = write(report(), tmp_path)
    page, _, _ = visit(browser, path, color_scheme="dark")
    assert page.evaluate("document.querySelector('.long').scrollHeight > document.querySelector('.long').clientHeight")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.long')).maxHeight") == "none"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"

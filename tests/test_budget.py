"""Budgets: reading, writing, judging, and messages that name the offending value."""

import json
import math
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.budget import Budget, Limit
from featherweight.errors import BudgetError
from featherweight.verdict import Facts, Verdict, format_amount


@dataclass(frozen=True)
class Measured:
    score: float | None = 0.9
    higher_is_better: bool = True
    size_bytes: int | None = 100_000
    params: int | None = 1000
    macs: int | None = 5000
    latency_seconds: float | None = 0.004
    peak_bytes: int | None = 1_000_000


def judge(text: str, before: Facts, after: Facts) -> Verdict:
    return Budget.parse(text).judge(before, after)


@pytest.mark.parametrize(
    ("text", "amount", "form"),
    [
        ("size<=500KB", 500e3, "absolute"),
        ("size <= 500 kb", 500e3, "absolute"),
        ("SIZE<1.5KiB", 1536, "absolute"),
        ("size≤2MiB", 2 * 1024**2, "absolute"),
        ("size<=2MB", 2e6, "absolute"),
        ("size<=12B", 12, "absolute"),
        ("size<=25%", 0.25, "share"),
        ("size<=10x", 10, "factor"),
        ("size<=10×", 10, "factor"),
        ("memory<=1GiB", 1024**3, "absolute"),
        ("latency<=3ms", 0.003, "absolute"),
        ("latency<=250us", 250e-6, "absolute"),
        ("latency<=250µs", 250e-6, "absolute"),
        ("latency<=.5s", 0.5, "absolute"),
        ("params<=100k", 100e3, "absolute"),
        ("params<=12400", 12400, "absolute"),
        ("params<=1e6", 1e6, "absolute"),
        ("macs<=2M", 2e6, "absolute"),
        ("macs<=1.5G", 1.5e9, "absolute"),
        ("drop<=0.5pt", 0.005, "absolute"),
        ("drop<=0pt", 0, "absolute"),
        ("drop<=1%", 0.01, "share"),
    ],
)
def test_reads_amounts(text, amount, form):
    (limit,) = Budget.parse(text).limits
    assert (limit.amount, limit.form) == (amount, form)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "size<=25%"]),
        ("  ", ["empty"]),
        ("size<=25%,", ["comma"]),
        ("size<=12,400B", ["'12,400'", "without the comma"]),
        ("siez<=25%", ["'siez'", "Did you mean 'size'"]),
        ("score<=0.9", ["'score'", "drop<=0.5pt"]),
        ("size<=3ms", ["'ms'", "no unit of size", "KiB"]),
        ("latency<=3KB", ["'KB'", "no unit of latency"]),
        ("params<=3B", ["'B'", "no unit of params"]),
        ("drop<=2x", ["drop", "factor", "0.5pt"]),
        ("drop<=3KB", ["'KB'", "pt"]),
        ("size<=500", ["500 has no unit", "500KB"]),
        ("drop<=1", ["1 has no unit", "0.5pt"]),
        ("latency<=4", ["4 has no unit", "4ms"]),
        ("params<=1.5", ["1.5", "whole number"]),
        ("size<=-5MB", ["-5MB", "negative"]),
        ("size<=nan", ["'nan'", "no amount"]),
        ("size<=inf", ["'inf'", "no amount"]),
        ("size<=1e999B", ["inf", "finite"]),
        ("size<=0B", ["0", "positive"]),
        ("size<=0x", ["0", "positive"]),
        ("size<=0.5x", ["0.5x", "2 times"]),
        ("size>=25%", [">=", "upper limits"]),
        ("size=25%", ["'size=25%'", "= stands"]),
        ("size 25%", ["'size 25%'", "nothing stands"]),
        ("<=25%", ["'<=25%'", "unknown"]),
        ("size<=25%, size<=10KB", ["size is limited 2 times"]),
        ("size<=25%, latency<=fast", ["'latency<=fast'", "'fast'", "4ms"]),
    ],
)
def test_refuses_with_the_value_and_what_works(text, parts):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    for part in parts:
        assert part in message


def test_refuses_what_is_no_text_and_bad_limits():
    with pytest.raises(BudgetError, match=r"not float 0\.25"):
        Budget.parse(0.25)
    with pytest.raises(BudgetError, match="nan"):
        Limit("size", math.nan, "share")
    with pytest.raises(BudgetError, match="half"):
        Limit("size", 1, "half")
    with pytest.raises(BudgetError, match="empty"):
        Budget(())


amounts = st.floats(min_value=0, max_value=1e300, exclude_min=True)
limits = st.one_of(
    st.builds(Limit, st.sampled_from(["size", "params", "macs", "latency", "memory"]), amounts, st.just("absolute")),
    st.builds(
        Limit, st.sampled_from(["size", "params", "macs", "latency", "memory", "drop"]), amounts, st.just("share")
    ),
    st.builds(Limit, st.sampled_from(["size", "latency"]), st.floats(1, 1e300), st.just("factor")),
    st.builds(Limit, st.just("drop"), st.floats(0, 1e300), st.just("absolute")),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(limits, min_size=1, unique_by=lambda limit: limit.metric).map(tuple).map(Budget))
def test_text_round_trips(budget):
    assert Budget.parse(str(budget)) == budget


@settings(deadline=None)
@given(st.text(alphabet="sizedrop<>=≤%x0123456789.eEKMBpt, -µ", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert Budget.parse(str(budget)) == budget


def test_writes_short_text_and_finds_limits():
    text = "size<=500KB, params<=1.5M, macs<=12345, latency<=3ms, memory<=2048B, drop<=0.5pt"
    budget = Budget.parse("size<=500KB, params<=1.5M, macs<=12345, latency<=3000us, memory<=2KiB, drop<=.5pt")
    assert str(budget) == text
    assert budget.limit("latency") == Limit("latency", 0.003, "absolute")
    assert Budget.parse("size<=25%, latency<=10x").limit("drop") is None
    assert str(Budget.parse("size<=25%, latency<=10x")) == "size<=25%, latency<=10x"
    with pytest.raises(FrozenInstanceError):
        budget.limits = ()


def test_allowed():
    assert Limit("size", 0.25, "share").allowed(1000) == 250
    assert Limit("size", 10, "factor").allowed(1000) == 100
    assert Limit("size", 500, "absolute").allowed(1000) == 500
    assert Limit("drop", 0.01, "share").allowed(-2.0) == 0.02  # a score may be negative, an allowance not


def test_missed_size_in_one_sentence():
    verdict = judge("size<=10%, params<=1k", Measured(), Measured(size_bytes=12_400))
    assert not verdict.met
    assert str(verdict) == "budget missed: size 12,400 B > 10,000 B allowed (24 % over)"
    assert verdict.binding.metric == "size"
    assert verdict.rows[0].gap == pytest.approx(0.24)
    assert verdict.rows[1].met
    assert verdict.rows[1].gap == 0


def test_met_names_the_tightest():
    verdict = judge("size<=50%, latency<=4ms", Measured(), Measured(size_bytes=20_000, latency_seconds=0.0036))
    assert verdict.met
    assert str(verdict) == "budget met: latency 3.6 ms <= 4 ms allowed (10 % to spare)"


@pytest.mark.parametrize(("after", "met"), [(0.91, True), (0.92, True), (0.9099, False)])
def test_drop_is_in_points_of_the_score(after, met):
    verdict = judge("drop<=0.5pt", Measured(score=0.915), Measured(score=after))  # 0.915 - 0.91 > 0.005 in floats
    assert verdict.met == met
    assert verdict.rows[0].after == pytest.approx(0.915 - after)


def test_drop_of_a_score_where_lower_is_better():
    before = Measured(score=20.0, higher_is_better=False)
    better = judge("drop<=1%", before, Measured(score=19.0, higher_is_better=False))
    assert better.met
    assert better.rows[0].after == -1.0
    worse = judge("drop<=1%", before, Measured(score=20.3, higher_is_better=False))
    assert worse.rows[0].gap == pytest.approx(0.1)
    assert str(worse) == "budget missed: drop 30 pt > 20 pt allowed (10 pt over)"
    with pytest.raises(BudgetError, match="higher_is_better is False before and True after"):
        judge("drop<=1%", before, Measured())


def test_shares_meet_exactly_despite_rounding():
    assert 0.29 * 100 < 29
    assert judge("params<=29%", Measured(params=100), Measured(params=29)).met
    assert not judge("params<=29%", Measured(params=100), Measured(params=30)).met


def test_what_was_not_measured_is_not_met():
    verdict = judge("size<=25%, latency<=4ms", Measured(), Measured(size_bytes=1, latency_seconds=None))
    assert not verdict.met
    assert verdict.binding.metric == "latency"
    assert str(verdict) == "budget missed: latency<=4ms cannot be judged: latency was not measured after"
    assert judge("latency<=5ms", Measured(latency_seconds=None), Measured()).met  # absolute: needs no original
    row = judge("drop<=1pt", Measured(score=None), Measured(score=math.nan)).rows[0]
    assert (row.met, row.gap, row.reason) == (False, None, "score was not measured before and after")


def test_binding_compares_drop_and_size():
    after = Measured(score=0.895, size_bytes=30_000)  # drop: 400 % over; size: 20 % over
    assert judge("size<=25%, drop<=0.1pt", Measured(), after).binding.metric == "drop"
    assert judge("size<=25%, drop<=0pt", Measured(), after).binding.metric == "drop"
    assert judge("size<=25%, drop<=0pt", Measured(), Measured(score=0.91, size_bytes=30_000)).binding.metric == "size"


def test_dictionary_is_json():
    after = Measured(size_bytes=np.int64(30_000), score=np.float64(0.9), macs=7)
    verdict = judge("size<=25%, drop<=0pt, macs<=10%", Measured(macs=0), after)
    stored = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert stored["met"] is False
    assert stored["binding"] == "macs"
    assert [row["metric"] for row in stored["rows"]] == ["size", "drop", "macs"]
    assert stored["rows"][0]["limit_text"] == "size<=25%"
    assert stored["rows"][2]["gap"] is None
    assert "inf % over" in str(verdict)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("size", 12_400, "12,400 B"),
        ("size", 412_400, "412.4 KB"),
        ("memory", 44_710_000, "44.71 MB"),
        ("params", 99_999, "99,999"),
        ("macs", 54_525_952, "54.53 M"),
        ("latency", 0.0042, "4.2 ms"),
        ("latency", 1.25, "1.25 s"),
        ("latency", 3e-8, "0.03 us"),
        ("drop", 0.005, "0.5 pt"),
        ("drop", -0.02, "-2 pt"),
    ],
)
def test_amounts_for_people(metric, value, text):
    assert format_amount(metric, value) == text


def test_amounts_of_unknown_metrics():
    with pytest.raises(BudgetError, match=r"'sise'.*'size'"):
        format_amount("sise", 1)

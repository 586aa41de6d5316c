"""Budgets without training data: what `compress` and `plan` do where nothing can be healed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from featherweight.artifact import load
from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.pipeline import compress
from featherweight.planning import plan
from featherweight.scoring import evaluate
from featherweight.tasks.training import tensor_loader


@pytest.fixture
def perceptron(clusters):
    return clusters.model, replace(clusters.data, train=None)


def test_a_size_is_filled_and_kept_without_training(perceptron, tmp_path):
    model, data = perceptron
    made = compress(model, data, "size<=27%", out=tmp_path / "model.fw").report
    size, allowed = (tmp_path / "model.fw").stat().st_size, 0.27 * made.before["size_bytes"]
    assert 0.9 * allowed < size <= allowed
    assert made.verdict["met"]
    assert made.before["score"] - made.after["score"] <= 0.02
    back = load(tmp_path / "model.fw", into=model)
    assert evaluate(back, data, "test").value == pytest.approx(made.after["score"])


def test_statistics_of_batch_norms_follow_the_rounded_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    loader = tensor_loader(torch.randn(64, 1, 8, 8), torch.arange(64) % 3, 16)
    found = plan(model, Data(example=torch.randn(1, 1, 8, 8), validate=loader), "size<=90%")
    assert "reestimate_norms" in found["recipe"]


def test_a_drop_decides_how_small_the_file_gets(perceptron):
    mild, strong = (compress(*perceptron, f"drop<={drop}pt", trials=4).report for drop in (3, 30))
    assert strong.after["size_bytes"] < mild.after["size_bytes"] < 0.6 * mild.before["size_bytes"]
    assert mild.verdict["met"]


def test_a_latency_asks_for_integers_throughout(perceptron):
    artifact = compress(*perceptron, "latency<=1000ms")
    assert artifact.report.verdict["met"]
    assert "quantize_static" in str(artifact.facts["recipe"])


def test_limits_that_only_cuts_keep_are_refused(perceptron):
    with pytest.raises(RecipeError, match=r"macs<=50% can only be kept by cutting layers.*Data\(train="):
        compress(*perceptron, "size<=90%, macs<=50%")


def test_a_plan_needs_no_training_data(perceptron):
    found = plan(*perceptron, "size<=27%")
    assert found["feasible"]
    assert found["limits"][0]["untrained"] > 0.9 * found["limits"][0]["allowed"]
    assert found["seconds"]["epoch"] == 0
    assert "quantize_rate_distortion" in found["recipe"]


def test_what_no_rounding_reaches_is_missed_and_said(perceptron):
    verdict = compress(*perceptron, "latency<=1%, size<=60%").report.verdict
    assert not verdict["met"]
    assert "missed" in verdict["text"]

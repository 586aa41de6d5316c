"""What a model costs, whether a file agrees with it, and what the file gives in a fresh process."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import measurement as measuring
from featherweight.agreement import agreement
from featherweight.artifact import load, package
from featherweight.data import Data, forward
from featherweight.errors import ExportError, ModelError
from featherweight.portable import assemble, export_graph
from featherweight.scoring import Score, evaluate
from featherweight.zoo import small_models


class Two(nn.Module):
    """Two inputs that are not alike, two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, near, far):
        both = self.left(near) - self.right(far)
        return both, {"near": self.left(near)}


TWO = Data(example={"near": torch.ones(1, 3), "far": torch.ones(1, 5)}, output=0)


def packaged(model, data):
    return package(model, [], {}, export_graph(model, data))


@pytest.fixture(scope="module")
def plain():
    task = small_models()["plain"]
    return task, packaged(task.model, task.data)


def test_structure_counts_by_hand():
    found = measuring.structure(nn.Linear(3, 4), Data(example=torch.ones(1, 3)))
    assert (found.params, found.nonzero, found.size_bytes, found.macs) == (16, 16, 64, 12)
    assert found.latency_seconds is None
    assert found.to_dict()["latency"] == {}


def test_a_score_without_an_error_is_json_able():
    found = measuring.with_score(
        measuring.structure(nn.Linear(3, 4), Data(example=torch.ones(1, 3))), Score(0.5, False, torch.ones(1), "mse")
    )
    assert (found.score, found.score_error, found.score_name, found.higher_is_better) == (0.5, None, "mse", False)


def test_the_right_artifact_agrees(plain):
    task, artifact = plain
    model = copy.deepcopy(task.model).train()
    agreed = agreement(model, artifact, task.data.test[0][0])
    assert agreed.max_abs < 1e-4
    assert agreed.sqnr_db > 60
    assert agreed.top1 == 1.0
    assert model.training


def test_a_wrong_artifact_does_not_agree(plain):
    task, artifact = plain
    wrong = copy.deepcopy(task.model)
    with torch.no_grad():
        wrong.classifier.weight.mul_(-1)
    with pytest.raises(ExportError, match="disagrees with PyTorch: SQNR"):
        agreement(wrong, artifact, task.data.test[0][0])


def test_outputs_of_another_shape_do_not_agree():
    data = Data(example=torch.ones(1, 3))
    with pytest.raises(ExportError, match=r"\[\[2, 4\]\].*\[\[2, 5\]\]"):
        agreement(nn.Linear(3, 5), packaged(nn.Linear(3, 4), data), torch.ones(2, 3))


def test_outputs_without_classes_have_no_top1():
    data, model = Data(example=torch.ones(1, 3)), nn.Linear(3, 1)
    agreed = agreement(model, packaged(model, data), torch.ones(2, 3))
    assert agreed.top1 is None
    assert math.isfinite(agreed.sqnr_db)


def test_peak_memory_of_a_few_megabytes():
    model, data = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)), Data(example=torch.ones(1, 1024))
    peak = measuring.peak_bytes(assemble(export_graph(model, data), model.state_dict()), data)
    assert 4 * 1024 * 1024 < peak < 200e6


def test_peak_memory_of_what_cannot_run_is_an_error():
    with pytest.raises(ExportError, match="cannot load"):
        measuring.peak_bytes(b"no model", Data(example=torch.ones(1, 3)))


def test_a_fresh_process_gives_the_same(plain, tmp_path):
    task, artifact = plain
    artifact.save(tmp_path / "model.fw")
    read = [inputs for inputs, _ in task.data.validate]
    fresh = measuring.fresh_outputs(tmp_path / "model.fw", read, 8)
    assert len(fresh) == 1
    assert np.array_equal(fresh[0], np.concatenate([artifact.run(inputs)[0] for inputs in read]))


def test_dict_inputs_in_any_order_reach_their_own_input_in_a_fresh_process(tmp_path):
    model = Two().eval()
    artifact = packaged(model, TWO)
    artifact.save(tmp_path / "model.fw")
    assert set(artifact.session().inputs) == {"near", "far"}
    batch = {"far": torch.randn(3, 5), "near": torch.randn(3, 3)}
    fresh = measuring.fresh_outputs(tmp_path / "model.fw", [batch], 3)
    with torch.no_grad():
        first, others = forward(model, batch)
    assert torch.allclose(torch.from_numpy(fresh[0]), first, atol=1e-6)
    assert torch.allclose(torch.from_numpy(fresh[1]), others["near"], atol=1e-6)


def test_a_file_that_does_not_run_says_so(tmp_path):
    path = tmp_path / "model.fw"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.fw does not run in a fresh process.*error: "):
        measuring.fresh_outputs(path, [torch.ones(1, 3)], 1)


def test_the_score_of_flat_outputs_is_that_of_the_model():
    model = Two().eval()
    test = [({"near": torch.randn(8, 3), "far": torch.randn(8, 5)}, torch.randint(0, 4, (8,))) for _ in range(2)]
    artifact = packaged(model, TWO)
    for output in (0, lambda made: made[1]["near"]):
        data = Data(example=TWO.example, test=test, output=output)
        assert measuring.score_of(artifact.run, model, data).value == evaluate(model, data, "test").value


def test_the_machine_is_named():
    found = measuring.machine()
    assert found["torch"] == torch.__version__
    assert found["threads"] == 1


def test_a_loaded_file_measures_as_the_saved_one(plain, tmp_path):
    _, artifact = plain
    size = artifact.save(tmp_path / "model.fw")
    parts = load(tmp_path / "model.fw").bytes_by_part()
    assert sum(parts.values()) == size

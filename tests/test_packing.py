"""Tensors of any model in one file: exact, or as good or as small as was asked for."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from featherweight.artifact import load
from featherweight.cli import app
from featherweight.errors import ArtifactError, BudgetError
from featherweight.packing import pack, packed_file, ratio, unpack, unpacked_file


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "conv.weight": draw(32, 16, 3, 3) * 0.1,
        "linear.weight": draw(64, 128) * 3,
        "half": draw(40, 50).to(torch.bfloat16),
        "linear.bias": draw(64),
        "steps": torch.tensor(7),
        "zeros": torch.zeros(4, 4),
        "words": torch.arange(30).reshape(5, 6),
    }


def test_lossless_is_exact_and_smaller(tensors, tmp_path):
    pack(tensors).save(tmp_path / "w.fw")
    back = unpack(load(tmp_path / "w.fw"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items())
    assert (tmp_path / "w.fw").stat().st_size < sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("sqnr", [12.0, 30.0, 60.0])
def test_every_tensor_is_as_good_as_asked(tensors, sqnr):
    small = pack(tensors, sqnr=sqnr)
    back = unpack(small)
    assert sqnr <= ratio(tensors, back) < sqnr + 1.5
    assert {name: value.dtype for name, value in back.items()} == {name: value.dtype for name, value in tensors.items()}
    assert torch.equal(back["linear.bias"], tensors["linear.bias"])
    # 6.02 dB a bit above the entropy of a unit normal rounded to its own deviation, 2.1 bits, at 10.8 dB
    matrices = sum(tensors[name].numel() for name in ("conv.weight", "linear.weight", "half"))
    assert len(small.to_bytes()) < matrices * (2.15 + (sqnr + 1.5 - 10.8) / 6.02) / 8 + 900


@pytest.mark.parametrize("size", [4000, 12_000])
def test_the_file_is_as_small_as_asked_and_hardly_smaller(tensors, size):
    small = pack(tensors, size=size)
    assert 0.97 * size < len(small.to_bytes()) <= size
    assert ratio(tensors, unpack(small)) > 0


def test_what_fits_exactly_stays_exact(tensors):
    assert ratio(tensors, unpack(pack(tensors, size=10**6))) == math.inf


def test_what_cannot_be_had_is_said(tensors):
    with pytest.raises(BudgetError, match="the coarsest takes"):
        pack(tensors, size=100)
    with pytest.raises(BudgetError, match="not both"):
        pack(tensors, size=100, sqnr=3)


def test_names_that_clash_are_kept_exact():
    value = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    both = {"a": value, "a.codes": torch.zeros(3)}
    assert torch.equal(unpack(pack(both, sqnr=10))["a"], value)


def test_from_safetensors_and_back_on_the_command_line(tensors, tmp_path):
    source, small, back = (tmp_path / name for name in ("w.safetensors", "w.fw", "back.safetensors"))
    save_file(tensors, source, {"format": "pt"})
    result = CliRunner().invoke(app, ["pack", str(source), "--size", "15%", "--out", str(small), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["file_bytes"] == small.stat().st_size <= 0.15 * facts["tensor_bytes"]
    assert CliRunner().invoke(app, ["unpack", str(small), "--out", str(back)]).exit_code == 0
    assert ratio(tensors, load_file(back)) == pytest.approx(facts["least_sqnr_db"], abs=0.01)
    assert unpacked_file(small, back)["tensors"] == len(tensors)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        packed_file(tmp_path / "x.safetensors", tmp_path / "x.fw", None, None)
    from featherweight.artifact import Artifact

    Artifact([], {}, {"a": torch.zeros(2)}, {}, None).save(tmp_path / "model.fw")
    with pytest.raises(ArtifactError, match="no packed tensors"):
        unpacked_file(tmp_path / "model.fw", tmp_path / "y.safetensors")
    Artifact([], {"packed": {"a": "float32"}}, {"a.codes": torch.zeros(2)}, {}, None).save(tmp_path / "stepless.fw")
    with pytest.raises(ArtifactError, match="no step"):
        unpacked_file(tmp_path / "stepless.fw", tmp_path / "y.safetensors")

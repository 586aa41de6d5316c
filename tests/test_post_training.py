"""The recipe of post-training quantization: what it is made of, and what it refuses."""

import pytest
import torch

from featherweight import Context, post_training, run
from featherweight.errors import RecipeError
from featherweight.layers import QuantizedLayer
from featherweight.zoo import small_models


def test_what_it_is_made_of():
    assert [step["quantize_static"]["rounding"] for step in post_training().to_json()["steps"][2:]] == ["compensated"]
    weights = [post_training(bits, integers=False).to_json()["steps"][1] for bits in (4, 8)]
    assert weights[0] == {"quantize_weights": {"rounding": "compensated", "spare": 0.1}}
    assert weights[1] == {"quantize_weights": {"bits": 8, "rounding": "compensated"}}
    assert post_training(3.5, integers=False).to_json()["steps"][1] == {"mix_precisions": {"bits": 3.5, "batches": 8}}
    with pytest.raises(RecipeError, match=r"bits=3\.5"):
        post_training(3.5)
    with pytest.raises(RecipeError, match="bits=9"):
        post_training(9)


@pytest.mark.parametrize("name", ["residual", "recurrent"])
def test_it_needs_no_thinking(name):
    task = small_models()[name]
    output = run(post_training(batches=2), task.model, Context(data=task.data)).model
    inputs = task.data.validate[0][0]
    with torch.no_grad():
        wanted = task.model(inputs)
        gap = float((output(inputs) - wanted).square().sum() / wanted.square().sum())
    assert 0 < gap < 0.02
    assert sum(isinstance(layer, QuantizedLayer) for layer in output.modules()) >= 4

"""The list of a file's tensors: what edits describe is not said twice, and nothing else is guessed."""

import pytest
import torch
from torch import nn

from featherweight.edits import Swap
from featherweight.errors import ArtifactError
from featherweight.layers import build
from featherweight.tensor_table import read, written

OPTIONS = {"in_features": 5, "out_features": 3, "bits": 4, "bias": True, "per_channel": False}
SWAP = Swap("inner", "quantized_linear", OPTIONS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), build("quantized_linear", OPTIONS), nn.Linear(3, 2)


def test_a_swapped_layer_is_its_path_and_everything_comes_back_in_order():
    state = Net().state_dict()
    table = written(state, [SWAP])
    assert table == [
        ["first.weight", "f", [5, 4]],
        ["first.bias", "f", [5]],
        "inner",
        ["last.weight", "f", [2, 3]],
        ["last.bias", "f", [2]],
    ]
    assert read(table, [SWAP]) == [(name, value.dtype, tuple(value.shape)) for name, value in state.items()]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({"inner.codes": state["inner.codes"][:2]}),
        lambda state: state.update({"inner.bias": state["inner.bias"].half()}),
        lambda state: state.pop("inner.scale"),
        lambda state: (
            state.update({"inner.more": torch.zeros(1)}) or state.update({"first.bias": state.pop("first.bias")})
        ),
    ],
)
def test_tensors_that_differ_from_what_the_edit_builds_are_listed(change):
    state = dict(Net().state_dict())
    change(state)
    table = written(state, [SWAP])
    assert read(table, [SWAP]) == [(name, value.dtype, tuple(value.shape)) for name, value in state.items()]


def test_layers_of_which_options_make_many_tensors_are_not_built_to_list_them():
    many = Swap("lstm", "recurrent", {"kind": "lstm", "input_size": 1, "hidden_size": 1, "num_layers": 10**9})
    assert written({"lstm.a": torch.zeros(1)}, [many]) == [["lstm.a", "f", [1]]]
    with pytest.raises(KeyError, match="lstm"):
        read(["lstm"], [many])


def test_sizes_beyond_belief_cost_no_memory():
    vast = Swap("inner", "quantized_linear", {**OPTIONS, "in_features": 10**7, "out_features": 10**7})
    with pytest.raises(ArtifactError, match="not to be believed"):
        read(["inner"], [vast])

"""Edits: exact effect, exact undo, and refusals that name the place and the value."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from featherweight.edits import (
    Cut,
    Keep,
    Swap,
    Write,
    apply,
    from_json,
    masked_state,
    named_tensors,
    private_copy,
    replay,
    to_json,
)
from featherweight.errors import ArtifactError, ModelError
from featherweight.techniques.swaps import quantized_swap
from featherweight.zoo import randomise, small_models


def snapshot(model):
    modules = {path: (id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)}
    tensors = {name: (id(value), value.detach().clone()) for name, value in named_tensors(model).items()}
    sizes = {f"{p}.{k}": v for p, m in model.named_modules() for k, v in vars(m).items() if type(v) is int}
    return modules, tensors, sizes


def same(first, second):
    tensors = first[1].keys() == second[1].keys() and all(
        value[0] == second[1][name][0] and torch.equal(value[1], second[1][name][1]) for name, value in first[1].items()
    )
    return first[0] == second[0] and tensors and first[2] == second[2]


CUT = Keep(
    (Cut("0.weight", 0, (0, 2)), Cut("0.bias", 0, (0, 2)), Cut("2.weight", 1, (0, 2))),
    (("0.out_features", 2), ("2.in_features", 2)),
)


def chain():
    return randomise(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 0)


def test_keep_slices_and_undoes():
    model = chain()
    before, weight = snapshot(model), model[0].weight.detach().clone()
    undo = apply(model, CUT)
    assert torch.equal(model[0].weight, weight[[0, 2]])
    assert (model[0].out_features, model[2].in_features) == (2, 2)
    assert isinstance(model[0].weight, nn.Parameter)
    model(torch.ones(1, 3))
    undo()
    assert same(before, snapshot(model))


def test_keep_reorders_and_keeps_requires_grad_and_buffers():
    model = randomise(nn.Sequential(nn.BatchNorm1d(3)), 0)
    model[0].weight.requires_grad_(False)
    mean = model[0].running_mean.clone()
    cuts = tuple(Cut(f"0.{name}", 0, (2, 0)) for name in ("weight", "bias", "running_mean", "running_var"))
    apply(model, Keep(cuts, (("0.num_features", 2),)))
    assert torch.equal(model[0].running_mean, mean[[2, 0]])
    assert not isinstance(model[0].running_mean, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad


@pytest.mark.parametrize("last", [True, False])
def test_cuts_and_quantized_layers_and_their_training_leave_a_convolution_laid_out_as_it_was(last):
    layout = torch.channels_last if last else torch.contiguous_format
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), 0).to(memory_format=layout)

    def lies():
        weights = [value for value in named_tensors(model).values() if value.dim() == 4]
        return [value.is_contiguous(memory_format=layout) for value in weights]

    cuts = (Cut("0.weight", 0, (0, 2, 5)), Cut("0.bias", 0, (0, 2, 5)), Cut("2.weight", 1, (0, 2, 5)))
    apply(model, Keep(cuts, (("0.out_channels", 3), ("2.in_channels", 3))))
    assert lies() == [True, True]
    image, swap = torch.ones(1, 3, 8, 8), quantized_swap("2", model[2], 4, per_channel=True)
    apply(model, swap)
    before = model(image)
    model[2].thaw()
    assert lies() == [True, True]
    model[2].freeze()
    assert lies() == [True, True]
    assert torch.allclose(model(image), before)


def test_keep_on_a_tied_tensor_reaches_every_holder():
    model = small_models()["transformer"].model
    before = snapshot(model)
    both = (Cut("embedding.weight", 0, (5, 7)), Cut("head.weight", 0, (5, 7)))
    for cuts in (both[:1], both[1:], both):
        undo = apply(model, Keep(cuts))
        assert model.head.weight is model.embedding.weight
        assert model.head.weight.shape == (2, 16)
        undo()
        assert same(before, snapshot(model))
    with pytest.raises(ModelError, match=r"embedding\.weight are one tensor"):
        apply(model, Keep((both[0], Cut("head.weight", 0, (1, 2)))))


def test_sizes_in_tuples_and_the_weights_a_recurrent_layer_lists():
    model = nn.Sequential(nn.LayerNorm((4, 6)), nn.GRU(6, 5))
    cuts = (
        Cut("0.weight", 0, (0, 2)),
        Cut("0.weight", 1, (1, 2, 5)),
        Cut("0.bias", 0, (0, 2)),
        Cut("0.bias", 1, (1, 2, 5)),
    )
    undo = apply(model, Keep(cuts, (("0.normalized_shape.0", 2), ("0.normalized_shape.1", 3))))
    assert model[0].normalized_shape == (2, 3)
    assert model[0](torch.randn(2, 3)).shape == (2, 3)
    undo()
    assert model[0].normalized_shape == (4, 6)
    undo = apply(model, Keep((Cut("1.weight_ih_l0", 1, (0, 3)),), (("1.input_size", 2),)))
    assert model[1](torch.randn(7, 1, 2))[0].shape == (7, 1, 5)
    undo()
    assert model[1](torch.randn(7, 1, 6))[0].shape == (7, 1, 5)
    with pytest.raises(ModelError, match=r"normalized_shape\.2 is \(4, 6\), not an integer size"):
        apply(model, Keep((), (("0.normalized_shape.2", 2),)))


def test_baking_a_parametrized_weight_leaves_the_model_as_it_was():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)))
    values = torch.randn(2, 3)
    before = model(values)
    copied, baked = private_copy(model)
    assert baked == ["0.weight"]
    assert torch.equal(copied(values), before)
    assert torch.equal(model(values), before)
    assert parametrize.is_parametrized(model[0])


def test_keep_on_a_module_registered_twice():
    model = small_models()["twice"].model
    undo = apply(model, Keep((Cut("again.weight", 0, (1,)),)))
    assert model.first.weight.shape == (1, 16)
    undo()
    assert model.first.weight.shape == (16, 16)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Keep((Cut("0.wieght", 0, (0,)),)), ["0.wieght", "Did you mean '0.weight'"]),
        (Keep((Cut("0.weight", 2, (0,)),)), ["0.weight [4, 3]", "dimension 2"]),
        (Keep((Cut("0.weight", -1, (0,)),)), ["dimension -1"]),
        (Keep((Cut("0.weight", 0, (0, 4)),)), ["(0, 4)", "[4, 3]"]),
        (Keep((Cut("0.weight", 0, (-1,)),)), ["(-1,)"]),
        (Keep((), (("0.bias", 3),)), ["0.bias", "not an integer"]),
        (Keep((), (("0.training", 3),)), ["0.training is True"]),
        (Keep((), (("0.missing", 3),)), ["0.missing", "None"]),
        (Keep((), (("9.out_features", 3),)), ["'9'"]),
        (Swap("", "identity", {}), ["Sequential", "submodule"]),
        (Swap("7", "identity", {}), ["'7'"]),
        (Swap("0", "lineer", {}), ["lineer", "Did you mean 'linear'"]),
        (Swap("0", "linear", {"in_features": 3}), ["linear", "out_features"]),
        (Swap("0", "linear", {"in_features": 3, "out_features": 4}, {"weight": torch.ones(1)}), ["0:", "bias"]),
        (Write({"0.weight": torch.ones(3)}), ["0.weight is [4, 3]", "[3]"]),
        (Write({"nothing": torch.ones(3)}), ["nothing"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_whole(edit, words):
    model = chain()
    before = snapshot(model)
    with pytest.raises(ModelError) as caught:
        apply(model, edit)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert same(before, snapshot(model))


def test_keep_is_all_or_none():
    model = chain()
    before = snapshot(model)
    with pytest.raises(ModelError):
        apply(model, Keep((Cut("0.weight", 0, (0,)), Cut("0.bias", 0, (99,)))))
    assert same(before, snapshot(model))


def test_a_buffer_that_is_not_stored_is_not_cut():
    with pytest.raises(ModelError, match=r"positions.*state dict"):
        apply(small_models()["transformer"].model, Keep((Cut("positions", 1, (0, 1)),)))


def test_swap_and_undo_with_state_mode_and_every_holder():
    model = small_models()["twice"].model
    model.first.train()
    before = snapshot(model)
    state = {"weight": torch.ones(16, 16), "bias": torch.zeros(16)}
    undo = apply(model, Swap("again", "linear", {"in_features": 16, "out_features": 16}, state))
    assert model.first is model.again
    assert model.first.training
    assert not model.stem.training
    assert torch.equal(model.first.weight, torch.ones(16, 16))
    undo()
    assert same(before, snapshot(model))


def test_swap_takes_the_type_of_its_place():
    model = nn.Sequential(nn.Linear(2, 2)).double()
    state = {"weight": torch.full((2, 2), 1 / 3, dtype=torch.float64), "bias": torch.zeros(2)}
    apply(model, Swap("0", "linear", {"in_features": 2, "out_features": 2}, state))
    assert torch.equal(model[0].weight, state["weight"])


def test_write_and_undo():
    model = small_models()["transformer"].model
    before = snapshot(model)
    undo = apply(model, Write({"head.weight": torch.zeros(20, 16), "inner.bias": torch.ones(24)}))
    assert not model.embedding.weight.any()
    undo()
    assert same(before, snapshot(model))
    apply(model, Write(None, ("inner.weight",)))()
    assert same(before, snapshot(model))


def test_masked_state_zeroes_what_leaves():
    model = chain()
    masked = masked_state(model, CUT)
    assert not masked["0.weight"][[1, 3]].any()
    assert torch.equal(masked["0.weight"][[0, 2]], model[0].weight[[0, 2]])
    assert not masked["2.weight"][:, [1, 3]].any()
    assert set(masked) == {"0.weight", "0.bias", "2.weight"}


def test_json_holds_structure_and_replays():
    swap = Swap("2", "quantized_linear", {"in_features": 2, "out_features": 2, "bits": 4})
    edits = [CUT, Write({"0.bias": torch.ones(2)}), Write(None, ("0.weight",)), swap]
    rows = json.loads(json.dumps(to_json(edits)))
    assert rows[0] == {
        "keep": [["0.weight", 0, 2], ["0.bias", 0, 2], ["2.weight", 1, 2]],
        "sizes": {"0.out_features": 2, "2.in_features": 2},
    }
    assert [next(iter(row)) for row in rows] == ["keep", "sparse", "swap"]
    back = from_json(rows)
    assert to_json(back) == rows
    assert {n: v.shape for n, v in replay(chain(), back).state_dict().items()} == {
        n: v.shape for n, v in replay(chain(), edits).state_dict().items()
    }


@pytest.mark.parametrize(
    "row",
    [
        5,
        {},
        {"keep": 3, "sizes": {}},
        {"keep": [["a", 0, 1]]},
        {"keep": [["a", 0, 10**15]], "sizes": {}},
        {"keep": [["a", 0, float("inf")]], "sizes": {}},
        {"swap": "a", "kind": "linear"},
        {"swap": "a", "kind": "linear", "options": 3},
        {"sparse": 4},
    ],
    ids=str,
)
def test_rows_that_are_no_edits(row):
    with pytest.raises(ArtifactError, match="not an edit"):
        from_json([row])

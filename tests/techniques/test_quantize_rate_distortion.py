"""Rate-distortion optimized codes: against the formulas, against nearest rounding, and compiled against plain."""

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.coding import encode_tensor
from featherweight.coding.choice import Chooser
from featherweight.coding.machine import has_compiler
from featherweight.data import Data
from featherweight.layers import QuantizedLayer, QuantizedLinear
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import QuantizeRateDistortion, QuantizeWeights
from featherweight.techniques.moments import inverse_factor
from featherweight.techniques.rate_distortion import Rounding, codes_of, refitted_step
from featherweight.techniques.sensitivity import curvatures


def laplace(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def correlated(samples, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return torch.randn(samples, inputs, generator=generator) @ mix


def rounding(weight, rate=0.0, moment=None, worth=1.0, held=False, side=1):
    shape = weight.shape
    worths, zeros = torch.full(shape, worth).double(), torch.full(shape, held, dtype=torch.bool)
    if moment is None:
        return Rounding(weight, worths, zeros, side, rate)
    energy = moment.diagonal(dim1=1, dim2=2).mean(1).repeat_interleave(len(weight) // len(moment))
    return Rounding(weight, worths, zeros, side, rate, moment, inverse_factor(moment, 0.0), worth / energy[:, None])


ONE = torch.ones(1, 1, dtype=torch.float64)


def test_without_a_rate_every_code_is_the_nearest():
    weight = laplace(30, 40) * 20
    assert torch.equal(codes_of(rounding(weight), ONE), (weight.abs() + 0.5).floor().clamp(max=127) * weight.sign())


def test_bits_only_move_codes_towards_zero_and_only_where_they_are_dear():
    weight = laplace(60, 80) * 3
    nearest, lower = codes_of(rounding(weight), ONE), codes_of(rounding(weight, 0.2), ONE)
    assert (lower.abs() <= nearest.abs()).all()
    assert ((lower == 0) | (lower.abs() >= nearest.abs() - 1)).all()
    assert ((lower == 0) | (lower.sign() == nearest.sign())).all()
    moved = lower != nearest
    assert 0.01 < moved.double().mean() < 0.3
    assert (weight.abs() % 1)[moved & (nearest > 1)].min() >= 0.5, "what lies below its code's middle stays"
    assert not codes_of(rounding(weight, 1e6), ONE).any()
    assert torch.equal(codes_of(rounding(weight, 0.2, worth=1e6), ONE), nearest)


def test_what_must_be_zero_is():
    weight = laplace(8, 8) * 9
    made = rounding(weight)
    made.held[:, 3] = True
    codes = codes_of(made, ONE)
    assert not codes[:, 3].any()
    assert codes[:, 4].any()


@pytest.mark.parametrize(("groups", "columns"), [(1, 20), (2, 20), (1, 300)])
def test_compensation_is_gptq(groups, columns):
    """Column after column over the whole matrix, as in the paper, without blocks."""
    weight = laplace(4 * groups, columns, seed=1) * 2
    inputs = torch.stack([correlated(900, columns, group).double() for group in range(groups)])
    moment = inputs.transpose(1, 2) @ inputs / 900
    codes = codes_of(rounding(weight, 0.0, moment), ONE)
    factor = inverse_factor(moment, 0.0)
    for group in range(groups):
        rest, upper = weight.reshape(groups, 4, columns)[group].clone(), factor[group]
        for column in range(columns):
            wanted = (rest[:, column].abs() + 0.5).floor() * rest[:, column].sign()
            assert torch.equal(codes.reshape(groups, 4, columns)[group][:, column], wanted), column
            rest -= ((rest[:, column] - wanted) / upper[column, column])[:, None] * upper[column]


def test_compensated_outputs_are_nearer():
    weight, inputs = laplace(20, 64) * 2, correlated(2000, 64).double()
    moment = (inputs.T @ inputs / 2000)[None]
    for rate in (0.0, 0.1):
        errors = [
            float((inputs @ (codes_of(rounding(weight, rate, m), ONE) - weight).T).square().mean())
            for m in (None, moment)
        ]
        assert errors[1] < 0.7 * errors[0], (rate, errors)


def test_a_bit_may_cost_the_same_share_with_compensation_and_without():
    """Inputs so alike that little is left of an error once it is compensated do not make bits dear."""
    weight, inputs = laplace(40, 64) * 2, correlated(2000, 64).double() + 3 * correlated(2000, 1).double()
    moment = (inputs.T @ inputs / 2000)[None] + 1e-3 * torch.eye(64, dtype=torch.float64)
    zeros = [
        [float((codes_of(rounding(weight, rate, m), ONE) == 0).double().mean()) for rate in (0.0, 0.1)]
        for m in (None, moment)
    ]
    rises = [after - before for before, after in zeros]
    assert all(0 < rise < 0.1 for rise in rises), zeros


@pytest.mark.skipif(not has_compiler(), reason="the extra `speed` is not installed")
@pytest.mark.parametrize("compensate", [True, False])
def test_compiled_and_plain_choose_alike(compensate):
    weight = (laplace(40, 90) * 8).numpy()
    inputs = correlated(500, 90).double()
    factor = inverse_factor((inputs.T @ inputs)[None], 0.01).numpy() if compensate else None
    worths = np.abs(laplace(40, 90, seed=2).numpy())
    worths[:, 7] = -1
    found = []
    for fast in (True, False):
        chooser = Chooser(4.0, 40, 3, 0.3, 127, fast)
        found.append([chooser.block(weight, worths, factor), chooser.block(weight, worths, factor)])
    for (codes, errors), (plain_codes, plain_errors) in zip(*found, strict=True):
        assert np.array_equal(codes, plain_codes)
        assert np.array_equal(errors, plain_errors)
    assert not np.array_equal(found[0][0][0], found[0][1][0]), "the second block has learnt from the first"


def test_the_step_is_refitted_by_least_squares():
    weight = torch.tensor([[1.2, 2.2, -1.1], [0.0, 3.3, 1.0]], dtype=torch.float64)
    codes = torch.tensor([[1.0, 2.0, -1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    whole = refitted_step(rounding(weight), codes, ONE)
    assert whole.item() == pytest.approx((1.2 + 4.4 + 1.1 + 9.9 + 1.0) / (1 + 4 + 1 + 9 + 1))
    each = refitted_step(rounding(weight), codes, torch.ones(2, 1, dtype=torch.float64))
    assert each.flatten().tolist() == pytest.approx([6.7 / 6, 10.9 / 10])
    moment = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))[None]
    seen = refitted_step(rounding(weight, moment=moment), codes, ONE)
    assert seen.item() == pytest.approx((1.2 + 4.4 + 4.0) / (1 + 4 + 4))
    assert refitted_step(rounding(weight), codes * 0, 3 * ONE).item() == 3


class Sum(nn.Module):
    """Two layers of the same input, the second's output ten times as loud."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quiet, self.loud = nn.Linear(30, 20), nn.Linear(30, 20)

    def forward(self, x):
        return self.quiet(x) + 10 * self.loud(x)


def values(labels=False, loss="mse"):
    inputs = correlated(512, 30)
    batches = [(part, torch.zeros(len(part), 20) if labels else None) for part in inputs.split(16)]
    return Data(example=inputs[:1], calibrate=batches, loss=loss)


def test_steps_follow_the_root_of_the_sensitivity():
    output, _ = run(QuantizeRateDistortion(step=0.3, batches=32), Sum(), Context(data=values()))
    assert float(output.quiet.scale / output.loud.scale) == pytest.approx(10, rel=0.15)
    mean = float((output.quiet.scale * output.loud.scale).sqrt())
    usual = float(Sum().quiet.weight.detach().square().mean().sqrt())
    assert mean == pytest.approx(0.3 * usual, rel=0.1), "the step is a share of the root mean square"
    equal, _ = run(QuantizeRateDistortion(step=0.3, sensitivity="none"), Sum(), Context(data=values()))
    assert float(equal.quiet.scale / equal.loud.scale) == pytest.approx(1, rel=0.1)


def test_compensated_steps_grow_by_what_compensation_takes_from_an_error():
    """Of inputs that are alike but for a tenth, all but the last leave a hundredth: some 4 % in the mean, damping included 5 %."""
    torch.manual_seed(0)
    model, own = nn.Sequential(nn.Linear(30, 40, bias=False)), torch.randn(4000, 30)
    scales = []
    for inputs in (own, torch.randn(4000, 1) + 0.1 * own):
        data = Data(example=inputs[:1], calibrate=[inputs], loss="mse")
        technique = QuantizeRateDistortion(0.05, rate=0.0, sensitivity="none", compensate=True, batches=1)
        output, _ = run(technique, model, Context(data=data))
        scales.append(float(output[0].scale))
    assert scales[1] / scales[0] == pytest.approx(0.05**-0.5, rel=0.1)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.linear = nn.Embedding(40, 16), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.linear(self.table(tokens).mean(1))


def test_words_that_a_few_batches_miss_keep_their_codes():
    tokens = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))  # half of the table
    data = Data(example=tokens[:1], calibrate=[(tokens, None)], loss="cross_entropy")
    output, _ = run(QuantizeRateDistortion(step=0.5, rate=0.5), Words(), Context(data=data))
    zeros = (output.table.codes == 0).double().mean(1)
    assert float(zeros[20:].mean()) < 0.7, "words without a gradient are not all dropped"


def test_labels_are_not_read():
    first, _ = run(QuantizeRateDistortion(batches=4), Sum(), Context(data=values()))
    second, _ = run(QuantizeRateDistortion(batches=4), Sum(), Context(data=values(labels=True)))
    assert torch.equal(first.loud.codes, second.loud.codes)
    assert torch.equal(first.loud.scale, second.loud.scale)


def test_curvature_of_a_linear_model_with_softmax():
    """The exact diagonal is `sum p (1 - p) x^2`; its rows' and columns' means are what is kept."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    inputs = torch.randn(4000, 6) * torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 3.0])
    data = Data(example=inputs[:1], calibrate=[(part, None) for part in inputs.split(4)])
    found = curvatures(model, {"weight": model.weight}, Context(data=data), 1000)["weight"]
    chances = model(inputs).softmax(1).detach()
    exact = ((chances * (1 - chances)).T @ inputs.square()).double()
    wanted = exact.mean(1, keepdim=True) * exact.mean(0, keepdim=True) / exact.mean() + 0.05 * exact.mean()
    assert torch.allclose(found, wanted, rtol=0.15), found / wanted


def test_zeros_of_pruned_tensors_stay_and_biases_take_up_what_is_lost():
    inputs = correlated(400, 30) + 1
    model = nn.Sequential(nn.Linear(30, 20))
    with torch.no_grad():
        model[0].weight[:, ::3] = 0
    data = Data(example=inputs[:1], calibrate=[inputs], loss="mse")
    context = Context(data=data, sparse={"0.weight"})
    output, _ = run(QuantizeRateDistortion(step=0.5, compensate=True, batches=1), model, context)
    assert not output[0].codes[:, ::3].any()
    with torch.no_grad():
        shift = (output(inputs) - model(inputs)).mean(0)
        bare = shift - (output[0].bias - model[0].bias)
    assert shift.abs().mean() < 0.2 * bare.abs().mean()


def test_outliers_widen_the_step_and_8_bits_hold_them():
    model = nn.Sequential(nn.Linear(40, 40))
    with torch.no_grad():
        model[0].weight[0, 0] = 1000.0
    data = Data(example=torch.ones(1, 40), calibrate=[torch.randn(8, 40)])
    output, _ = run(QuantizeRateDistortion(0.01, rate=0.0, sensitivity="none"), model, Context(data=data))
    assert output[0].bits == 8
    assert int(output[0].codes[0, 0]) == 127
    assert float(output[0].dequantized()[0, 0]) == pytest.approx(1000, rel=1e-3)


def test_fewer_bytes_at_the_same_error_than_nearest_codes():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)).eval()
    for place, size in ((0, 0.05), (2, 0.2), (4, 0.02)):
        model[place].weight.data = laplace(*model[place].weight.shape, seed=place).float() * size
    inputs = correlated(2048, 64)
    data = Data(example=inputs[:1], calibrate=list(inputs.split(128)))

    def made(technique):
        output, _ = run(technique, model, Context(data=data))
        size = sum(len(encode_tensor(m.codes)) for m in output.modules() if isinstance(m, QuantizedLayer))
        with torch.no_grad():
            return size, float((output(inputs) - model(inputs)).square().mean())

    size, error = made(QuantizeWeights(bits=5, per_channel=False))
    sizes = []
    for compensate in (False, True):
        for step in (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8):
            smaller, worse = made(QuantizeRateDistortion(step, 0.1, compensate=compensate, batches=16))
            if worse > error:
                break
            best = smaller
        sizes.append(best)
    assert sizes[0] < 0.98 * size, (size, sizes)
    assert sizes[1] < 0.85 * sizes[0], (size, sizes)


def test_a_table_of_trials_reads_the_data_once():
    read = []

    class Loader(list):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    data = Data(example=torch.ones(1, 12), calibrate=Loader([torch.randn(8, 12)]))
    context, model = Context(data=data), nn.Sequential(nn.Linear(12, 12))
    first, _ = run(QuantizeRateDistortion(0.2), model, context)
    once = len(read)
    second, _ = run(QuantizeRateDistortion(0.6), model, context)
    assert len(read) == once
    assert type(first[0]) is type(second[0]) is QuantizedLinear
    assert first[0].scale < second[0].scale

"""Multiply-accumulates and elements, against numbers worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from featherweight.costs import Cost, count_macs, original_bytes, parameters
from featherweight.errors import ModelError


def cost(model: nn.Module, *inputs: torch.Tensor) -> Cost:
    return count_macs(lambda: model.eval()(*inputs))


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3), (2, 3, 10, 10), 2 * 8 * 8 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 10, 10), 8 * 5 * 5 * 3 * 9),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (1, 4, 5, 5), 8 * 3 * 3 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 6, 6), 8 * 36 * 9),
        (nn.Conv1d(2, 3, 3, dilation=2), (1, 2, 9), 3 * 5 * 2 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 6 * 7 * 5),
        (nn.Linear(7, 5), (7,), 7 * 5),
    ],
)
def test_layers(layer, shape, macs):
    counted = cost(layer, torch.zeros(shape))
    assert counted.macs == sum(counted.by_operator.values()) == macs
    assert counted.uncounted == {}


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda a, v: a @ a, 216),
        (lambda a, v: a @ v, 36),
        (lambda a, v: v @ v, 6),
        (lambda a, v: torch.addmv(v, a, v), 36),
        (lambda a, v: torch.addr(a, v, v), 36),
        (lambda a, v: a.clone().addmm_(a, a), 216),
        (lambda a, v: torch.mm(a, a, out=torch.empty(6, 6)), 216),
        (lambda a, v: torch.bmm(a.expand(4, 6, 6), a.expand(4, 6, 6)), 4 * 216),
        (lambda a, v: torch.baddbmm(a, a[None], a[None]), 216),
        (lambda a, v: torch.addbmm(a, a.expand(4, 6, 6), a.expand(4, 6, 6)), 4 * 216),
        (lambda a, v: torch.einsum("ij,jk,kl->il", a, a, a), 432),
        (lambda a, v: F.bilinear(a, a, torch.ones(5, 6, 6)), 6 * 5 * 36),
        (lambda a, v: torch.cdist(a, a), 216),
        (lambda a, v: torch._int_mm(a.to(torch.int8), a.to(torch.int8)), 216),
    ],
)
def test_products(call, macs):
    counted = count_macs(lambda: call(torch.ones(6, 6), torch.ones(6)))
    assert counted.macs == macs
    assert counted.uncounted == {}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers(kind, gates, directions):
    steps, batch, width, hidden = 5, 3, 8, 16
    model = kind(width, hidden, 2, bidirectional=directions == 2)
    per_step = directions * gates * hidden * ((width + hidden) + (directions * hidden + hidden))
    counted = cost(model, torch.zeros(steps, batch, width))
    assert counted.macs == steps * batch * per_step
    assert counted.uncounted == {}


def test_the_54_million_of_a_known_lstm():
    counted = cost(nn.LSTM(64, 256, 2, batch_first=True), torch.zeros(1, 64, 64))
    assert counted.macs == 64 * 4 * 256 * ((64 + 256) + (256 + 256)) == 54_525_952


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_corner_cases():
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(5, 3, 8), [5, 3, 2])
    assert count_macs(lambda: nn.LSTM(8, 16)(packed)).macs == (5 + 3 + 2) * 4 * 16 * (8 + 16)
    projected = nn.LSTM(8, 16, proj_size=4)
    assert cost(projected, torch.zeros(5, 3, 8)).macs == 15 * (64 * (8 + 4) + 4 * 16)
    assert cost(nn.LSTMCell(8, 16), torch.zeros(3, 8)).macs == 3 * 4 * 16 * (8 + 16)


WIDTH, FORWARD, BATCH, TIME = 32, 64, 2, 10
PER_STEP = 4 * WIDTH * WIDTH + 2 * WIDTH * FORWARD
ENCODER = BATCH * (TIME * PER_STEP + 2 * TIME * TIME * WIDTH)


def encoder_layer():
    return nn.TransformerEncoderLayer(WIDTH, 4, FORWARD, batch_first=True)


def test_encoder_layer_costs_the_same_on_every_path():
    layer, value = encoder_layer(), torch.zeros(BATCH, TIME, WIDTH)
    fast = cost(layer, value)
    assert list(fast.by_operator) == ["aten._transformer_encoder_layer_fwd"]
    assert fast.macs == ENCODER
    assert count_macs(lambda: layer(value, src_mask=torch.zeros(TIME, TIME))).macs == ENCODER
    slow = count_macs(lambda: layer.train()(value))
    assert slow.macs == ENCODER
    assert slow.uncounted == {}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_encoder_counts_true_lengths():
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    padding = torch.zeros(BATCH, TIME, dtype=torch.bool)
    padding[1, 6:] = True
    counted = count_macs(lambda: encoder(torch.zeros(BATCH, TIME, WIDTH), src_key_padding_mask=padding))
    assert counted.macs == 2 * ((10 + 6) * PER_STEP + 2 * (100 + 36) * WIDTH)
    assert counted.uncounted == {}


def test_attention():
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True).eval()
    value, memory = torch.zeros(BATCH, TIME, WIDTH), torch.zeros(BATCH, 5, WIDTH)
    own = BATCH * (4 * TIME * WIDTH**2 + 2 * TIME * TIME * WIDTH)
    assert cost(attention, value, value, value).macs == own
    assert count_macs(lambda: attention.train()(value, value, value)).macs == own
    cross = cost(attention, value, memory, memory)
    assert cross.macs == BATCH * ((2 * TIME + 2 * 5) * WIDTH**2 + 2 * TIME * 5 * WIDTH)
    query, key = torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 6, 8)
    fused = count_macs(lambda: F.scaled_dot_product_attention(query, key, key))
    assert fused.macs == 2 * 4 * 10 * 6 * (8 + 8)
    assert "aten._scaled_dot_product_flash_attention_for_cpu" in fused.by_operator


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.Hardswish(inplace=True),
        nn.Dropout(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.GroupNorm(2, 8),
        nn.PReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 4),
        nn.LogSoftmax(-1),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_network_in_every_mode(training, inference):
    network, value = small_network().train(training), torch.zeros(2, 3, 32, 32)

    def call():
        with torch.inference_mode(inference):
            network(value)

    counted = count_macs(call)
    assert counted.macs == 2 * (256 * 8 * 27 + 36 * 8 * 9 + 8 * 4)
    assert counted.uncounted == {}


def test_meta_device_and_lower_precision_count_the_same():
    assert count_macs(lambda: nn.Linear(7, 5, device="meta")(torch.zeros(3, 7, device="meta"))).macs == 105
    assert (
        count_macs(lambda: nn.Linear(7, 5, dtype=torch.bfloat16)(torch.zeros(3, 7, dtype=torch.bfloat16))).macs == 105
    )


def test_free_operators_move_nothing():
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

    def call():
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(torch.ones(3), 0.1, 0, -128, 127, torch.int8)
        value = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, 0.1, 0, -128, 127, torch.int8)
        table = nn.Embedding(10, 4)(torch.tensor([1, 2]))
        value[value > 0].sort().values.cumsum(0).topk(1).values.item()
        return torch.cat([table, torch.rand(1, 4)]).softmax(-1)

    assert count_macs(call) == Cost(0, 0, {}, {})


@pytest.fixture
def library():
    with torch.library._scoped_library("featherweight_test", "DEF") as library:
        library.define("twist(Tensor value) -> Tensor")
        library.impl("twist", lambda value: value.clone(), "CompositeExplicitAutograd")
        yield library


def test_unknown_operators_are_named(library):
    def call():
        for _ in range(3):
            torch.ops.featherweight_test.twist(torch.ones(2, 2))
        torch.fft.rfft(torch.ones(4))

    counted = count_macs(call)
    assert counted.macs == 0
    assert counted.uncounted == {"featherweight_test.twist": 3, "aten._fft_r2c": 1}


def test_registered_formulas_are_used(library):
    twist = torch.ops.featherweight_test.twist
    register_flop_formula(twist)(lambda shape, out_shape=None: 2 * 100 * shape[0])
    try:
        assert count_macs(lambda: twist(torch.ones(3, 2))).by_operator == {"featherweight_test.twist": 300}
    finally:
        del flop_registry[twist]


def test_bytes_of_inputs_and_outputs():
    counted = cost(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), torch.zeros(3, 7))
    assert counted.bytes_moved == 4 * (3 * 7 + 7 * 5 + 5 + 3 * 5)
    square = torch.zeros(4, 4, dtype=torch.float64)
    assert count_macs(lambda: square @ square).bytes_moved == 8 * (16 + 16)  # one tensor twice is read once


def test_errors_pass_and_gradients_stay_off():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cost(nn.Linear(7, 5), torch.zeros(3, 6))
    seen = []
    count_macs(lambda: seen.append(nn.Linear(2, 2)(torch.zeros(1, 2)).requires_grad))
    assert seen == [False]


def test_parameters_count_each_storage_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    nn.init.ones_(model[0].weight)
    model[0].weight.data[0, 0] = 0
    model[1].weight = model[0].weight
    assert parameters(model) == (9, 8)
    model[1].weight = nn.Parameter(model[0].weight.data.t())  # tied through a transposed view
    assert parameters(model) == (9, 8)
    flat = torch.ones(18)
    model[0].weight, model[1].weight = (nn.Parameter(half.view(3, 3)) for half in flat.split(9))
    assert parameters(model) == (18, 18)


def test_parameters_include_stored_buffers_only():
    norm = nn.BatchNorm1d(4)  # weight, bias, mean, variance and one counter; bias, mean and counter are zero
    assert parameters(norm) == (17, 8)
    assert original_bytes(norm) == 4 * 17
    norm.register_buffer("codes", torch.tensor([[1, 0, -3]], dtype=torch.int8))
    norm.register_buffer("mask", torch.ones(100, dtype=torch.bool))
    norm.register_buffer("cache", torch.ones(100), persistent=False)
    assert parameters(norm) == (20, 10)
    assert original_bytes(norm.half()) == 4 * 20


def test_parameters_of_models_without_values():
    meta = nn.Linear(7, 5, device="meta")
    assert original_bytes(meta) == 4 * 40
    with pytest.raises(ModelError, match=r"weight \[5, 7\] of Linear is on the meta device"):
        parameters(meta)
    with pytest.raises(ModelError, match="weight of LazyLinear has no shape"):
        original_bytes(nn.LazyLinear(3))

"""Packed layers: the same numbers as float ones on the dequantized weight, no float copy, and PEFT takes them."""

import copy

import numpy as np
import pytest
import torch

from edgepeft.errors import ModelError
from edgepeft.quant import linear as layers
from edgepeft.quant import native
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, Packed
from edgepeft.quant.linear import QuantEmbedding, QuantLinear, TiedLinear

N, K = 40, 256
every_format = pytest.mark.parametrize("tag", FORMATS)


def packed_layer(tag, n=N, k=K, bias=True, seed=0):
    torch.manual_seed(seed)
    return QuantLinear.from_float(torch.nn.Linear(k, n, bias), tag)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(layer):
    return {name: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in layer.named_buffers()}


@pytest.mark.parametrize("library", [True, False], ids=["library", "torch"])
@pytest.mark.parametrize("n", [1, 16, 40])
@every_format
def test_weight_is_the_numpy_reference_bit_for_bit(tag, n, library, monkeypatch):
    assert native.available()
    monkeypatch.setattr(native, "available", lambda: library)
    layer = packed_layer(tag, n)
    expected = FORMATS[tag].dequantize(layer.packed())
    np.testing.assert_array_equal(layer.get_weight().numpy(), expected)
    np.testing.assert_array_equal(native.dequantize(layer.packed()), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [16, 40])
@every_format
def test_a_weight_in_bfloat16_is_the_rounded_one(tag, n, threads, monkeypatch):
    monkeypatch.setattr(native, "WEIGHTS_PER_THREAD", 16 * K)
    torch.set_num_threads(threads)
    layer = packed_layer(tag, n)
    ((_, found),) = layer.pieces(torch.bfloat16)
    assert torch.equal(found, layer.get_weight().bfloat16())


def test_the_library_refuses_what_it_does_not_know():
    assert native.available()
    packed = packed_layer("i4b32").packed()
    out = np.empty((N, K), np.float32)
    with pytest.raises(RuntimeError, match="refused"):
        native.dequantize_into("i5b32", packed.w, packed.scale, N, K, out)
    with pytest.raises(ValueError, match="contiguous"):
        native.dequantize_into("i4b32", packed.w, packed.scale, N, K, out[:, ::2])


@pytest.mark.parametrize("bias", [True, False])
@every_format
def test_forward_and_gradient_are_those_of_a_float_layer(tag, bias):
    layer = packed_layer(tag, bias=bias)
    x = torch.randn(3, 5, K, requires_grad=True)
    seed = torch.randn(3, 5, N)
    layer(x).backward(seed)
    found, x.grad = x.grad, None
    expected = torch.nn.functional.linear(x, layer.get_weight(), layer.bias)
    assert torch.equal(layer(x), expected)
    expected.backward(seed)
    assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-6)


@every_format
def test_nothing_float_is_kept_between_forward_and_backward(tag):
    layer = packed_layer(tag)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, K, requires_grad=True))
    assert not [count for count in kept if count >= N * K]
    held = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    w_shape, scale_shape = FORMATS[tag].packed_shapes(N, K)
    scale_bytes = np.dtype(FORMATS[tag].scale_dtype).itemsize * np.prod(scale_shape)
    assert held == np.prod(w_shape) + scale_bytes + 4 * N
    assert list(layer.parameters()) == []


@every_format
def test_setting_the_own_weight_changes_no_bit(tag):
    layer = packed_layer(tag)
    before = bits(layer)
    layer.set_weight(layer.get_weight())
    assert bits(layer) == before


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
@every_format
def test_no_cast_rounds_the_packed_bits(tag, cast):
    layer = packed_layer(tag)
    before, weight = bits(layer), layer.get_weight()
    model = torch.nn.Sequential(layer)
    model = model.to(torch.float16) if cast == "to" else getattr(model, cast)()
    after = bits(layer)
    assert all(after[name] == before[name] for name in ("qweight", "qscale"))
    assert torch.equal(layer.get_weight(), weight)
    x = torch.randn(2, K).to(layer.bias.dtype)
    assert layer(x).dtype == x.dtype


def test_autocast_computes_in_its_dtype():
    layer = packed_layer("i4b32")
    x = torch.randn(2, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


@every_format
def test_state_dict_carries_the_packed_bits(tag):
    layer, other = packed_layer(tag), packed_layer(tag, seed=1)
    state = layer.state_dict()
    assert set(state) == {"qweight", "qscale", "bias"}
    other.load_state_dict(state)
    assert bits(other) == bits(layer) == bits(copy.deepcopy(layer))


def test_a_weight_that_is_no_number_is_refused():
    layer = packed_layer("i4b32")
    with pytest.raises(ModelError, match="NaN"):
        layer.set_weight(torch.full((N, K), float("nan")))


def test_nf4_bits_turn_into_those_of_bitsandbytes():
    from bitsandbytes import functional

    layer = packed_layer("nf4b64")
    w, state = layers.bitsandbytes_state(layer)
    assert torch.equal(functional.dequantize_4bit(w, state), layer.get_weight())


def test_nf4_multiplies_through_bitsandbytes_as_by_itself():
    layer, results = packed_layer("nf4b64"), []
    for forward in (layers._bitsandbytes_matmul, lambda layer, x: layer(x)):  # the first is what a GPU takes
        torch.manual_seed(0)
        x = torch.randn(3, 5, K, requires_grad=True)
        y = forward(layer, x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for through, alone in zip(*results, strict=True):
        torch.testing.assert_close(through, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tag", EMBEDDING_FORMATS)
def test_embedding_gives_the_dequantized_rows(tag):
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 64, padding_idx=0)
    layer = QuantEmbedding.from_float(table, tag)
    expected = torch.from_numpy(
        EMBEDDING_FORMATS[tag].dequantize(EMBEDDING_FORMATS[tag].quantize(table.weight.detach()))
    )
    assert torch.equal(layer.get_weight(), expected)
    ids = torch.tensor([[0, 49, 3], [3, 3, 7]])
    assert torch.equal(layer(ids), expected[ids])
    scale = layer.qscale.clone()
    assert layer.bfloat16()(ids).dtype == torch.bfloat16
    assert torch.equal(layer.qscale, scale)


def embedding_in_tiles(tag, rows=50, scale=None):
    torch.manual_seed(0)
    table = torch.nn.Embedding(rows, 2 * FORMATS[tag].k_multiple, padding_idx=0)
    if scale is not None:
        table.embed_scale = torch.tensor(scale)  # as Gemma's class has it
    return QuantEmbedding.from_float(table, tag, "tiles")


@pytest.mark.parametrize("rows", [16, 37, 50])
@every_format
def test_rows_out_of_tiles_are_those_of_the_decoded_weight(tag, rows):
    layer = embedding_in_tiles(tag, rows)
    packed = Packed(tag, rows, layer.embedding_dim, layer.qweight.numpy(), layer.qscale.numpy())
    expected = torch.from_numpy(FORMATS[tag].dequantize(packed))
    assert torch.equal(layer.get_weight(), expected)
    ids = torch.tensor([[0, rows - 1, 3], [15, 15, 7]])
    assert torch.equal(layer(ids), expected[ids])
    assert layer(ids[:, :0]).shape == (2, 0, layer.embedding_dim)
    with pytest.raises(IndexError):
        layer(torch.tensor([-(-rows // 16) * 16]))


@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_an_embedding_that_scales_its_rows_does_so_packed(layout):
    table = torch.nn.Embedding(50, 64)
    plain = QuantEmbedding.from_float(table, "i4b32", layout)
    table.embed_scale = torch.tensor(7.3)
    layer, ids = QuantEmbedding.from_float(table, "i4b32", layout), torch.tensor([3, 49])
    assert torch.equal(layer.get_weight(), plain.get_weight())
    assert torch.equal(layer(ids), plain(ids) * torch.tensor(7.3))
    half = plain(ids).bfloat16() * torch.tensor(7.3).bfloat16()  # as the class rounds it
    assert torch.equal(layer.bfloat16()(ids), half)


class Tied(torch.nn.Module):
    def __init__(self, tag):
        super().__init__()
        self.word = embedding_in_tiles(tag, scale=2.0)
        self.head = TiedLinear(self.word)

    def forward(self, ids):
        return self.head(self.word(ids))


@pytest.mark.parametrize("change", ["none", "copied", "cast", "loaded", "set"])
@every_format
def test_a_tied_head_has_the_embedding_s_bits_and_none_of_its_own(tag, change):
    net, ids = Tied(tag), torch.tensor([[1, 49, 2]])
    if change == "copied":
        net = copy.deepcopy(net)
    elif change == "cast":
        net = net.to(torch.bfloat16)
    elif change == "loaded":
        other = embedding_in_tiles(tag)
        other.set_weight(torch.randn(50, other.embedding_dim))
        net.load_state_dict({f"word.{name}": t for name, t in other.state_dict().items()}, assign=True)
    elif change == "set":
        net.head.set_weight(torch.randn(50, net.head.in_features))
    assert set(net.state_dict()) == {"word.qweight", "word.qscale"}
    assert net.head.qweight is net.word.qweight
    assert torch.equal(net.head.get_weight(), net.word.get_weight())
    rows = net.word(ids)
    assert torch.equal(net(ids), rows @ net.word.get_weight().to(rows.dtype).T)
    assert (net.head.in_features, net.head.out_features, net.head.bias) == (net.word.embedding_dim, 50, None)


@pytest.mark.parametrize("size", [1, 16 * K, 17 * K, 32 * K])
@every_format
def test_a_large_weight_is_multiplied_in_pieces(tag, size, monkeypatch):
    layer = packed_layer(tag, 70)
    x, seed = torch.randn(3, 5, K, requires_grad=True), torch.randn(3, 5, 70)
    y = layer(x)
    y.backward(seed)
    whole, x.grad = x.grad, None
    monkeypatch.setattr(layers, "PIECE", size)
    pieces = [(rows, w_nk.clone()) for rows, w_nk in layer.pieces()]
    assert max(len(w_nk) for _, w_nk in pieces) == (32 if size == 32 * K else 16)
    assert torch.equal(torch.cat([w_nk for _, w_nk in pieces]), layer.get_weight())
    layer(x).backward(seed)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, whole, rtol=1e-5, atol=1e-6)


def rounded(x, block):
    """x as 8-bit integers and a scale per row and block stand for it."""
    blocks = x.detach().view(len(x), -1, block)
    top = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (127 / top)).round() * (top / 127)).view_as(x)


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("bias", [True, False])
@every_format
def test_int8_activations_multiply_as_the_op_does_and_have_the_float_gradient(tag, bias, rows):
    layer = packed_layer(tag, bias=bias)
    x, seed = torch.randn(rows, K, requires_grad=True), torch.randn(rows, N)
    (wanted,) = torch.autograd.grad(layer(x), x, seed)
    layers.multiply_int8(torch.nn.Sequential(layer))
    y = layer(x)
    expected = torch.nn.functional.linear(rounded(x, FORMATS[tag].act_block), layer.get_weight(), layer.bias)
    # NF4's 16 values are rounded to 8 bits as well: half of 1/127 of a block's absmax each.
    slack = 1e-5 if tag != "nf4b64" else 0.5 / 127 * layer.qscale.max() * 4 * K**0.5
    torch.testing.assert_close(y, expected, rtol=0, atol=float(slack))
    assert not torch.equal(y, torch.nn.functional.linear(x, layer.get_weight(), layer.bias))
    assert torch.equal(torch.autograd.grad(y, x, seed)[0], wanted)
    torch.set_num_threads(2)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer(x.view(1, rows, K))[0, -1], layer(x[-1:])[0])
    assert layer(x[:0]).shape == (0, N)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_int8_activations_that_are_no_number_stay_so():
    layer = packed_layer("i4b32")
    layers.multiply_int8(layer)
    x = torch.zeros(3, K)
    x[1, 7] = float("nan")
    assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


def test_without_the_library_activations_stay_float(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    layer = packed_layer("i4b32")
    layers.multiply_int8(layer)
    assert layer.activation == "float"


class Net(torch.nn.Module):
    def __init__(self, tag):
        super().__init__()
        self.first, self.second = packed_layer(tag, 128, 128), packed_layer(tag, 128, 128, seed=1)
        self.head = torch.nn.Linear(128, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(
    ("tag", "targets"), [*((tag, ["first", "second"]) for tag in FORMATS), ("i4b32", "all-linear")]
)
def test_peft_adapts_packed_layers_as_any_linear(tag, targets, tmp_path):
    import peft

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["head"])
    torch.manual_seed(0)
    net = Net(tag)
    model = peft.get_peft_model(copy.deepcopy(net), settings)
    assert {type(m) for m in model.modules()} >= {peft.tuners.lora.Linear, QuantLinear}
    before = bits(model)
    x, y = torch.randn(16, 128), torch.randint(0, 3, (16,))
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = torch.optim.AdamW(trained, 1e-2)
    losses = []
    model.train()
    for _ in range(12):
        steps.zero_grad()
        losses.append(torch.nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        steps.step()
    assert losses[-1] < 0.7 * losses[0]
    assert bits(model) == before
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    assert torch.equal(again(x), model.eval()(x))
    with model.disable_adapter():
        assert not torch.equal(model(x), again(x))

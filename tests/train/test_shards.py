"""A layer whose tiles lie in several processes: the shares make the whole, and it computes the same."""

import pytest
import torch

from edgepeft import ranks
from edgepeft.quant.formats import FORMATS
from edgepeft.quant.linear import QuantEmbedding, QuantLinear, TiedLinear
from edgepeft.train import shards

N, K = 88, 256  # 6 tiles


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world", lambda: world)
    monkeypatch.setattr(ranks, "wait", lambda: None)
    monkeypatch.setattr(shards.distributed, "new_group", lambda: None)


def sharded(world: int, monkeypatch: pytest.MonkeyPatch, layer: QuantLinear) -> list[QuantLinear]:
    """Return what each of `world` processes makes of a layer; together they gather."""
    found = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        own = QuantLinear(K, N, format=layer.format)
        own.load_state_dict(layer.state_dict())
        shards.shard(torch.nn.Sequential(own))
        found.append(own)

    def gather(whole: torch.Tensor, share: torch.Tensor, group: None) -> None:
        name = "qweight" if share.shape[-1] >= 256 else "qscale"  # bytes
        whole.copy_(torch.cat([getattr(own, name).view(torch.uint8) for own in found]))

    monkeypatch.setattr(shards.distributed, "all_gather_into_tensor", gather)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("tag", FORMATS)
def test_a_shared_layer_holds_its_share_and_computes_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, tag: str, world: int
) -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_float(torch.nn.Linear(K, N), tag)
    x, seed = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    for own in sharded(world, monkeypatch, layer):
        assert len(own.qweight) == len(own.qscale) == -(-6 // world)
        assert torch.equal(own.get_weight(), layer.get_weight())
        for activation in ("float", "int8"):
            own.activation = layer.activation = activation
            assert torch.equal(own(x), layer(x))
            both = [torch.autograd.grad(module(x), x, seed)[0] for module in (own, layer)]
            assert torch.equal(*both)


def test_embeddings_and_what_is_alone_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    word = QuantEmbedding.from_float(torch.nn.Embedding(64, K), "i4b32", "tiles")
    model = torch.nn.ModuleList([word, TiedLinear(word), QuantLinear.from_float(torch.nn.Linear(K, N), "i4b32")])
    for world, left in ((1, 6), (2, 3)):
        as_process(monkeypatch, 0, world)
        shards.shard(model)
        assert [len(layer.qweight) for layer in model] == [4, 4, left]

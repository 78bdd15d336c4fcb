"""A packed Linear is the Linear."""

import pytest
import torch
from torch import nn

from continuar.sampling.fast import weights as packed
from continuar.sampling.fast.weights import LARGE, PackedLinear, pack_linears


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_equals_linear(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(130, 257, bias)
    assert 300 * linear.weight.numel() > LARGE
    x = torch.randn(rows, 1, 130)[:, 0]
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))
        torch.testing.assert_close(PackedLinear(linear)(x.view(1, rows, 130)), linear(x)[None])
        monkeypatch.setattr(packed, "_operators", lambda: None)
        assert torch.equal(PackedLinear(linear)(x), linear(x))


def test_pack_linears_reaches_every_linear() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "b": nn.Linear(1, 1)})
    pack_linears(module)
    kinds = [type(m) for m in module.modules()]
    assert kinds.count(PackedLinear) == 3
    assert nn.Linear not in kinds


def test_a_build_without_the_operators_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    packed._operators.cache_clear()
    try:
        layers = [PackedLinear(nn.Linear(3, 2)) for _ in range(2)]
    finally:
        packed._operators.cache_clear()
    assert [record.message.split(" (")[0] for record in caplog.records] == ["weights are not packed on this CPU"]
    x = torch.ones(1, 3)
    assert all(torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) for layer in layers)

"""A packed Linear equals the Linear, and notices when its weight changes."""

import pytest
import torch
from torch import nn

from continuar.sampling.fast import weights
from continuar.sampling.fast.weights import MIN_PACKED_WORK, PackedLinear, pack_linears


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_equals_linear(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(130, 257, bias)
    assert 300 * linear.weight.numel() > MIN_PACKED_WORK
    x = torch.randn(rows, 1, 130)[:, 0]
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))
        torch.testing.assert_close(PackedLinear(linear)(x.view(1, rows, 130)), linear(x)[None])
        monkeypatch.setattr(weights, "_operators", lambda: None)
        assert torch.equal(PackedLinear(linear)(x), linear(x))


def test_packed_linear_notices_every_change_of_its_weight() -> None:
    linear = nn.Linear(130, 257)
    packed = PackedLinear(linear)
    assert packed.is_current()
    linear.weight.data[200, 100] += 1e-6
    assert not packed.is_current()
    assert PackedLinear(linear).is_current()


def test_pack_linears_reaches_every_linear() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "b": nn.Linear(1, 1)})
    pack_linears(module)
    kinds = [type(m) for m in module.modules()]
    assert kinds.count(PackedLinear) == 3
    assert nn.Linear not in kinds


def test_a_build_without_the_operators_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    weights._operators.cache_clear()
    try:
        layers = [PackedLinear(nn.Linear(3, 2)) for _ in range(2)]
    finally:
        weights._operators.cache_clear()
    assert [record.message.split(" (")[0] for record in caplog.records] == ["weights are not packed on this CPU"]
    x = torch.ones(1, 3)
    assert all(torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) for layer in layers)

"""The fused operations equal their plain twins: on a GPU, or on a CPU with Triton and TRITON_INTERPRET=1, `make test-kernels`."""

import itertools
import os

import pytest
import torch

from continuar.heads.diffusion import DenoisingMLP
from continuar.models.transformer import Block
from continuar.noise import KeyedNoise, Purpose
from continuar.sampling.fast.kernels import Kernels, Step, largest_difference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)
PLAIN = Kernels()
FUSED = pytest.importorskip("continuar.sampling.fast.triton_kernels").TritonKernels()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("copies", "rows", "width"), [(1, 1, 24), (1, 3, 64), (2, 1, 40), (2, 5, 130)])
def test_gate_norm_modulate(copies: int, rows: int, width: int, low: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low and DEVICE == "cuda" else torch.float32
    shift, scale, gate = torch.randn(copies, rows, 5, width, device=DEVICE, dtype=dtype).unbind(-2)[1:4]
    y = torch.randn(copies, rows, width, device=DEVICE, dtype=dtype)
    affine = torch.randn(width, device=DEVICE, dtype=dtype), torch.randn(width, device=DEVICE, dtype=dtype)
    for gated, norm, shared in itertools.product(((gate, y), None), (affine, None), (True, False)):
        if gated is None and not shared and copies > 1:
            continue  # the stream parts at the first gate
        h = torch.randn(1 if shared else copies, rows, width, device=DEVICE)
        for out in {dtype, torch.float32}:
            plain, fused = (k.gate_norm_modulate(h, gated, norm, shift, scale, out) for k in (PLAIN, FUSED))
            torch.testing.assert_close(fused[0], plain[0], rtol=2e-2 if low else 1e-5, atol=2e-2 if low else 1e-5)
            torch.testing.assert_close(fused[1], plain[1], rtol=3e-2 if low else 1e-5, atol=6e-2 if low else 1e-5)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("width", [24, 130])
def test_add_norm(width: int, low: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low and DEVICE == "cuda" else torch.float32
    norm = torch.nn.LayerNorm(width, eps=1e-6, device=DEVICE, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    h, y = torch.randn(2, 3, 9, width, device=DEVICE, dtype=dtype)
    for given, added in ((h, y), (h, None), (h[:, 2:7], y[:, :5])):
        for plain, fused in zip(PLAIN.add_norm(given, added, norm), FUSED.add_norm(given, added, norm), strict=True):
            torch.testing.assert_close(fused, plain, rtol=2e-2 if low else 1e-5, atol=2e-2 if low else 1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_mlp(low: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low and DEVICE == "cuda" else torch.float32
    mlp = Block(48, 4, 0.0, 0.0).mlp.to(DEVICE, dtype).requires_grad_(False)
    n = torch.randn(2, 5, 48, device=DEVICE, dtype=dtype)
    torch.testing.assert_close(FUSED.mlp(mlp, n), PLAIN.mlp(mlp, n), rtol=2e-2 if low else 0.0, atol=1e-2 if low else 0.0)


@pytest.mark.parametrize("copies", [1, 2])
def test_update(copies: int) -> None:
    torch.manual_seed(0)
    x, noise, out = (torch.randn(*shape, device=DEVICE) for shape in ((7, 6), (7, 6), (copies, 7, 12)))
    arguments = x, out, Step(torch.tensor(1.7, device=DEVICE), noise, 0.9, -0.3, 0.2)
    torch.testing.assert_close(FUSED.update(*arguments), PLAIN.update(*arguments))


@pytest.mark.parametrize("dim", [1, 6, 16])
@pytest.mark.parametrize("purpose", list(Purpose))
def test_normals(dim: int, purpose: Purpose) -> None:
    seeds, positions = torch.tensor([1, -5, 2**62 + 7], device=DEVICE), torch.tensor([0, 3, 255], device=DEVICE)
    for round, steps in ((0, 1), (3, 5)):
        noise = KeyedNoise(seeds, positions, round)
        plain, fused = (k.normals(noise, purpose, steps, dim) for k in (PLAIN, FUSED))
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("copies", "rows", "dim", "width", "depth"), [(1, 1, 5, 40, 2), (2, 3, 16, 300, 3), (2, 8, 6, 24, 1)])
def test_small_step(copies: int, rows: int, dim: int, width: int, depth: int, low: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low and DEVICE == "cuda" else torch.float32
    exact = DenoisingMLP(dim, 8, width, depth).requires_grad_(False).to(DEVICE)
    for parameter in exact.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    net = DenoisingMLP(dim, 8, width, depth).requires_grad_(False).to(DEVICE, dtype)
    net.load_state_dict(exact.state_dict())
    x, noise = torch.randn(rows, dim, device=DEVICE), torch.randn(rows, dim, device=DEVICE)
    modulation = 0.3 * torch.randn(copies, rows, (3 * depth + 2) * width, device=DEVICE, dtype=dtype)
    step = Step(torch.tensor(1.7, device=DEVICE), noise, 0.9, -0.3, 0.2)
    arguments = x, exact.input(x).unsqueeze(0), modulation, step
    plain, fused = (k.small_step(net, exact, *arguments) for k in (PLAIN, FUSED))
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2 if low else 1e-5, atol=3e-2 if low else 1e-5)


def test_the_check_before_use_passes_and_finds_a_fault() -> None:
    assert largest_difference(FUSED, torch.device(DEVICE)) < 1e-4
    faulty = type("Faulty", (Kernels,), {"update": lambda self, x, *_: x})()
    assert largest_difference(faulty, torch.device(DEVICE)) > 1e-3

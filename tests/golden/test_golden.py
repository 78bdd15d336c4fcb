"""Golden parity, and the checker checked: a changed formula must not pass."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from continuar.diffusion import gaussian as process
from continuar.orders import MAROrder
from continuar.sampling import generate as eager
from tests.checkpoints import ldm_reference

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import check  # noqa: E402

FILES = sorted(HERE.glob("*.safetensors"))
# 9 MB each: they lie beside the repository rather than in it; tests/checkpoints/test_ldm.py needs none of them.
SHARED = Path(os.environ.get("CONTINUAR_SHARED", HERE.parents[2] / "shared")) / "golden"
AUTOENCODERS = ("vae_kl16_mar", "vae_kl16_ldm", "vae_kl8_ldm", "vae_vq16_ldm")


def worst(name: str) -> float:
    return max(value for _, value in check.errors_of(HERE / name))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_vectors_are_reproduced(path: Path) -> None:
    errors = list(check.errors_of(path))
    assert len(errors) >= 9
    assert {name: value for name, value in errors if not value < 1e-5} == {}


def shared(name: str) -> Path:
    path = SHARED / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_golden_autoencoders_are_reproduced(name: str) -> None:
    errors = dict(check.errors_of(shared(name)))
    assert len(errors) >= 4
    assert {name: value for name, value in errors.items() if not value < 5e-5} == {}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_references_of_the_tests_agree_with_golden_autoencoders(name: str) -> None:
    _, g = check.read(shared(name))
    state = check.weights(g)
    latents = ldm_reference.encode(state, g["image"])
    assert check.error(latents, g["moments" if "moments" in g else "pre_quant"]) < 5e-5
    codes = ldm_reference.quantise(state, latents)[1] if "indices" in g else g["mean"]
    assert check.error(ldm_reference.decode(state, codes), g["decoded"]) < 5e-5


def test_checker_notices_an_ignored_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared("vae_kl16_ldm")
    real = check.weights
    silent = "weights.decoder.up.4.attn.0.proj_out."
    monkeypatch.setattr(check, "weights", lambda g: real({k: v * (not k.startswith(silent)) for k, v in g.items()}))
    errors = dict(check.errors_of(path))
    assert errors["moments"] < check.TOLERANCE < errors["decoded"]


def test_checker_says_which_quantity_is_wrong_and_exits_1() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import check\n"
        "import continuar.sampling.generate as plan\n"
        "plan.guidance_at_step = lambda scale, schedule, remaining, total: scale\n"
        "sys.exit(check.main(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(HERE), str(HERE / "mar_kl16.safetensors")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    failed = [line.split()[-1] for line in done.stdout.splitlines() if "FAIL" in line]
    assert failed == ["sample1.out"]


@pytest.mark.parametrize("content", [b"", b"not a safetensors file"])
def test_checker_exits_2_on_a_file_it_cannot_read(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert check.main([str(path)]) == 2
    assert "cannot be checked" in capsys.readouterr().err


def test_checker_notices_an_ignored_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.ddpm
    monkeypatch.setattr(check, "ddpm", lambda *a, temperature, **k: real(*a, temperature=torch.tensor(1.0), **k))
    assert worst("diffusion_steps.safetensors") > check.TOLERANCE
    assert worst("diffusion.safetensors") > check.TOLERANCE


def test_checker_notices_the_variance_from_the_wrong_half(monkeypatch: pytest.MonkeyPatch) -> None:
    from continuar.heads.diffusion import DiffusionHead

    real = DiffusionHead.denoiser

    def wrong(self, z, guidance):
        right = real(self, z, guidance)
        if guidance is None:
            return right
        unconditional = real(self, guidance.z_uncond, None)
        return lambda x, t: (right(x, t)[0], unconditional(x, t)[1])

    monkeypatch.setattr(DiffusionHead, "denoiser", wrong)
    assert worst("diffusion_steps.safetensors") > check.TOLERANCE


def test_checker_notices_a_wrong_group_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    def float32_floor(self, steps: int, unknown: int) -> tuple[int, ...]:
        half_pi = torch.tensor(math.pi / 2)
        left = [unknown]
        for s in range(steps):
            target = int((unknown * torch.cos(half_pi * (s + 1) / steps)).floor())
            left.append(0 if s == steps - 1 else max(1, min(left[-1] - 1, target)))
        return tuple(a - b for a, b in itertools.pairwise(left))

    monkeypatch.setattr(MAROrder, "group_sizes", float32_floor)
    assert worst("diffusion_steps.safetensors") > check.TOLERANCE


def test_checker_notices_a_vb_in_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    real = process.variational_bound
    monkeypatch.setattr(process, "variational_bound", lambda *a: real(*a) * math.log(2))
    assert worst("diffusion_steps.safetensors") > check.TOLERANCE


def test_checker_notices_rows_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    real = eager.generate
    monkeypatch.setattr(check, "generate", lambda *a, order_BN, **k: real(*a, order_BN=order_BN.flip(1), **k))
    assert worst("mar_kl16.safetensors") > check.TOLERANCE

"""Checks continuar's arithmetic against golden vectors made by independent implementations.

    python tests/golden/check.py FILE...

Reads any file of the formats `mar_*` (a MAR in the official key layout), `diffusion`, `diffusion_steps` and `vae_*` (an
autoencoder in LDM's key layout), of any sizes. Prints the error of each quantity, max|ours - golden| / max|golden|, and exits 1 if
one is over 1e-4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from autoencoders import check_autoencoder
from safetensors import SafetensorError, safe_open
from torch import Tensor

from continuar.checkpoints.mar import config_from_official, head_from_official, to_continuar
from continuar.diffusion.gaussian import (
    Coefficients,
    Schedule,
    add_noise,
    coefficients,
    log_variance,
    posterior_mean,
    predict_x0,
    sampling_schedule,
    training_schedule,
    uniform_t,
)
from continuar.diffusion.samplers import ddim, ddpm
from continuar.diffusion.time_grids import strided
from continuar.heads import DiffusionHead, DiffusionOptions
from continuar.models.autoregressive import Model
from continuar.noise import Purpose
from continuar.orders import MAROrder, View
from continuar.sampling.generate import Guidance, SamplingInput, SamplingOptions, generate
from continuar.tokenizers import LatentConfig

TOLERANCE = 1e-4
Errors = Iterator[tuple[str, float]]


def error(ours: Tensor, golden: Tensor) -> float:
    """max|ours - golden| / max|golden|; infinite for another shape or a value that is not finite."""
    if ours.shape != golden.shape or not torch.isfinite(ours.double()).all():
        return float("inf")
    scale = golden.double().abs().max().item()
    return (ours.double() - golden.double()).abs().max().item() / (scale or 1.0)


class Replay:
    """Row noise that hands out recorded draws: x_T, then one per diffusion step, most noisy first."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = draws

    def normal(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        if purpose is Purpose.INITIAL:
            return self.draws[0]
        # The last of the S step draws belongs to index 0, where no noise is added.
        return self.draws[len(self.draws) - 1 - step]

    def uniform(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        raise AssertionError("a diffusion head draws no uniforms")


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors) of a golden file, weights in float32."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    return meta, {k: v.float() if v.dtype is torch.bfloat16 else v for k, v in tensors.items()}


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}


def load_head(meta: dict, tensors: dict[str, Tensor]) -> DiffusionHead:
    size = meta["config"]
    head = DiffusionHead(size["in_channels"], size["z_channels"], size["model_channels"], size["num_res_blocks"])
    head.load_state_dict({f"net.{k}": v for k, v in head_from_official(weights(tensors)).items()})
    return head.eval()


def check_diffusion(meta: dict, g: dict[str, Tensor]) -> Errors:
    """The network, the schedules and whole chains (file `diffusion`)."""
    head = load_head(meta, g)
    x, t, c = g["x"], g["t"], g["c"]
    yield "net_out", error(torch.cat(head.net(x, t, c), -1), g["net_out"])
    half = len(x) // 2
    eps, v = head.net(torch.cat((x[:half], x[:half])), torch.cat((t[:half], t[:half])), c)
    guided = eps[half:] + 2.0 * (eps[:half] - eps[half:])
    yield "net_out_cfg2", error(torch.cat((torch.cat((guided, guided)), v), -1), g["net_out_cfg2"])
    for name, golden in g.items():
        kind, _, count = name.partition("_")
        if kind in ("steps", "betas"):
            number = int(count.removeprefix("ddim"))
            if number == len(training_schedule()):
                schedule = training_schedule()
            else:
                schedule = training_schedule().respace((strided if "ddim" in count else uniform_t)(number))
            ours = torch.tensor(schedule.timesteps) if kind == "steps" else torch.from_numpy(schedule.betas)
            yield name, error(ours, golden)
    for name, golden in g.items():
        if name.startswith("ddpm") and not name.endswith("_noise"):
            steps, temperature = name.removeprefix("ddpm").split("_temp")
            ours = chain(head, sampling_schedule(int(steps)), x, c, float(temperature), g[f"{name}_noise"])
            yield name, error(ours, golden)
        elif name.startswith("ddim"):
            schedule = training_schedule().respace(strided(int(name.removeprefix("ddim").split("_")[0])))
            denoise = head.denoiser(c, None)
            ours = ddim(denoise, x, coefficients(schedule), temperature=torch.tensor(1.0), step_noise=lambda i: x)
            yield name, error(ours, golden)


def chain(head: DiffusionHead, schedule: Schedule, x: Tensor, z: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """DDPM over the first len(noise) steps of ``schedule``; noise[0] is that of the most noisy one."""
    kept = coefficients(schedule)
    short = Coefficients(**{k: v[: len(noise)] for k, v in vars(kept).items()})
    return ddpm(
        head.denoiser(z, None),
        x,
        short,
        temperature=torch.tensor(temperature),
        step_noise=lambda i: noise[len(noise) - 1 - i],
    )


def check_steps(meta: dict, g: dict[str, Tensor]) -> Errors:
    """One step at a time, short chains, the loss with its gradients, and group sizes (file `diffusion_steps`)."""
    head = load_head(meta, g)
    for name in sorted({".".join(k.split(".")[:2]) for k in g if k.startswith("step")}):
        total, index = name.removeprefix("step").split(".")
        for quantity, value in single_step(head, g, name, int(total), int(index)):
            yield f"{name}.{quantity}", value
    for name in sorted({k.split(".")[0] for k in g if k.startswith("chain")}):
        schedule = sampling_schedule(int(name.removeprefix("chain")))
        noise = g[f"{name}.noise"]
        assert len(noise) == int(g[f"{name}.start"]) + 1
        for key, golden in g.items():
            if key.startswith(f"{name}.out_temp"):
                ours = chain(head, schedule, g[f"{name}.x"], g["c"], float(key.rsplit("temp", 1)[1]), noise)
                yield key, error(ours, golden)
    yield from check_loss(head, g)
    for name, golden in g.items():
        if name.startswith("groups."):
            tokens, steps = map(int, name.removeprefix("groups.").split("_"))
            yield name, error(torch.tensor(MAROrder(tokens).group_sizes(steps, tokens)), golden)


def single_step(head: DiffusionHead, g: dict[str, Tensor], name: str, total: int, i: int) -> Errors:
    k = coefficients(sampling_schedule(total))
    x, noise, z = g[f"{name}.x"], g[f"{name}.noise"], g["c"]
    eps, v = head.denoiser(z, None)(x, k.timesteps[i])
    x0 = predict_x0(k, x, i, eps)
    yield "pred_x0", error(x0, g[f"{name}.pred_x0"])
    yield "mean", error(posterior_mean(k, x0, x, i), g[f"{name}.mean"])
    yield "log_variance", error(log_variance(k, v, i), g[f"{name}.log_variance"])
    # One step of the real samplers: a process of which only step i is left.
    last = Coefficients(**{n: value[i : i + 1] for n, value in vars(k).items()})

    def step(temperature: float, guidance: Callable | None = None) -> Tensor:
        denoise = guidance or head.denoiser(z, None)
        mean = ddpm(denoise, x, last, temperature=torch.tensor(temperature), step_noise=lambda _: noise)
        if i == 0:
            return mean
        # The samplers add no noise at their own index 0; put the step second to see its noise.
        two = Coefficients(**{n: torch.cat((value[i : i + 1], value[i : i + 1])) for n, value in vars(k).items()})
        seen: list[Tensor] = []

        def spy(x_now: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(x_now)
            return denoise(x_now, t)

        ddpm(spy, x, two, temperature=torch.tensor(temperature), step_noise=lambda _: noise)
        return seen[1]

    yield "sample_temp1.0", error(step(1.0), g[f"{name}.sample_temp1.0"])
    yield "sample_temp0.8", error(step(0.8), g[f"{name}.sample_temp0.8"])
    guided = head.denoiser(z, Guidance(g["c_uncond"], torch.tensor(2.5)))
    yield "guided2.5_temp0.9", error(step(0.9, guided), g[f"{name}.guided2.5_temp0.9"])
    ours = ddim(head.denoiser(z, None), x, last, temperature=torch.tensor(1.0), step_noise=lambda _: noise)
    yield "ddim_eta0", error(ours, g[f"{name}.ddim_eta0"])


def check_loss(head: DiffusionHead, g: dict[str, Tensor]) -> Errors:
    z = g["c"].clone().requires_grad_()
    t, noise, x0 = g["loss.t"], g["loss.noise"], g["x0"]
    yield "loss.x_t", error(add_noise(coefficients(training_schedule()), x0, t, noise), g["loss.x_t"])
    terms = head.loss_terms(z, x0, t, noise)
    for name in ("mse", "vb", "total"):
        yield f"loss.{name}", error(getattr(terms, name).detach(), g[f"loss.{name}"])
    terms.total.mean().backward()
    for name, value in (
        ("grad_c", z.grad),
        ("grad_final_weight", head.net.output.weight.grad),
        ("grad_input_proj_weight", head.net.input.weight.grad),
    ):
        assert value is not None
        yield f"loss.{name}", error(value, g[f"loss.{name}"])


def load_mar(meta: dict, g: dict[str, Tensor]) -> tuple[Model, LatentConfig]:
    size = meta["config"]
    tokenizer = LatentConfig(
        "latent", "golden", size["img_size"], size["vae_stride"], size["vae_embed_dim"], size["patch_size"], 1.0
    )
    state = weights(g)
    config = config_from_official(state, heads=size["encoder_num_heads"], decoder_heads=size["decoder_num_heads"])
    assert config.classes == size["class_num"]
    model = config.build().eval()
    model.load_state_dict(to_continuar(state, config))
    return model, tokenizer


def check_mar(meta: dict, g: dict[str, Tensor]) -> Errors:
    """Encoder, z, loss terms and whole generations of a MAR (files `mar_*`)."""
    model, tokenizer_config = load_mar(meta, g)
    tokenizer = tokenizer_config.build()
    tokens = tokenizer.tokenize(g["latents"])
    yield "tokens", error(tokens, g["tokens"])

    # Teacher-forced in evaluation mode, z wanted everywhere: known positions ascending, then masked ones ascending.
    mask = g["mask"].bool()
    order = mask.to(torch.int8).argsort(dim=1, stable=True)
    known = int((~mask[0]).sum())
    view = View(order, known)
    cond, x = model.condition(g["labels"]), model.token_embedding(tokens)
    backbone = model.backbone
    encoded = backbone.encode(x.gather(1, view.known_BK.unsqueeze(-1).expand(-1, -1, x.shape[-1])), view.known_BK, cond)
    yield "encoder_out", error(encoded, g["encoder_out"])
    z = backbone.decode(encoded, view, view.order_BN.shape[1])
    z = torch.empty_like(z).scatter_(1, order.unsqueeze(-1).expand_as(z), z)
    yield "z", error(z, g["z"])
    queried = view.query_BQ.unsqueeze(-1).expand(-1, -1, z.shape[-1])
    yield "z of the training forward", error(backbone(x, cond, view), g["z"].gather(1, queried))

    terms = model.head.loss_terms(z.flatten(0, 1), tokens.flatten(0, 1), g["t"], g["noise"])
    for name, value in (("mse", terms.mse), ("vb", terms.vb), ("loss", terms.total)):
        yield f"term_{name}", error(value, g[f"term_{name}"])
    yield "loss", error((terms.total * mask.flatten()).sum()[None] / mask.sum(), g["loss"])

    for number, sampling in enumerate(meta["sampling"]):
        out = replay_generation(model, g, f"sample{number}", sampling)
        yield f"sample{number}.out", error(tokenizer.latents(out), g[f"sample{number}.out"])


def replay_generation(model: Model, g: dict[str, Tensor], name: str, sampling: dict) -> Tensor:
    """A whole generation with the recorded orders and draws."""
    draws = [g[f"{name}.draw{i:04d}"] for i in range(sampling["draws"])]
    options = SamplingOptions(
        steps=sampling["num_iter"],
        guidance_scale=sampling["cfg"],
        guidance_schedule=sampling["cfg_schedule"],
        temperature=sampling["temperature"],
        head=DiffusionOptions(diffusion_steps=int(sampling["num_sampling_steps"])),
    )
    per_step = int(sampling["num_sampling_steps"]) + 1

    def noise_of(seeds: Tensor, positions: Tensor) -> Replay:
        # With guidance the recorded step draws have a second half, which never reaches the output.
        mine = [draws.pop(0)[: len(positions)] for _ in range(per_step)]
        return Replay(mine)

    # Golden orders run from the end of the row.
    order = g[f"{name}.orders"].flip(1)
    batch, positions = order.shape
    conditional = sampling.get("conditional", True)
    labels = g["labels"] if conditional else torch.full((batch,), model.null_label)
    start = SamplingInput(
        labels,
        torch.zeros(batch, dtype=torch.int64),
        torch.zeros(batch, positions, model.config.tokens.dim),
        torch.zeros(batch, positions, dtype=torch.bool),
    )
    out = generate(model, start, options, order_BN=order, noise_of=noise_of)
    assert not draws, f"{len(draws)} recorded draws were not used"
    return out


def check_vae(meta: dict, g: dict[str, Tensor]) -> Errors:
    """Latents, ids and images of an autoencoder (files `vae_*`)."""
    yield from check_autoencoder(g, weights(g), error)


def errors_of(path: Path) -> Errors:
    """Every quantity of a golden file with its error; raises ValueError for another kind of file."""
    meta, tensors = read(path)
    if "encoder_out" in tensors:
        check = check_mar
    elif "net_out" in tensors:
        check = check_diffusion
    elif "loss.t" in tensors:
        check = check_steps
    elif "weights.encoder.conv_in.weight" in tensors:
        check = check_vae
    else:
        raise ValueError(f"{path}: not a golden file of a known format (mar, diffusion, diffusion_steps, vae)")
    with torch.no_grad() if check is not check_steps else torch.enable_grad():
        yield from check(meta, tensors)


def main(arguments: list[str]) -> int:
    """Prints a table per file; 0 if all is within tolerance, 1 if not, 2 for a file that cannot be read."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    worst_of_all = 0.0
    for argument in arguments:
        print(f"\n{argument}")
        try:
            for name, value in errors_of(Path(argument)):
                print(f"  {'ok  ' if value <= TOLERANCE else 'FAIL'} {value:9.2e}  {name}")
                worst_of_all = max(worst_of_all, value)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
            print(f"  cannot be checked: {type(problem).__name__}: {problem}", file=sys.stderr)
            return 2
    print(f"\nlargest error {worst_of_all:.2e}, allowed {TOLERANCE:.0e}")
    return int(not worst_of_all <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Multivariate time series: random-order autoregression with a diffusion head, checked against the exact law of the data.

    python examples/time_series.py [--out out/time_series.png] [--steps 1200]

The series has three channels and a hidden regime that switches at random: channels 1 and 2 rotate slowly with little noise, or fast
with much noise; channel 3 follows channel 1, or its negative. The model does not see the regime, so the next value has a
distribution with two modes. A token is the three values of one moment:

1. Draw series from the process as tokens [B, N, 3]. No image, tokenizer or condition is needed.
2. Train a causal model in random order. It learns every conditional p(x_t | any other moments), not only that of the future.
3. Generate series from nothing, and fill a gap in a known series several times.
4. Compare with data: standard deviation and autocorrelation of each channel, and the exact log-likelihood per step, which a filter
   over the hidden regime gives. It would be lower than that of data for too noisy series, and higher for too smooth ones.

A few minutes of one core's time on a CPU. Needs matplotlib (pip install 'continuar[demo]').
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from continuar import Model, ModelConfig, SamplingOptions
from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.models import CausalConfig
from continuar.orders import RandomOrderConfig
from continuar.sampling.generate import SamplingInput, generate
from continuar.tokenizers import TokenSpec

LENGTH = 32
CHANNELS = 3
STAY = 15 / 16
"""The probability that the regime of the next moment is that of this one."""


def _rotation(period: float, radius: float, pull: float) -> Tensor:
    """The matrix of one regime: channels 1 and 2 rotate once in ``period`` steps, channel 3 is pulled by channel 1."""
    c, s = radius * math.cos(2 * math.pi / period), radius * math.sin(2 * math.pi / period)
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [pull, 0.0, 0.6]])


MATRICES = torch.stack((_rotation(24, 0.98, 0.4), _rotation(6, 0.9, -0.4)))
NOISE = torch.tensor([[0.12, 0.12, 0.1], [0.4, 0.4, 0.3]])
"""Standard deviation of the noise by regime and channel."""


def draw_series(batch: int, length: int = LENGTH, burn_in: int = 150) -> Tensor:
    """Series [B, N, 3] of the stationary process x_t = A_s x_(t-1) + noise_s, with s the hidden regime."""
    x, regime = torch.zeros(batch, CHANNELS), torch.randint(2, (batch,))
    moments = []
    for _ in range(burn_in + length):
        regime = torch.where(torch.rand(batch) < STAY, regime, 1 - regime)
        x = torch.einsum("bij,bj->bi", MATRICES[regime], x) + NOISE[regime] * torch.randn(batch, CHANNELS)
        moments.append(x)
    return torch.stack(moments[burn_in:], 1)


def log_likelihood(x_BND: Tensor) -> Tensor:
    """log p(x_2 .. x_N | x_1) / (N - 1) of each series [B] under the true process, the regime summed out.

    The filter: P(s_t, x_1..x_t) = p(x_t | x_(t-1), s_t) sum_s P(s_t | s) P(s, x_1..x_(t-1)).
    """
    past, now = x_BND[:, :-1], x_BND[:, 1:]
    mean = torch.einsum("sij,btj->btsi", MATRICES, past)
    density = torch.distributions.Normal(mean, NOISE).log_prob(now.unsqueeze(2)).sum(-1)  # [B, N-1, 2]
    switch = torch.tensor([[STAY, 1 - STAY], [1 - STAY, STAY]]).log()
    state = torch.full((len(x_BND), 2), math.log(0.5))
    for t in range(now.shape[1]):
        state = (state.unsqueeze(2) + switch).logsumexp(1) + density[:, t]
    return state.logsumexp(1) / now.shape[1]


def autocorrelation(x_BND: Tensor, lags: int) -> Tensor:
    """Autocorrelation of each channel at lags 0..lags-1: [lags, 3]."""
    x = x_BND - x_BND.mean((0, 1))
    products = [(x[:, : x.shape[1] - lag] * x[:, lag:]).mean((0, 1)) for lag in range(lags)]
    return torch.stack(products) / products[0]


def build(length: int = LENGTH, width: int = 64) -> Model:
    """A causal model over N tokens in random order, without a condition."""
    return ModelConfig(
        TokenSpec((1, length), CHANNELS),
        order=RandomOrderConfig(),
        backbone=CausalConfig(width=width, depth=4, heads=4, positions="rotary", attention_dropout=0.0, dropout=0.0),
        head=DiffusionHeadConfig(width=width, depth=3, diffusion_batch_mul=2, prediction="v_prediction"),
    ).build()


def train(model: Model, steps: int, std: Tensor, batch: int = 64) -> Model:
    """Trains on new series at every step. Tokens are divided by ``std``: the head expects about unit standard deviation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    length = model.config.tokens.seq_len
    for step in range(steps):
        tokens = draw_series(batch, length) / std
        loss = model.loss(tokens, None, model.training_view(batch, tokens.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def sample(model: Model, count: int, std: Tensor, diffusion_steps: int = 50) -> Tensor:
    """Series [count, N, 3] from nothing, one moment after another in a random order for each seed."""
    options = SamplingOptions(head=DiffusionOptions(diffusion_steps=diffusion_steps))
    return generate(model, SamplingInput.blank(model.config.tokens, torch.arange(count)), options) * std


def fill(model: Model, series_ND: Tensor, gap: slice, count: int, std: Tensor, diffusion_steps: int = 50) -> Tensor:
    """Versions [count, N, 3] of a series that differ within the gap."""
    known = torch.ones(count, len(series_ND), dtype=torch.bool)
    known[:, gap] = False
    start = SamplingInput(None, torch.arange(count), series_ND.expand(count, -1, -1) / std, known)
    return generate(model, start, SamplingOptions(head=DiffusionOptions(diffusion_steps=diffusion_steps))) * std


def report(data: Tensor, again: Tensor, drawn: Tensor) -> None:
    """Prints statistics of the samples beside those of two draws of the data."""
    names = ("data", "data again", "samples")
    lags = data.shape[1] // 2
    reference = autocorrelation(data, lags)
    for name, x in zip(names, (data, again, drawn), strict=True):
        std = ", ".join(f"{v:.3f}" for v in x.std((0, 1)).tolist())
        worst = (autocorrelation(x, lags) - reference).abs().max().item()
        print(f"{name:>10}: std {std}; autocorrelation off by {worst:.3f}; log-likelihood per step {log_likelihood(x).mean():.3f}")


def plot(data: Tensor, drawn: Tensor, fillings: Tensor, truth: Tensor, gap: slice, out: Path) -> None:
    """Plots series, spectra, autocorrelations, the distribution of the likelihood, and the gap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 4, figsize=(13, 7.5))
    for row, (name, x) in enumerate((("data", data), ("samples", drawn))):
        for column in range(3):
            axis = axes[row, column]
            axis.plot(x[column], linewidth=1.2)
            axis.set_title(f"{name} {column + 1}", fontsize=9)
            axis.set_ylim(-4, 4)
    colors = ("#444444", "#1f77b4")
    lags = data.shape[1] // 2
    for column in range(2):
        axis = axes[2, column]
        for x, color, name in ((data, colors[0], "data"), (drawn, colors[1], "samples")):
            axis.plot(autocorrelation(x, lags)[:, 2 * column], color=color, label=name)
        axis.set_title(f"autocorrelation, channel {2 * column + 1}", fontsize=9)
        axis.legend(fontsize=7)
    for x, color, name in ((data, colors[0], "data"), (drawn, colors[1], "samples")):
        power = torch.fft.rfft(x[..., 0] * torch.hann_window(x.shape[1])).abs().square().mean(0)
        axes[2, 2].semilogy(torch.fft.rfftfreq(x.shape[1]), power, color=color, label=name)
        axes[0, 3].hist(log_likelihood(x).numpy(), bins=40, density=True, histtype="step", color=color, label=name)
        axes[1, 3].hist(x[..., 2].flatten().numpy(), bins=60, density=True, histtype="step", color=color, label=name)
    axes[2, 2].set_title("spectrum, channel 1", fontsize=9)
    axes[0, 3].set_title("exact log-likelihood per step", fontsize=9)
    axes[1, 3].set_title("values, channel 3", fontsize=9)
    axes[0, 3].legend(fontsize=7)
    for filling in fillings:
        axes[2, 3].plot(filling[:, 0], color=colors[1], linewidth=0.8, alpha=0.6)
    axes[2, 3].plot(truth[:, 0], color=colors[0], linewidth=1.4)
    axes[2, 3].axvspan(gap.start - 0.5, gap.stop - 0.5, color="#f0e6c8", zorder=0)
    axes[2, 3].set_title("a gap filled eight times, channel 1", fontsize=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/time_series.png"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--series", type=int, default=1000, help="series generated for the comparison")
    options = parser.parse_args()
    torch.manual_seed(0)
    std = draw_series(2000).std((0, 1))
    began = time.process_time()
    model = train(build(), options.steps, std)
    trained = time.process_time()
    data, again = draw_series(options.series), draw_series(options.series)
    drawn = sample(model, options.series, std)
    print(f"CPU time: training {trained - began:.0f} s, {options.series} series {time.process_time() - trained:.0f} s")
    report(data, again, drawn)
    gap = slice(LENGTH // 3, LENGTH // 3 + 16)
    plot(data, drawn, fill(model, data[3], gap, 8, std), data[3], gap, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

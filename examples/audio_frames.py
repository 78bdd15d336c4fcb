"""Audio, frame by frame: raster autoregression with a diffusion head on the raw wave, the pitch as class.

    python examples/audio_frames.py [--out out/audio_frames] [--steps 1150]

Tones are made by frequency modulation (Chowning 1973): the phase of a sine at the pitch is bent by a second sine, and both decay.
The label is the pitch; phases, timbre and decay are random for each tone. A token is a frame of 64 samples:

1. Draw tones; their frames are the tokens [B, 32, 64]. No spectrogram, no codec: the wave itself.
2. Train a causal model in raster order, the pitch as class label.
3. Generate half a second of every pitch. The first frame is free; the others must continue its phase, or a jump would be heard.
4. Compare with data: the pitch, read from the wave by its autocorrelation; the mean spectrum; the roughness where frames meet. The
   script writes spectrograms of data beside samples, and tones.wav: a scale of data, then the same scale of samples.

A few minutes of one core's time on a CPU. Needs matplotlib (pip install 'continuar[demo]').
"""

from __future__ import annotations

import argparse
import math
import time
import wave
from pathlib import Path

import torch
from torch import Tensor

from continuar import Model, ModelConfig, SamplingOptions
from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.models import CausalConfig
from continuar.orders import RasterOrderConfig
from continuar.sampling.generate import SamplingInput, generate
from continuar.tokenizers import TokenSpec

RATE = 4000
"""Samples per second."""
FRAME, FRAMES = 64, 32
PITCHES = tuple(110 * 2 ** (semitone / 12) for semitone in (0, 3, 5, 7, 10, 12, 15, 17))
"""Hertz, by label: a pentatonic scale."""


def draw_tones(labels_B: Tensor, frames: int = FRAMES) -> Tensor:
    """One tone per label as frames [B, N, 64], of amplitude 1 or less."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(labels_B), 1)

    seconds = torch.arange(frames * FRAME) / RATE
    turns = torch.tensor(PITCHES)[labels_B].unsqueeze(1) * seconds
    ratio = torch.randint(1, 4, (len(labels_B), 1))
    index = uniform(0.3, 2.0) * (-seconds / uniform(0.05, 0.3)).exp()
    phase = 2 * math.pi * (turns + uniform(0, 1)) + index * (2 * math.pi * (ratio * turns + uniform(0, 1))).sin()
    loudness = (1 - (-seconds / 0.005).exp()) * (-seconds / uniform(0.15, 0.5)).exp()
    return (loudness * phase.sin()).unflatten(1, (frames, FRAME))


def autocorrelation(waves_BT: Tensor, lag_seconds: Tensor) -> Tensor:
    """Autocorrelation of each wave at each lag, relative to lag 0: [B, lags]. Lags need not be whole samples."""
    length = 2 * waves_BT.shape[1]  # zeros keep the end of a wave from meeting its beginning
    power = torch.fft.rfft(waves_BT, n=length).abs().square()
    power[:, 1:-1] *= 2  # each of these frequencies also stands for its negative
    cosines = (2 * math.pi * RATE / length * torch.arange(power.shape[1]).unsqueeze(1) * lag_seconds).cos()
    return power @ cosines / power.sum(1, keepdim=True)


def read_pitch(waves_BT: Tensor) -> Tensor:
    """The label of each wave: the highest pitch whose period gives at least 0.9 of the largest autocorrelation."""
    alike = autocorrelation(waves_BT, 1 / torch.tensor(PITCHES))
    return (alike > 0.9 * alike.amax(1, keepdim=True)).long().mul(torch.arange(len(PITCHES)) + 1).argmax(1)


def spectrum(waves_BT: Tensor) -> Tensor:
    """Mean power of waves in decibels, by frequency."""
    power = torch.fft.rfft(waves_BT * torch.hann_window(waves_BT.shape[1])).abs().square().mean(0)
    return 10 * (power + 1e-3).log10()


def roughness(tones_BNT: Tensor) -> float:
    """RMS of second differences across frame borders over that inside frames; 1 if borders cannot be heard."""
    bend = tones_BNT.flatten(1).diff(n=2)
    border = torch.zeros(bend.shape[1], dtype=torch.bool)
    border[FRAME - 2 :: FRAME], border[FRAME - 1 :: FRAME] = True, True
    return (bend[:, border].square().mean() / bend[:, ~border].square().mean()).sqrt().item()


def build(frames: int = FRAMES, width: int = 96) -> Model:
    """A causal model over frames, with the pitch as class."""
    return ModelConfig(
        TokenSpec((1, frames), FRAME),
        len(PITCHES),
        RasterOrderConfig(),
        CausalConfig(width=width, depth=4, heads=4, attention_dropout=0.0, dropout=0.0),
        DiffusionHeadConfig(width=width, depth=3, diffusion_batch_mul=1, prediction="v_prediction"),
    ).build()


def train(model: Model, steps: int, std: Tensor, batch: int = 64) -> Model:
    """Trains on new tones at every step. Tokens are divided by ``std``: the head expects about unit standard deviation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    frames = model.config.tokens.seq_len
    for step in range(steps):
        labels = torch.randint(len(PITCHES), (batch,))
        view = model.training_view(batch, labels.device)
        loss = model.loss(draw_tones(labels, frames) / std, labels, view, condition_dropout=0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    return model.eval()


def sample(model: Model, labels_B: Tensor, std: Tensor, guidance: float = 1.0, diffusion_steps: int = 50) -> Tensor:
    """One tone [N, 64] per label."""
    options = SamplingOptions(guidance_scale=guidance, head=DiffusionOptions(diffusion_steps=diffusion_steps))
    return generate(model, SamplingInput.blank(model.config.tokens, torch.arange(len(labels_B)), labels_B), options) * std


def report(name: str, tones: Tensor, labels: Tensor, reference: Tensor) -> None:
    """Prints statistics of tones; ``reference`` are tones of data with the same labels."""
    waves = tones.flatten(1)
    right = (read_pitch(waves) == labels).float().mean()
    off = [(spectrum(waves[labels == c]) - spectrum(reference.flatten(1)[labels == c])).abs().mean() for c in labels.unique()]
    print(
        f"{name:>10}: std {waves.std():.3f}; pitch as asked {right:.3f}; spectrum off by {torch.stack(off).mean():.2f} dB; "
        f"roughness at borders {roughness(tones):.2f}"
    )


def write_wav(path: Path, waves_BT: Tensor) -> None:
    """Waves in [-1, 1], one after the other, as 16-bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((waves_BT.flatten().clamp(-1, 1) * 32767).short().numpy().tobytes())


def plot(data: Tensor, drawn: Tensor, labels: Tensor, out: Path) -> None:
    """For every other pitch: spectrograms of a tone of data and of two samples, and the beginning of a sample's wave."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = range(0, len(PITCHES), 2)
    figure, axes = plt.subplots(4, len(shown), figsize=(12, 8.5))
    for column, label in enumerate(shown):
        mine = (labels == label).nonzero().flatten()
        tones = (("data", data[mine[0]]), ("sample", drawn[mine[0]]), ("sample", drawn[mine[1]]))
        for row, (name, tone) in enumerate(tones):
            axis = axes[row, column]
            axis.specgram(tone.flatten().numpy(), NFFT=256, Fs=RATE, noverlap=224, vmin=-110, vmax=-30)
            axis.axhline(PITCHES[label], color="white", linewidth=0.6, linestyle=":")
            axis.set_ylim(0, 1500)
            axis.set_title(f"{name}, {PITCHES[label]:.0f} Hz", fontsize=9)
        axis = axes[3, column]
        for tone, color in ((data[mine[0]], "#999999"), (drawn[mine[0]], "#1f77b4")):
            axis.plot(tone.flatten()[: 6 * FRAME], color=color, linewidth=0.9)
        for border in range(FRAME, 6 * FRAME, FRAME):
            axis.axvline(border, color="#dddddd", linewidth=0.6, zorder=0)
        axis.set_title("the first six frames: data (grey), sample", fontsize=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/audio_frames"))
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--per-pitch", type=int, default=32, help="tones of each pitch generated for the comparison")
    options = parser.parse_args()
    torch.manual_seed(0)
    labels = torch.arange(len(PITCHES)).repeat_interleave(options.per_pitch)
    std = draw_tones(labels).std()
    began = time.process_time()
    model = train(build(), options.steps, std)
    trained = time.process_time()
    data, again = draw_tones(labels), draw_tones(labels)
    drawn = sample(model, labels, std)
    print(f"CPU time: training {trained - began:.0f} s, {len(labels)} tones {time.process_time() - trained:.0f} s")
    for name, tones in (("data", data), ("data again", again), ("samples", drawn)):
        report(name, tones, labels, data)
    options.out.mkdir(parents=True, exist_ok=True)
    first = torch.arange(len(PITCHES)) * options.per_pitch
    write_wav(options.out / "tones.wav", torch.cat((data[first], drawn[first])))
    plot(data, drawn, labels, options.out / "spectrograms.png")
    print(f"wrote {options.out / 'spectrograms.png'} and tones.wav")


if __name__ == "__main__":
    main()

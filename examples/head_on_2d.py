"""The diffusion head without a transformer: a 2-D distribution whose shape depends on a condition.

    python examples/head_on_2d.py [--out out/head_on_2d.png] [--steps 1200]

For an angle c the points lie on a ring with a gap at c, a shape that no Gaussian and no regression describes. The script trains in
less than a minute on a CPU, plots samples beside data, and prints the energy distance between them. It is 0 if the distributions
are equal; the distance between two draws of the data is printed for comparison. Needs matplotlib (pip install 'continuar[demo]').
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from continuar import DiffusionHead


def draw_data(angle: Tensor) -> Tensor:
    """One point [M, 2] per angle [M]: on a ring of radius 1, at least 60 degrees away from the angle."""
    theta = angle + math.pi / 3 + torch.rand_like(angle) * (4 * math.pi / 3)
    radius = 1 + 0.08 * torch.randn_like(angle)
    return torch.stack((radius * theta.cos(), radius * theta.sin()), -1)


def condition(angle: Tensor) -> Tensor:
    """The condition of the head: (cos, sin) [M, 2]. Any vectors would do: a backbone's output, features, an embedding."""
    return torch.stack((angle.cos(), angle.sin()), -1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013)."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def train(steps: int, batch: int = 256) -> DiffusionHead:
    """A head for 2-D tokens with a 2-D condition."""
    head = DiffusionHead(token_dim=2, cond_dim=2, width=128, depth=3, prediction="v_prediction")
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scale = 1 / 0.7  # the head expects tokens of about unit standard deviation
    for step in range(steps):
        angle = torch.rand(batch) * 2 * math.pi
        loss = head.loss(condition(angle), draw_data(angle) * scale).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}")
    return head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/head_on_2d.png"))
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    torch.manual_seed(0)
    head = train(options.steps)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    angles = [0.0, math.pi / 2, math.pi, 3 * math.pi / 2]
    figure, axes = plt.subplots(2, len(angles), figsize=(11, 5.6), sharex=True, sharey=True)
    for column, value in enumerate(angles):
        angle = torch.full((2000,), value)
        data, again = draw_data(angle), draw_data(angle)
        samples = head.sample(condition(angle)) * 0.7
        distance, floor = energy_distance(samples, data), energy_distance(again, data)
        print(f"c = {math.degrees(value):3.0f} degrees: energy distance {distance:.4f} (data against data {floor:.4f})")
        for row, (name, points) in enumerate((("data", data), ("samples", samples))):
            axis = axes[row, column]
            axis.scatter(points[:, 0], points[:, 1], s=2, alpha=0.4, color=("#444444", "#1f77b4")[row])
            axis.set_title(f"{name}, gap at {math.degrees(value):.0f}°", fontsize=10)
            axis.set_aspect("equal")
            axis.set_xlim(-1.5, 1.5)
            axis.set_ylim(-1.5, 1.5)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(options.out, dpi=90)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

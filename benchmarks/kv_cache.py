"""What the kv-cache saves: time of the causal backbone per image, with cached keys and values and without, over image sizes.

    python benchmarks/kv_cache.py --results benchmarks/results/kv_cache.md

Both predict one token after another; "without" runs the teacher-forced forward over all tokens known so far at every step. Counted
MFLOP per token are of the matrix products, which with a cache do not depend on the number of tokens; attention comes on top, with
4 width depth FLOP per slot seen, and is all that grows.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from continuar.models import CausalConfig
from continuar.models.causal import Causal
from continuar.orders import View


def cached(backbone: Causal, x_1NE: torch.Tensor, cond_11E: torch.Tensor) -> None:
    order = torch.arange(x_1NE.shape[1])[None]
    state = backbone.start(cond_11E, x_1NE.shape[1])
    for i in range(x_1NE.shape[1]):
        backbone.predict(state, order[:, i : i + 1])
        backbone.commit(state, order[:, i : i + 1], x_1NE[:, i : i + 1])


def uncached(backbone: Causal, x_1NE: torch.Tensor, cond_11E: torch.Tensor) -> None:
    order = torch.arange(x_1NE.shape[1])[None]
    for i in range(x_1NE.shape[1]):
        backbone(x_1NE, cond_11E, View(order[:, : i + 1], i))


def seconds(run: Callable[[], None], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--uncached-up-to", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    lines = [
        "| tokens | cached ms/image | cached ms/token | without ms/image | MFLOP/token, products | MFLOP/token, attention |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for count in options.tokens:
        backbone = CausalConfig(width=options.width, depth=options.depth, heads=options.width // 64).build((1, count)).eval()
        x, cond = torch.randn(1, count, options.width), torch.randn(1, 1, options.width)
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                cached(backbone, x, cond)
            with_cache = seconds(lambda b=backbone, x=x, c=cond: cached(b, x, c), options.repeats)
            without = "-"
            if count <= options.uncached_up_to:
                without = f"{1e3 * seconds(lambda b=backbone, x=x, c=cond: uncached(b, x, c), options.repeats):.0f}"
        products = counter.get_total_flops() / count
        # The i-th prediction sees i slots: the condition and i - 1 tokens.
        attention = 4 * options.width * options.depth * (count + 1) / 2
        lines.append(
            f"| {count} | {1e3 * with_cache:.0f} | {1e3 * with_cache / count:.2f} | {without} | {products / 1e6:.2f} "
            f"| {attention / 1e6:.2f} |"
        )
        print(lines[-1], flush=True)
    note = (
        f"Causal backbone, width {options.width}, {options.depth} blocks, batch 1, median of {options.repeats}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}."
    )
    print(note)
    if options.results:
        head = [
            "# What the kv-cache saves",
            "",
            "```",
            "python benchmarks/kv_cache.py --results benchmarks/results/kv_cache.md",
            "```",
            "",
        ]
        options.results.write_text("\n".join([*head, *lines, "", note]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

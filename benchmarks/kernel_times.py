"""Where a GPU's time goes: its kernels by their share of some work."""

from __future__ import annotations

from collections.abc import Callable

import torch


def kernel_table(work: Callable[[], object], count: int, unit: str, shown: int = 30) -> str:
    """Kernels by time over ``work``, which is warm and does ``count`` units such as "step"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels) or 1
    launches = sum(k.count for k in kernels) // count
    lines = [f"{total / count / 1e3:.2f} ms of kernels per {unit}, {launches} launches"]
    for k in kernels[:shown]:
        share, each = k.self_device_time_total / total, k.self_device_time_total / k.count
        lines.append(f"  {share:6.1%} {k.count / count:8.1f} x {each:9.1f} us  {k.key[:100]}")
    return "\n".join(lines)

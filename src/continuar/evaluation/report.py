"""The result of an evaluation: every number with all it depends on, as JSON and as a table."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continuar import __version__
from continuar.evaluation.images import by
from continuar.evaluation.precision_recall import K_DENSITY, K
from continuar.evaluation.scores import Scores

FORMAT = 1


@dataclass(frozen=True)
class Speed:
    """Of one run; what an interrupted one had made before does not count."""

    wall_seconds: float
    """From the first check to the last score."""
    images_per_second: float | None
    """Making samples and their features, all processes together; None if all had been made before."""
    images_made: int
    process_seconds: float
    """Summed over processes and interrupted runs."""
    processes: int


@dataclass(frozen=True)
class Report:
    """See the module's docstring."""

    samples: dict[str, Any]
    reference: dict[str, Any]
    network: dict[str, Any]
    is_fid: bool
    scores: Scores
    notes: tuple[str, ...]
    speed: Speed
    provenance: dict[str, Any]

    def title(self, short: str, long: str) -> str:
        """As `FeatureNetwork.title`."""
        return short if self.is_fid else f"{long} ({self.network['name']})"

    def to_json(self) -> dict[str, Any]:
        """What result.json holds."""
        scores = self.scores
        return {
            "format": FORMAT,
            "samples": self.samples,
            "reference": self.reference,
            "network": self.network,
            "is_fid": self.is_fid,
            "scores": scores.values(),
            "titles": {name: title for name, title in titles(self).items() if name in scores.values()},
            "parameters": {
                "inception_score_splits": scores.inception_score.splits if scores.inception_score else None,
                "kernel_distance_subsets": scores.kernel_distance.subsets if scores.kernel_distance else None,
                "kernel_distance_subset_size": scores.kernel_distance.subset_size if scores.kernel_distance else None,
                "k_of_precision_and_recall": K,
                "k_of_density_and_coverage": K_DENSITY,
            },
            "notes": list(self.notes),
            "speed": asdict(self.speed),
            "provenance": self.provenance,
        }

    def table(self) -> str:
        """For people, one line per fact."""
        s, r, n = self.samples, self.reference, self.network
        what = f"{s['model']} ({s['weights']})" if s["kind"] == "generated" else s["path"]
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in s.get("settings", {}).items())
        lines = [
            ("samples", f"{what}: {s['images']} images of {by(s['size'])}" + (f", seed {s['seed']}" if "seed" in s else "")),
            *([("settings", settings)] if s["kind"] == "generated" else []),
            ("reference", f"{r['path']}: {r['images'] or 'an unknown number of'} images; {self._second_reference()}"),
            ("network", f"{n['name']}, {n['dimensions']} features, weights SHA-256 {n['sha256']}"),
            ("", ""),
            *self._scores(),
            ("", ""),
            *(("note", note) for note in self.notes),
            ("time", self._time()),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines) + "\n"

    def _second_reference(self) -> str:
        return f"{self.reference['images_of_precision_and_recall']} of them for precision, recall and kernel distance"

    def _scores(self) -> list[tuple[str, str]]:
        s, names = self.scores, titles(self)
        lines = [(names["frechet_distance"], f"{s.frechet_distance:.4f}")]
        if s.spatial_frechet_distance is not None:
            lines.append((names["spatial_frechet_distance"], f"{s.spatial_frechet_distance:.4f}"))
        if s.inception_score is not None:
            i = s.inception_score
            lines.append((names["inception_score"], f"{i.mean:.3f} ± {i.std:.3f} ({i.splits} splits), {i.whole:.3f} (whole)"))
        if s.kernel_distance is not None:
            k = s.kernel_distance
            lines.append((names["kernel_distance"], f"{k.mean:.6f} ± {k.std:.6f} ({k.subsets} subsets of {k.subset_size})"))
        if s.precision_recall is not None:
            p = s.precision_recall
            lines.append(("precision, recall", f"{p.precision:.4f}, {p.recall:.4f} (k = {K})"))
            lines.append(("density, coverage", f"{p.density:.4f}, {p.coverage:.4f} (k = {K_DENSITY})"))
        if s.class_accuracy is not None:
            lines.append((names["class_accuracy"], f"{s.class_accuracy:.4f}"))
        return lines

    def _time(self) -> str:
        speed = self.speed
        rate = "all made before" if speed.images_per_second is None else f"{speed.images_per_second:.3g} images/s"
        more = f", {speed.processes} processes" if speed.processes > 1 else ""
        return f"{speed.wall_seconds:.1f} s, {rate}{more}"


def titles(report: Report) -> dict[str, str]:
    """What the values of `Scores` may be called."""
    score, kernel = report.title("IS", "inception score"), report.title("KID", "kernel distance")
    return {
        "frechet_distance": report.title("FID", "Frechet distance"),
        "spatial_frechet_distance": report.title("sFID", "spatial Frechet distance"),
        "inception_score": score,
        "inception_score_std": f"{score}, std over splits",
        "inception_score_whole": f"{score}, of all at once",
        "kernel_distance": kernel,
        "kernel_distance_std": f"{kernel}, std over subsets",
        **{name: report.title(name, name) for name in ("precision", "recall", "density", "coverage")},
        "class_accuracy": "class accuracy",
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """What computed it: versions, hardware, commit."""
    return {
        "continuar": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def commit() -> str | None:
    """The commit this package runs from, "+changes" if it was changed since; None if it is not in a checkout of its own."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and git("status", "--porcelain", "--untracked-files=no") else revision

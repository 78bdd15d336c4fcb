"""From labels to images: a model, its tokenizer, its class names and the settings it was found best with."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from continuar.checkpoints.store import (
    CONFIG,
    EMA,
    SHARDS,
    WEIGHTS,
    PipelineConfig,
    is_replaceable,
    load_state,
    read_pipeline_config,
    read_tokenizer,
    write_tokenizer,
)
from continuar.devices import pick_device
from continuar.errors import UserError, require, unknown_name
from continuar.io import atomic_directory, read_tensors, write_json, write_tensors
from continuar.models.base import TokenModel
from continuar.sampling.engines import Engine, EngineName, chosen, make_engine
from continuar.sampling.fast.weights import Precision
from continuar.sampling.generate import GuidanceSchedule, SamplingInput, SamplingOptions, make_plan
from continuar.sampling.known_tokens import Array, Snapshot, equal_batches, snapshots, with_known
from continuar.tokenizers import Tokenizer
from continuar.tokenizers.pixel import to_uint8

Weights = Literal["ema", "raw"]
SHIPPED = Path(__file__).parent / "shipped"
_SEED_LIMIT = 2**63


class Pipeline:
    """Generates images. Call it with labels; see `__call__`.

    Attributes:
        model: the network, in evaluation mode. tokenizer: tokens <-> images. classes: names in label order.
        defaults: sampling settings used where a call does not say otherwise.
    """

    def __init__(self, file: PipelineConfig, model: TokenModel, tokenizer: Tokenizer | None = None) -> None:
        """``tokenizer``: one that is ready, where it has a state; else it is built from the config."""
        self.file, self.model = file, model.eval()
        self.tokenizer = (tokenizer or file.tokenizer.build()).to(self.device)
        self.classes, self.defaults = file.classes, file.sampling
        self._engines: dict[tuple[EngineName, Precision], Engine] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def engine(self, name: EngineName = "auto", precision: Precision = "float32") -> Engine:
        """Who generates; made once, for what the fast one has captured serves the next call too.

        Args:
            name: "eager", readably; "fast", faster and equal to it; "auto", "fast" where it can run the model.
            precision: "bfloat16" halves the weights and rounds more; only of the fast engine.

        Raises:
            UserError: see `make_engine`.
        """
        key = chosen(self.model, name), precision
        if key not in self._engines:
            self._engines[key] = make_engine(self.model, *key)
        return self._engines[key]

    def label(self, name: int | str) -> int:
        """A class name or number as a label.

        Raises:
            UserError: unknown; the nearest names are suggested.
        """
        count = len(self.classes)
        if isinstance(name, str) and name in self.classes:
            return self.classes.index(name)
        if isinstance(name, str) and not re.fullmatch("-?[0-9]+", name):
            raise unknown_name("class", name, self.classes)
        try:
            number = int(name) if isinstance(name, str) else operator.index(name)
        except TypeError as problem:
            raise UserError(f"class is {name!r}; allowed: a class number or name") from problem
        require(0 <= number < count, f"class is {name}; allowed: 0 to {count - 1}" if count else "the model has no classes")
        return number

    def __call__(
        self,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | int = 0,
        *,
        known_tokens: Array | None = None,
        known_mask: Array | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        temperature: float | None = None,
        batch_size: int = 64,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        on_progress: Callable[[int, int], None] | None = None,
        **head_options: Any,
    ) -> np.ndarray:
        """Generates one image per label.

        With known tokens it completes images: holes, where the order is random; the continuation of a prefix, where it is raster.
        (There known tokens that are no prefix come first all the same, and the rest row by row: nothing a model has learned.)

        Args:
            labels: class numbers or names; None for images without a class, one per seed.
            seeds: one per image, -2^63..2^63-1; a single number s means s, s+1, ... The same seed and settings give the same image
                at any batch size.
            known_tokens: [B, N, D] of about unit std or ids [B, N], as ``tokenizer.tokenize`` gives them; one image serves all as
                [1, N, D]. They come back unchanged; what stands at unknown positions does not matter.
            known_mask: bool, True where known: [B, N], or [N] or [h, w] for all images. Images may differ in how many they know;
                all known gives the tokens back as they are, none known is plain generation.
            steps, guidance_scale, guidance_schedule, temperature: see `SamplingOptions`; None is the model's default.
            batch_size: images generated at once.
            engine, precision: see `engine`.
            on_progress: called with (steps done, steps in all).
            head_options: options of the model's head by name, such as ``diffusion_steps`` and ``sampler`` of the diffusion head.

        Returns:
            uint8 [B, H, W, 3].

        Raises:
            UserError: an unknown class, a setting out of range, an option the head does not have, or known tokens of another shape.
        """
        options = self.defaults.override(
            steps=steps, guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, temperature=temperature, **head_options
        )
        tokens = self.tokens(
            labels,
            seeds,
            known_tokens=known_tokens,
            known_mask=known_mask,
            options=options,
            batch_size=batch_size,
            engine=engine,
            precision=precision,
            on_progress=on_progress,
        )
        return self.decode(tokens, batch_size)

    def tokens(
        self,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | int = 0,
        *,
        known_tokens: Array | None = None,
        known_mask: Array | None = None,
        options: SamplingOptions | None = None,
        batch_size: int = 64,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Generates tokens, [B, N, D] float32 or ids [B, N]: what the tokenizer would decode; arguments as of `__call__`."""
        options, runs = options or self.defaults, self.engine(engine, precision)
        start = self._begin(labels, seeds, batch_size, known_tokens, known_mask)
        batches = equal_batches(start, batch_size)
        total = sum(len(make_plan(self.model.order, options, batch.unknown)) for batch in batches)
        tokens, done = start.tokens.clone(), 0
        for batch in batches:
            last = batch.start.tokens
            for progress in runs.stream(batch.start, options):
                last, done = progress.tokens, done + 1
                if on_progress is not None:
                    on_progress(done, total)
            tokens[batch.rows_b] = last
        return tokens

    def stream(
        self,
        labels: Sequence[int | str] | None = None,
        seeds: Sequence[int] | int = 0,
        *,
        known_tokens: Array | None = None,
        known_mask: Array | None = None,
        batch_size: int = 64,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        **settings: Any,
    ) -> Iterator[Snapshot]:
        """Generates as `__call__` does, and yields a `Snapshot` of all images after every autoregressive step.

        The last one is what the call would return. Images that know more than others are complete earlier; if all tokens are known,
        the only snapshot is of step 0.

        Args:
            batch_size: images computed at once; the states of all are kept.
            engine, precision: see `engine`.
            settings: as of `__call__`, by name.

        Raises:
            UserError: as of `__call__`; before the first step.
        """
        start = self._begin(labels, seeds, batch_size, known_tokens, known_mask)
        options = self.defaults.override(**settings)
        return snapshots(self.engine(engine, precision), start, options, batch_size, lambda tokens: self.decode(tokens, batch_size))

    def decode(self, tokens: Tensor, batch_size: int = 64) -> np.ndarray:
        """Tokens [B, N, D] or ids [B, N] -> uint8 [B, H, W, 3]."""
        return np.concatenate([to_uint8(self.tokenizer.decode(part)).cpu().numpy() for part in tokens.split(batch_size)])

    def _begin(
        self,
        labels: Sequence[int | str] | None,
        seeds: Sequence[int] | int,
        batch_size: int,
        known_tokens: Array | None,
        known_mask: Array | None,
    ) -> SamplingInput:
        """All images at the start of their generation."""
        require(batch_size >= 1, f"batch size is {batch_size}; allowed: 1 or more")
        names = self._labels(labels, seeds)
        numbers = self.seeds(seeds, len(names))
        require(bool(names), "no labels and no seeds: there is nothing to generate")
        return with_known(self._start(names, numbers), self.model.config.tokens, known_tokens, known_mask)

    def _labels(self, labels: Sequence[int | str] | None, seeds: Sequence[int] | int) -> list[int]:
        if labels is None:
            return [self.model.null_label] * (1 if isinstance(seeds, int | Integral) else len(seeds))
        require(not isinstance(labels, str), f"labels is the text {labels!r}; allowed: a list of class numbers or names")
        return [self.label(name) for name in labels]

    def seeds(self, seeds: Sequence[int] | int, count: int) -> list[int]:
        """One seed per image; a single number s means s, s+1, ...

        Raises:
            UserError: another number of them, or one out of range.
        """
        numbers = [int(seeds) + i for i in range(count)] if isinstance(seeds, int | Integral) else [int(s) for s in seeds]
        require(len(numbers) == count, f"{len(numbers)} seeds for {count} labels; allowed: one each, or a single number")
        for s in numbers:
            require(-_SEED_LIMIT <= s < _SEED_LIMIT, f"seed is {s}; allowed: -2^63 to 2^63-1")
        return numbers

    def _start(self, labels: list[int], seeds: list[int]) -> SamplingInput:
        spec, batch, device = self.file.model.tokens, len(labels), self.device
        return SamplingInput(
            torch.tensor(labels, device=device) if any(label != self.model.null_label for label in labels) else None,
            torch.tensor(seeds, device=device),
            spec.blank(batch, device),
            torch.zeros(batch, spec.seq_len, dtype=torch.bool, device=device),
        )

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes a saved model; an existing one there is replaced at once.

        Args:
            dtype: store weights as this, e.g. ``torch.bfloat16`` for half the size; None keeps them as they are.
        """
        directory = Path(directory)
        require(is_replaceable(directory), f"{directory} exists and is not a saved model; choose another directory")
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, self.file)
            write_tensors(temporary / WEIGHTS, self.model.state_dict(), dtype)
            write_tokenizer(temporary, self.tokenizer)
        return directory

    @classmethod
    def from_pretrained(cls, model: str | Path, *, weights: Weights = "ema", device: str | torch.device = "auto") -> Pipeline:
        """Loads a model.

        Args:
            model: a saved directory, a run directory (its newest checkpoint), a checkpoint, or a shipped name.
            weights: "ema" (where there are two), or "raw".

        Raises:
            UserError: not found, incomplete, truncated or of another format.
        """
        require(weights in ("ema", "raw"), f"weights is '{weights}'; allowed: ema, raw")
        directory = find_model(model)
        file = read_pipeline_config(directory)
        with torch.device("meta"):
            network = file.model.build()
        network.to_empty(device="cpu")
        load_state(network, *read_weights(directory, weights))
        return cls(file, network.float().to(pick_device(device)), read_tokenizer(directory, file.tokenizer))


load = Pipeline.from_pretrained


def read_weights(directory: Path, weights: Weights) -> tuple[dict[str, Tensor], str]:
    """The weights of a saved model or checkpoint, and where they were found; those that several processes wrote are joined."""
    if not (directory / WEIGHTS).is_file():
        from continuar.checkpoints.sharded import read_full

        return read_full(directory, "ema." if weights == "ema" else "model."), str(directory / SHARDS)
    source = directory / (EMA if weights == "ema" and (directory / EMA).is_file() else WEIGHTS)
    return read_tensors(source), str(source)


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(p.name for p in SHIPPED.iterdir() if (p / CONFIG).is_file()) if SHIPPED.is_dir() else []


def find_model(model: str | Path) -> Path:
    """The directory that holds ``config.json`` and weights for a name, a saved directory, a run directory or a checkpoint.

    Raises:
        UserError: nothing of that name; a run without a checkpoint.
    """
    path = Path(model)
    if str(model) in shipped_models() and not path.exists():
        return SHIPPED / str(model)
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        models = (p for p in beside if (p / CONFIG).is_file())
        raise unknown_name("model", str(model), [*shipped_models(), *sorted(map(str, models))])
    require(
        path.is_dir(),
        f"model is the file {path}; allowed: a directory, or an official .pth file (see `continuar convert`)",
    )
    if (path / WEIGHTS).is_file() or (path / SHARDS).is_dir():
        return path
    if (path / "checkpoints").is_dir():
        found = newest_checkpoints(path)
        require(bool(found), f"{path} has no complete checkpoint yet")
        return found[0]
    raise UserError(f"{path} is neither a saved model nor a run directory: it has no {WEIGHTS} and no checkpoints")


def newest_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run directory, newest first."""
    folder = run / "checkpoints"
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted((p for p in found if (p / CONFIG).is_file()), reverse=True)

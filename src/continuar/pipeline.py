"""From labels to images: a model, its tokenizer, its class names and its best sampling settings.

1. Labels, seeds and known tokens become a `SamplingInput` of all images.
2. `equal_batches` cuts it into batches whose images know equally many tokens.
3. An engine generates each batch: "eager", the readable reference, or "fast", equal to it up to rounding.
4. The tokenizer decodes the tokens.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    check_replaceable,
    load_state,
    read_pipeline_config,
    read_tokenizer,
    write_tokenizer,
)
from continuar.distributed import pick_device
from continuar.errors import UserError, require, unknown_name
from continuar.io import atomic_directory, read_tensors, write_json, write_tensors
from continuar.models.autoregressive import Model
from continuar.models.base import TokenModel
from continuar.models.dit import DiT
from continuar.sampling.fast.engine import FastEngine, unsupported_reason
from continuar.sampling.fast.weights import DTYPES, Precision
from continuar.sampling.generate import Progress, SamplingEngine, SamplingInput, make_plan, stream
from continuar.sampling.known_tokens import Array, Snapshot, with_known
from continuar.sampling.options import GuidanceSchedule, SamplingOptions
from continuar.sampling.single_step import stream_single_step
from continuar.tokenizers import Tokenizer
from continuar.tokenizers.pixel import to_uint8

EngineName = Literal["auto", "eager", "fast"]
ENGINE_NAMES: tuple[EngineName, ...] = ("auto", "eager", "fast")
FAST_DEVICES = ("cpu", "cuda")
"""Devices on which tests have shown the fast engine equal to the eager one."""
Weights = Literal["ema", "raw"]
SHIPPED = Path(__file__).parent / "shipped"
_SEED_LIMIT = 2**63


class EagerEngine:
    """The readable reference. The caller's autocast holds within the model's backbone."""

    def __init__(self, model: TokenModel) -> None:
        self.model = model

    def stream(self, inputs: SamplingInput, options: SamplingOptions) -> Iterator[Progress]:
        if isinstance(self.model, DiT):
            return stream_single_step(self.model, inputs, options)
        assert isinstance(self.model, Model)
        return stream(self.model, inputs, options)


def resolve_engine(model: TokenModel, name: EngineName) -> EngineName:
    """The engine that "auto" means for a model; other names stay as they are."""
    if name != "auto":
        return name
    return "fast" if unsupported_reason(model) is None and next(model.parameters()).device.type in FAST_DEVICES else "eager"


def make_engine(model: TokenModel, name: EngineName = "auto", precision: Precision = "float32") -> SamplingEngine:
    """The engine of that name.

    Raises:
        UserError: an unknown name or precision, a model that "fast" cannot run, or bfloat16 without "fast".
    """
    require(name in ENGINE_NAMES, f"engine is '{name}'; allowed: {', '.join(ENGINE_NAMES)}")
    require(precision in DTYPES, f"precision is '{precision}'; allowed: {', '.join(DTYPES)}")
    if resolve_engine(model, name) == "fast":
        return FastEngine(model, precision)
    if precision != "float32":
        reason = unsupported_reason(model)
        because, allowed = (f", for {reason}", "float32") if reason else ("", "float32, or engine fast")
        raise UserError(f"precision is '{precision}' with the eager engine{because}; allowed: {allowed}")
    return EagerEngine(model)


@dataclass(frozen=True)
class EqualBatch:
    """Images that are generated together: each knows the same number of tokens, so that every tensor is rectangular.

    Attributes:
        rows_b: int64, their indices among all images.
        inputs: of these images.
        unknown: the number of tokens that each image lacks.
    """

    rows_b: Tensor
    inputs: SamplingInput
    unknown: int


def equal_batches(inputs: SamplingInput, size: int) -> list[EqualBatch]:
    """Cuts an input into batches of at most ``size`` images with equally many known tokens; fewest unknown tokens last.

    Noise belongs to an image and its positions, so an image does not depend on this grouping.
    """
    unknown, condition, batches = (~inputs.known_BN).sum(1).tolist(), inputs.condition, []
    for count in sorted(set(unknown), reverse=True):
        rows = [row for row, number in enumerate(unknown) if number == count]
        for first in range(0, len(rows), size):
            b = torch.tensor(rows[first : first + size], device=inputs.known_BN.device)
            part = None if condition is None else condition[b]
            batches.append(EqualBatch(b, SamplingInput(part, inputs.seeds_B[b], inputs.tokens[b], inputs.known_BN[b]), count))
    return batches


class Pipeline:
    """Generates images. Call it with labels; see `__call__`.

    Attributes:
        config: of the model, the tokenizer, the class names and the sampling settings.
        model: the network, in evaluation mode.
        tokenizer: tokens <-> images.
        classes: names in label order.
        defaults: sampling settings for everything that a call leaves open.
    """

    def __init__(self, config: PipelineConfig, model: TokenModel, tokenizer: Tokenizer | None = None) -> None:
        """``tokenizer``: a finished one, for kinds that have weights; None: built from the config."""
        self.config, self.model = config, model.eval()
        self.tokenizer = (tokenizer or config.tokenizer.build()).to(self.device)
        self.classes, self.defaults = config.classes, config.sampling
        self._engines: dict[tuple[EngineName, Precision], SamplingEngine] = {}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def engine(self, name: EngineName = "auto", precision: Precision = "float32") -> SamplingEngine:
        """The engine of that name. It is made once, because the fast engine reuses its captured graphs in later calls.

        Args:
            name: "eager", the readable reference; "fast", faster and equal to it; "auto", "fast" if it can run the model.
            precision: "bfloat16" halves the weights and rounds more; only for the fast engine.

        Raises:
            UserError: see `make_engine`.
        """
        key = resolve_engine(self.model, name), precision
        if key not in self._engines:
            self._engines[key] = make_engine(self.model, *key)
        return self._engines[key]

    def label(self, name: int | str) -> int:
        """The label of a class name or number.

        Raises:
            UserError: unknown; the message suggests the nearest names.
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

    def seeds(self, seeds: Sequence[int] | int, count: int) -> list[int]:
        """One seed per image; a single number s means s, s+1, ...

        Raises:
            UserError: a sequence of another length, or a seed out of range.
        """
        numbers = [int(seeds) + i for i in range(count)] if isinstance(seeds, int | Integral) else [int(s) for s in seeds]
        require(len(numbers) == count, f"{len(numbers)} seeds for {count} labels; allowed: one each, or a single number")
        for s in numbers:
            require(-_SEED_LIMIT <= s < _SEED_LIMIT, f"seed is {s}; allowed: -2^63 to 2^63-1")
        return numbers

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

        With known tokens it completes images. A model with a random order fills any mask. A model with raster order continues a
        prefix; other known tokens are fed to it before the rest, an order that it was not trained on.

        Args:
            labels: class numbers or names; None for images without a class, one per seed.
            seeds: one per image, -2^63..2^63-1; a single number s means s, s+1, ... The same seed and settings give the same image
                at any batch size.
            known_tokens: [B, N, D] of about unit std or ids [B, N], as ``tokenizer.tokenize`` gives them; [1, N, D] or [1, N] is
                used for all images. They come back unchanged; values at unknown positions are ignored.
            known_mask: bool, True where known: [B, N], or [N] or [h, w] for all images. Images may differ in how many they know;
                all known gives the tokens back as they are, none known is plain generation.
            steps, guidance_scale, guidance_schedule, temperature: see `SamplingOptions`; None is the model's default.
            batch_size: images generated together.
            engine, precision: see `engine`.
            on_progress: called with (steps done, steps in all).
            head_options: options of the model's head by name, for example ``diffusion_steps`` and ``sampler``.

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
        """Generates tokens, [B, N, D] float32 or ids [B, N], without decoding them; arguments as in `__call__`."""
        options, runner = options or self.defaults, self.engine(engine, precision)
        inputs = self._inputs(labels, seeds, batch_size, known_tokens, known_mask)
        batches = equal_batches(inputs, batch_size)
        total = sum(len(make_plan(self.model.order, options, batch.unknown)) for batch in batches)
        tokens, done = inputs.tokens.clone(), 0
        for batch in batches:
            last = batch.inputs.tokens
            for progress in runner.stream(batch.inputs, options):
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

        The last snapshot holds what the call would return. Images that know more tokens than others are complete earlier; if all
        tokens are known, the only snapshot is of step 0.

        Args:
            batch_size: images computed together; the states of all batches are kept.
            engine, precision: see `engine`.
            settings: sampling settings by name, as in `__call__`.

        Raises:
            UserError: as in `__call__`; before the first step.
        """
        inputs = self._inputs(labels, seeds, batch_size, known_tokens, known_mask)
        options, runner = self.defaults.override(**settings), self.engine(engine, precision)
        batches = equal_batches(inputs, batch_size)
        steps = max(len(make_plan(self.model.order, options, batch.unknown)) for batch in batches)

        # A generator of its own, so that the checks above run in the call and not at the first step.
        def snapshots() -> Iterator[Snapshot]:
            tokens, known_BN = inputs.tokens.clone(), inputs.known_BN.clone()
            streams = [(batch.rows_b, runner.stream(batch.inputs, options)) for batch in batches]
            for step in range(min(1, steps), steps + 1):
                # Batches advance together; those with fewer steps are complete and wait.
                for rows_b, progresses in streams:
                    progress = next(progresses, None)
                    if progress is not None:
                        tokens[rows_b], known_BN[rows_b] = progress.tokens, progress.known_BN
                yield Snapshot(
                    tokens.clone(),
                    known_BN.clone(),
                    step,
                    steps,
                    lambda tokens: self.decode(tokens, batch_size),
                    self.model.config.tokens.grid,
                )

        return snapshots()

    def decode(self, tokens: Tensor, batch_size: int = 64) -> np.ndarray:
        """Tokens [B, N, D] or ids [B, N] -> uint8 [B, H, W, 3]."""
        return np.concatenate([to_uint8(self.tokenizer.decode(part)).cpu().numpy() for part in tokens.split(batch_size)])

    def _inputs(
        self,
        labels: Sequence[int | str] | None,
        seeds: Sequence[int] | int,
        batch_size: int,
        known_tokens: Array | None,
        known_mask: Array | None,
    ) -> SamplingInput:
        """All images of a call before their generation."""
        require(batch_size >= 1, f"batch size is {batch_size}; allowed: 1 or more")
        require(not isinstance(labels, str), f"labels is the text {labels!r}; allowed: a list of class numbers or names")
        if labels is None:
            condition, count = None, 1 if isinstance(seeds, int | Integral) else len(seeds)
        else:
            condition, count = torch.tensor([self.label(name) for name in labels], device=self.device), len(labels)
        numbers = torch.tensor(self.seeds(seeds, count), device=self.device)
        require(count > 0, "no labels and no seeds: there is nothing to generate")
        inputs = SamplingInput.blank(self.model.config.tokens, numbers, condition)
        if known_tokens is None and known_mask is None:
            return inputs
        return with_known(inputs, self.model.config.tokens, known_tokens, known_mask)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes a saved model; an existing one there is replaced at once.

        Args:
            dtype: store weights as this, e.g. ``torch.bfloat16`` for half the size; None keeps them as they are.
        """
        directory = Path(directory)
        check_replaceable(directory)
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, self.config)
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

"""``continuar COMMAND``: finds the command, runs it, and turns a user's mistake into one line and exit code 2.

Nothing heavy is imported before the command is known, so that ``continuar --help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

from continuar import __version__
from continuar.errors import RemoteRankError, UserError, unknown_name

COMMANDS = {
    "train": ("train:run", "train a model by a recipe: continuar train digits"),
    "plan": ("plan:run", "estimate memory, days and network of a training run: continuar plan mar_l_imagenet256 --gpus 64"),
    "sample": ("sample:run", "generate images: continuar sample MODEL --classes 3,7"),
    "edit": ("edit:run", "generate a part of an image anew: continuar edit MODEL IMAGE --mask MASK.png --class cat"),
    "evaluate": ("evaluate:run", "score images against real ones: continuar evaluate MODEL --reference STATS"),
    "sweep": ("sweep:run", "evaluate a model over settings: continuar sweep MODEL --over figure4 --reference STATS"),
    "stats": ("stats:run", "compute reference statistics of real images: continuar stats DATA OUT.npz"),
    "tokenizer list": ("tokenizer:list_named", "list the tokenizers of the paper's Table 2"),
    "tokenizer save": ("tokenizer:save", "keep an autoencoder (diffusers, hub, LDM) as a saved tokenizer"),
    "tokenizer stats": ("tokenizer:stats", "measure mean and std of latents, and keep the scale with the tokenizer"),
    "tokenizer train": ("tokenizer:train", "train a KL or VQ tokenizer by a recipe"),
    "tokenizer evaluate": ("tokenizer:evaluate", "measure PSNR, SSIM, Frechet distance and codebook use of reconstructions"),
    "cache": ("cache:run", "encode every image once and keep its latents: continuar cache DATA TOKENIZER DST"),
    "cache check": ("cache:check", "check a cache of latents against its images"),
    "bench sample": ("bench:run", "measure how fast images are generated here: continuar bench sample MODEL"),
    "extract": ("extract:run", "write a saved model from a training run: continuar extract RUN DST"),
    "convert": ("convert:run", "convert official files (MAR, autoencoders) into saved models and back"),
}
"""Every command: the function in ``continuar.cli`` that runs it, as MODULE:FUNCTION, and its line in ``continuar --help``."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch loads OpenMP: threads that wait by spinning stall one another when cores are shared (seen: 100 times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    # Rank 0 logs what every process would log; the other processes log errors only.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        _dispatch(arguments)
    except RemoteRankError:
        # The process in which it went wrong prints the message.
        return 2
    except UserError as problem:
        if debug:
            raise
        return _fail(str(problem))
    except OSError as problem:
        if debug:
            raise
        where = f" ({problem.filename})" if problem.filename else ""
        return _fail(f"{problem.strerror or problem}{where}")
    except KeyboardInterrupt as stop:
        kept = getattr(stop, "checkpoint", None)
        note = f"; checkpoint kept in {kept}, --resume continues" if kept else ""
        print(f"\ncontinuar: interrupted{note}", file=sys.stderr)
        return 130
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(f"continuar {__version__}: autoregressive generation over continuous tokens.\n\n{_usage('', list(COMMANDS))}")
        return
    if words[0] == "--version":
        print(__version__)
        return
    # A name of two words wins over one of one word: `cache check DST` is not `cache` with the data set "check".
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name in COMMANDS:
        module, function = COMMANDS[name][0].split(":")
        run = getattr(import_module(f"continuar.cli.{module}"), function)
        # Imported late, because this module imports torch.
        import_module("continuar.cli.common").run_command(run, f"continuar {name}", words[len(name.split()) :])
        return
    group = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if not group:
        raise unknown_name("command", name, dict.fromkeys(command.split()[0] for command in COMMANDS))
    if len(words) > 1 and words[1] not in ("-h", "--help"):
        raise unknown_name(f"{name} command", words[1], [command.split()[1] for command in group])
    print(_usage(f"{name} ", group))


def _usage(group: str, commands: list[str]) -> str:
    width = max(map(len, commands))
    listed = "\n".join(f"  {command:<{width}}  {COMMANDS[command][1]}" for command in commands)
    return (
        f"usage: continuar {group}COMMAND ...\n\ncommands:\n{listed}\n\n"
        f"`continuar {group}COMMAND --help` lists a command's options. --debug shows the traceback of an error. "
        "--version prints the version."
    )


def _fail(message: str) -> int:
    print(f"continuar: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""``continuar COMMAND``: dispatch, and the one place where a user's mistake becomes one line and exit code 2.

Nothing heavy is imported here, so that ``continuar --help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

from continuar import __version__
from continuar.errors import RemoteRankError, UserError, unknown_name

COMMANDS = {
    "train": "train a model by a recipe: continuar train digits",
    "plan": "what a run costs: continuar plan mar_l_imagenet256 --gpus 64",
    "sample": "generate images: continuar sample MODEL --classes 3,7",
    "edit": "generate a part of an image anew: continuar edit MODEL IMAGE --mask MASK.png --class cat",
    "evaluate": "score images against real ones: continuar evaluate MODEL --reference STATS",
    "sweep": "evaluate a model over settings: continuar sweep MODEL --over figure4",
    "stats": "reference statistics of real images: continuar stats DATA OUT.npz",
    "tokenizer": "autoencoders, trained and measured: continuar tokenizer train kl_cifar10",
    "cache": "latents of every image, kept: continuar cache DATA TOKENIZER DST",
    "bench": "how fast images are generated here: continuar bench sample MODEL",
    "extract": "a saved model from a training run: continuar extract RUN DST",
    "convert": "official files (MAR, autoencoders) into our format and back",
}
_HELP = f"""continuar {__version__}: autoregressive generation over continuous tokens.

usage: continuar COMMAND ...

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

`continuar COMMAND --help` lists a command's options. --debug shows the traceback of an error. --version prints the version.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch loads OpenMP: threads that wait by spinning stall one another when cores are shared (seen: 100 times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    # Of several processes the first says what all have to say; others speak of errors only.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        return _run(arguments)
    except RemoteRankError:
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


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown_name("command", arguments[0], COMMANDS)
    return import_module(f"continuar.cli.{arguments[0]}").main(arguments[1:])


def _fail(message: str) -> int:
    print(f"continuar: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

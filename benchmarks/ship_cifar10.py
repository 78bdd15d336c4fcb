"""Trains the CIFAR-10 model that ships, in slices of a few minutes, so that a machine that goes away costs a minute at most.

    python benchmarks/ship_cifar10.py slice --minutes 9.5 --work out/ship --results RESULTS \
        --train cifar10-train.parquet --test cifar10-test.parquet --squeezenet squeezenet1_1_imagenet.safetensors

One call is one slice. Called again on the same machine it goes on from WORK; on a new machine from the results of an earlier one
(``--carry RESULTS``). A slice may be killed at any moment. It

1. restores: WORK as it stands; else the carried weights, under a fresh warm-up of the moments; else nothing;
2. trains the small classifier, if there is none yet (`cifar10_classifier.py`);
3. trains recipe `cifar10` with ``--set field.field=value``, in a child process. An engine that fails or does not start in time
   gives way to the next: compile-graphs, graphs, eager. Every checkpoint is put into RESULTS at once (`shipping/kept.py`);
4. draws a sample grid;
5. with ``--evaluate``: class accuracy of 1,000 images over guidances, Frechet distance of 10,000 samples beside that of real test
   images, nearest neighbours, held-out loss (`evaluate_cifar10.py`, `heldout_loss.py`), of the bfloat16 weights that would ship;
6. prints a table.

The learning rate stays constant until its end is planned: ``--later-minutes M`` says that M minutes of training follow in later
slices, and from the rate measured so far the run is given its end (`shipping/planning.py`).

Half an hour of one machine in calls of ten minutes, with the minutes to expect; ARGS are --work, --results, --train, --test and
--squeezenet as above. Their 26 minutes leave four for starting the machine and for transfers:

    slice ARGS --minutes 9.3                                   # classifier 2, compiling 2, training 4.5, grid 0.5
    slice ARGS --minutes 9.3 --later-minutes 1.8               # starting 1, training 7.5, the rate begins to fall; grid 0.5
    slice ARGS --minutes 7.6 --later-minutes 0 --evaluate      # training 1.8 to rate zero, grid 0.5, evaluation 5

Give every call but the first ``--carry DIR`` with a copy of the last RESULTS: a new machine begins anew without it, the same one
ignores it. ``--processes 2`` trains on two GPUs. Then, anywhere:

    python benchmarks/ship_cifar10.py export RESULTS --set sampling.guidance=2.0   # -> src/continuar/models/cifar10
    python benchmarks/ship_cifar10.py curves RESULTS --to docs/images/cifar10_curves.png

To train the shipped model on, the first call carries it too (the classifier is trained again):

    mkdir carry; cp benchmarks/results/cifar10_shipped/* carry/
    cp src/continuar/models/cifar10/model.safetensors carry/ema.safetensors

torch, numpy, safetensors, pillow and pyarrow are enough; ``PYTHONPATH=src`` stands in for an installation.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "src" / "continuar" / "models" / "cifar10"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``run`` is the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("slice", help="do what can be done in so many minutes")
    command.set_defaults(run="slice")
    command.add_argument("--minutes", type=float, required=True, help="of wall time for everything")
    command.add_argument("--work", type=Path, required=True, help="this machine's folder; not kept")
    command.add_argument("--results", type=Path, required=True, help="the folder that is kept: at most 8 files, each under 16 MiB")
    command.add_argument("--carry", type=Path, help="a copy of an earlier slice's results, for a machine without WORK")
    for name in ("train", "test", "squeezenet"):
        command.add_argument(f"--{name}", type=Path, required=True)
    command.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the run, as optim.lr=8e-4")
    command.add_argument("--processes", type=int, default=1, help="GPUs of this machine that train together; they divide the batch")
    command.add_argument("--engine", help="try this engine first, also if it failed before; default: the run's")
    command.add_argument("--compile-minutes", type=float, default=2.5, help="an engine that takes longer to start is given up")
    command.add_argument("--later-minutes", type=float, help="training that follows in later slices: plans the rate's end")
    command.add_argument("--rewarm-images", type=int, default=250_000, help="warm-up after weights were carried in")
    command.add_argument("--least-seconds", type=float, default=30.0, help="no training in less time than this")
    command.add_argument("--classifier-minutes", type=float, default=2.0)
    command.add_argument("--classifier-options", default="", help="further options of cifar10_classifier.py, in one text")
    command.add_argument("--evaluate", action="store_true")
    command.add_argument("--evaluate-minutes", type=float, default=5.0, help="taken from training when --evaluate is given")
    command.add_argument("--evaluation-options", default="", help="further options of evaluate_cifar10.py, in one text")
    command.add_argument("--samples", type=int, nargs=2, default=[1000, 10_000], help="for class accuracy, for the distance")
    command.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0], help="for class accuracy")
    command.add_argument(
        "--distance-guidance", type=float, nargs="+", help="for the distance; default: 1.5 and the best by accuracy"
    )
    command.add_argument("--commit", default="", help="of the code, where git cannot say it")
    command.add_argument("--device", default="auto")

    command = commands.add_parser("export", help="write the model that ships")
    command.set_defaults(run="export")
    command.add_argument("results", type=Path)
    command.add_argument("--to", type=Path, default=SHIPPED)
    command.add_argument("--weights", choices=("ema", "raw"), default="ema")
    command.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of config.json: sampling.guidance=2.0")

    command = commands.add_parser("curves", help="draw loss and learning rate")
    command.set_defaults(run="curves")
    command.add_argument("results", type=Path)
    command.add_argument("--to", type=Path, required=True, help="a .png or .svg file")

    for name, text in (("train", "trains until a moment, in WORK/run"), ("grid", "draws WORK/grid.png")):
        command = commands.add_parser(name, help=f"called by slice: {text}")
        command.set_defaults(run=name)
        command.add_argument("work", type=Path)
        command.add_argument("--device", default="auto")
        if name == "train":
            command.add_argument("--stop-at", type=float, required=True, help="seconds since the epoch")
            command.add_argument("--processes", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> int:
    """Runs a command. What it needs is imported here: that takes seconds, which count."""
    options = parse()
    options.began = time.time()
    # Before threads start: those that wait by spinning stall one another where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from shipping.curves import draw_curves
    from shipping.slices import run_slice
    from shipping.work import draw_child, export, train_child

    from continuar.errors import UserError

    try:
        {"slice": run_slice, "export": export, "curves": draw_curves, "train": train_child, "grid": draw_child}[options.run](
            options
        )
    except UserError as problem:
        print(f"ship_cifar10: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m perexfx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from perexfx.bench.workloads import WORKLOADS
from perexfx.ir.errors import ArgumentError, PerexError

TABLES = ("suite", "peers", "layers", "scale")
OF_WORKLOADS = ("suite", "peers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns: the exit code; 2 for mistakes of the user."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except PerexError as error:
        print(f"perexfx: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="perexfx", description="Clipped per-example gradients by rewriting graphs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    bench = commands.add_parser("bench", help="measure clipped steps, and what they stand on, on this machine")
    bench.add_argument(
        "names",
        nargs="*",
        metavar="table or workload",
        help=f"a table ({', '.join(TABLES)}; default: suite), then, for {' and '.join(OF_WORKLOADS)}, "
        f"workloads ({', '.join(WORKLOADS)}; default: all)",
    )
    bench.add_argument(
        "--rounds", type=int, default=15, help="how many times each step is timed (default: %(default)s)"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    bench.add_argument("--out", type=Path, help="folder for the table as .json (all timings), .md and .png")
    bench.set_defaults(run=_bench)
    calibrate = commands.add_parser("calibrate", help="measure this machine once, for better plans")
    calibrate.set_defaults(run=_calibrate)
    return parser


def _calibrate(_: argparse.Namespace) -> None:
    try:
        from perexfx.bench import calibration  # noqa: PLC0415 (its dependencies are an extra)
    except ModuleNotFoundError as error:
        raise PerexError(f"{error}. Install the extra: pip install 'perexfx[bench]'.") from None
    calibration.run()


def _bench(options: argparse.Namespace) -> None:
    table, names = _asked(options.names)
    if options.rounds < 1:
        raise ArgumentError(f"`--rounds` should be at least 1. Found {options.rounds}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("`--device` should be one that torch sees. Found 'cuda', and torch sees no CUDA device.")
    try:
        from perexfx.bench import layers, peers, scale, suite  # noqa: PLC0415 (their dependencies are an extra)
    except ModuleNotFoundError as error:
        raise PerexError(f"{error}. Install the extra: pip install 'perexfx[bench]'.") from None
    given = (options.rounds, torch.device(options.device), options.out)
    workloads = [WORKLOADS[name] for name in names or WORKLOADS]
    match table:
        case "suite":
            suite.run(workloads, *given)
        case "peers":
            peers.run(workloads, *given)
        case "layers":
            layers.run(*given)
        case _:
            scale.run(*given)


def _asked(names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Table and workloads.

    Raises:
        ArgumentError: One does not exist, or the table has no workloads.
    """
    known = f"The tables are {', '.join(TABLES)}; the workloads are {', '.join(WORKLOADS)}."
    table, workloads = (names[0], names[1:]) if names and names[0] in TABLES else ("suite", names)
    if unknown := [name for name in workloads if name not in WORKLOADS]:
        missing = "table or workload" if unknown[0] == names[0] else "workload"
        raise ArgumentError(f"There is no {missing} {', '.join(unknown)}. {known}")
    if workloads and table not in OF_WORKLOADS:
        raise ArgumentError(f"The table `{table}` has sizes of its own, and takes no workloads. Found {workloads[0]}.")
    return table, workloads

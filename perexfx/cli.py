"""The command line: `python -m perexfx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from perexfx.bench.workloads import WORKLOADS
from perexfx.ir.errors import PerexError


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
    bench = commands.add_parser("bench", help="measure clipped against ordinary steps on this machine")
    bench.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; default: all")
    bench.add_argument("--rounds", type=int, default=15, help="pairs of steps timed for each (default: %(default)s)")
    bench.add_argument("--out", type=Path, help="folder for suite.json with the machine's description")
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
    unknown = [name for name in options.workloads if name not in WORKLOADS]
    if unknown:
        raise PerexError(f"There is no workload {', '.join(unknown)}. The workloads are {', '.join(WORKLOADS)}.")
    if options.rounds < 1:
        raise PerexError(f"`--rounds` should be at least 1. Found {options.rounds}.")
    try:
        from perexfx.bench import suite  # noqa: PLC0415 (its dependencies are an extra)
    except ModuleNotFoundError as error:
        raise PerexError(f"{error}. Install the extra: pip install 'perexfx[bench]'.") from None
    suite.run(options.workloads or list(WORKLOADS), options.rounds, options.out)

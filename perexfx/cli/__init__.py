"""The command line: `perexfx` and `python -m perexfx`.

In come arguments as a shell gives them; out go what the commands print and write, and an exit code. Open `commands.py`
first: a function for each command; `subject.py` finds the model, `wording.py` says errors in the shell's words.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from perexfx.bench.workloads import WORKLOADS
from perexfx.cli.commands import COMMANDS, LOSSES, OF_WORKLOADS, ROUNDS, SIZES, TABLES
from perexfx.cli.wording import in_shell
from perexfx.ir.errors import PerexError

MISTAKE = 2
"""Exit code of whatever the user can mend: what was asked for, the model, or a missing package."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_EXIT_CODES = "Exit codes: 0 fine, 1 a check or proof failed, 2 a mistake in what was asked for, or a refused model."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns: the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except PerexError as error:
        print(f"perexfx: {in_shell(str(error), options)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("perexfx: interrupted", file=sys.stderr)
        return INTERRUPTED


def run() -> int:
    """The program: one command, and what becomes of its output."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"perexfx: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return MISTAKE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perexfx",
        description="Clipped per-example gradients at about the cost of an ordinary step, by rewriting PyTorch graphs.",
        epilog=_EXIT_CODES,
    )
    parsers = parser.add_subparsers(required=True, metavar="command")
    subject = _subject()

    report = parsers.add_parser(
        "report",
        parents=[subject],
        help="what the planner chose at every site, at what cost, and over what",
    )
    report.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    report.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    report.add_argument("--explain", metavar="SITE", help="every strategy for one site instead of the table")
    report.add_argument("--batch-sizes", metavar="N,N,...", help="the plans for these batch sizes side by side")
    report.add_argument("--measure", type=int, metavar="STEPS", help="time so many steps, and show them beside")
    report.add_argument("--verify", action="store_true", help="prove that the step clips, and show that too")
    report.set_defaults(run=COMMANDS["report"])

    visualize = parsers.add_parser("visualize", parents=[subject], help="draw the graph before and after the rewrite")
    visualize.add_argument("path", type=Path, help=".html, .svg, .png, .dot, or .json for Model Explorer")
    visualize.add_argument("--depth", type=int, help="how many levels of modules are unfolded (default: what fits)")
    visualize.set_defaults(run=COMMANDS["visualize"])

    export = parsers.add_parser("export", parents=[subject], help="write the rewritten model as ONNX")
    export.add_argument("path", type=Path, help="the .onnx file")
    export.add_argument("--graph", choices=("forward", "step"), default="forward", help="default: %(default)s")
    export.add_argument("--loss", choices=sorted(LOSSES), help="of the step")
    export.add_argument("--target", metavar="SHAPE", help="of the loss, written as an input: 32:int64:10")
    export.set_defaults(run=COMMANDS["export"])

    verify = parsers.add_parser("verify", parents=[subject], help="prove that every gradient passes the clip node")
    verify.set_defaults(run=COMMANDS["verify"])

    check = parsers.add_parser("check", parents=[subject], help="compare with one example at a time")
    check.add_argument("--examples", type=int, default=4, metavar="N", help="how many (default: %(default)s)")
    check.add_argument("--float32", action="store_true", help="as the model is; default: in float64, which is sharper")
    check.set_defaults(run=COMMANDS["check"])

    calibrate = parsers.add_parser("calibrate", help="measure this machine once, for better plans")
    calibrate.set_defaults(run=COMMANDS["calibrate"])
    _add_bench(parsers)
    demo = parsers.add_parser("demo", help="differentially private training on real images, in under two minutes")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    demo.set_defaults(run=COMMANDS["demo"])
    for command in parsers.choices.values():
        command.epilog = _EXIT_CODES
    return parser


def _subject() -> argparse.ArgumentParser:
    """What commands on a model have in common."""
    subject = argparse.ArgumentParser(add_help=False)
    subject.add_argument("model", help="package.module:factory or file.py:factory, a module or what makes one")
    model = subject.add_argument_group("the model")
    model.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="one for each input, batch included: 32x3x224x224, 32x128:int64:30522 (below 30522), mask=32x128:bool",
    )
    model.add_argument("--eval", action="store_true", help="in eval mode")
    model.add_argument("--replace-batchnorm", action="store_true", help="put GroupNorm in place of BatchNorm first")
    options = subject.add_argument_group("the transform")
    options.add_argument("--clip-norm", default="1.0", metavar="C", help="or none (default: %(default)s)")
    options.add_argument("--clipping", choices=("flat", "automatic", "per_layer"), default="flat")
    options.add_argument(
        "--strategy",
        action="append",
        default=[],
        metavar="NAME",
        help="for all sites, or site=name (repeat it)",
    )
    options.add_argument("--memory-budget", metavar="BYTES", help="500000, 64MB, 1.5GiB (default: none)")
    options.add_argument("--batch-dim", type=int, default=0, help="the example axis (default: %(default)s)")
    options.add_argument("--cost-model", choices=("profile", "measured"), default="profile")
    return subject


def _add_bench(parsers: argparse._SubParsersAction) -> None:
    bench = parsers.add_parser("bench", help="measure clipped steps, and what they stand on, on this machine")
    bench.add_argument(
        "names",
        nargs="*",
        metavar="table or workload",
        help=f"a table ({', '.join(TABLES)}; default: suite), then, for "
        f"{' and '.join(OF_WORKLOADS)}, workloads ({', '.join(WORKLOADS)}; default: all)",
    )
    bench.add_argument("--rounds", type=int, help=f"how many times each step is timed (default: {ROUNDS})")
    bench.add_argument(
        "--size",
        choices=SIZES,
        help="of rochette (Rochette et al. 2019: naive, multi, crb) and leekifer (Lee & Kifer 2021: nxBP, MultiLoss, "
        "ReweightGP): small (under 5 minutes on two cores), medium, or full, as published (default: small)",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    bench.add_argument("--out", type=Path, help="folder for the table as .json (all timings), .md and .png")
    bench.set_defaults(run=COMMANDS["bench"])

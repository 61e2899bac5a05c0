"""The commands: each takes parsed options, and returns the exit code."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import perexfx
from perexfx.bench.workloads import WORKLOADS
from perexfx.cli.subject import bytes_of, inputs_of, model_named, running
from perexfx.ir.errors import ArgumentError, PerexError, RefusedError
from perexfx.runtime import Transformed
from perexfx.views.files import make_folder

DISAGREES = 1
"""Exit code of a check or proof that fails."""

TABLES = ("suite", "peers", "layers", "scale", "downsample", "rochette", "leekifer")
PAPERS = ("rochette", "leekifer")
SIZES = ("small", "medium", "full")
ROUNDS = 15
"""How many times each step is timed, where nothing else is asked for."""
OF_WORKLOADS = ("suite", "peers")
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}


def report(options: argparse.Namespace) -> int:
    """Prints the strategy report, and writes it where asked to."""
    if options.batch_sizes is not None and (options.explain or options.verify or options.measure is not None):
        raise ArgumentError(
            "`--explain`, `--verify` and `--measure` are for one batch size. Leave out `--batch-sizes`."
        )
    gm, inputs = _transformed(options)
    if options.batch_sizes is not None:
        found: Any = perexfx.report(gm, batch_sizes=_numbers(options.batch_sizes))
    else:
        if options.measure is not None:
            with running("A step"):
                perexfx.profile(gm, _any_loss, inputs, None, steps=options.measure)
        if options.verify:
            perexfx.verify(gm)
        found = perexfx.report(gm)
    if options.explain:
        print(found.explain(options.explain))
    elif not options.html and not options.json:
        _show(found)
    for path, write in ((options.html, found.to_html), (options.json, found.to_json)):
        if path:
            write(path)
            print(path)
    return 0


def visualize(options: argparse.Namespace) -> int:
    """Draws the graph of the rewrites; of a refused model what was captured, with the culprits."""
    try:
        gm, _ = _transformed(options)
    except RefusedError as error:
        if error.graph is None:
            raise
        print(perexfx.visualize(error, options.path, depth=options.depth))
        raise
    print(perexfx.visualize(gm, options.path, depth=options.depth))
    return 0


def export(options: argparse.Namespace) -> int:
    """Writes the forward, or the whole step, as ONNX."""
    given = [value for value in (options.loss, options.target) if value is not None]
    if len(given) != (2 if options.graph == "step" else 0):
        needs = "needs `--loss` and `--target`" if options.graph == "step" else "takes no `--loss` and no `--target`"
        raise ArgumentError(f"`--graph {options.graph}` {needs}.")
    gm, inputs = _transformed(options)
    step: dict[str, Any] = {}
    if options.graph == "step":
        targets = inputs_of([options.target])
        if isinstance(targets, dict):
            raise ArgumentError(f"`--target` has no name. Found {options.target!r}.")
        step = {"loss_fn": LOSSES[options.loss], "targets": targets[0]}
        with running("A step"):
            step["loss_fn"](gm(**inputs) if isinstance(inputs, dict) else gm(*inputs), step["targets"])
    print(perexfx.export_onnx(gm, options.path, inputs, graph=options.graph, **step))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Prints what is proved of the step."""
    gm, _ = _transformed(options)
    try:
        print(perexfx.verify(gm))
    except perexfx.ProofError as error:
        print(error)
        return DISAGREES
    return 0


def check(options: argparse.Namespace) -> int:
    """Compares with one example at a time, in float64 unless told otherwise."""
    model, inputs = _model(options), _inputs(options)
    if not options.float32:
        model = model.double()
        inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    gm = perexfx.transform(model, inputs, **_settings(options))
    with running("The check"):
        found = perexfx.check(gm, inputs, model=model, examples=options.examples)
    print(found)
    return 0 if found else DISAGREES


def calibrate(_: argparse.Namespace) -> int:
    """Measures this machine."""
    try:
        from perexfx.bench import calibration  # noqa: PLC0415 (its dependencies are an extra)
    except ModuleNotFoundError as error:
        raise _missing(error, "bench") from None
    calibration.run()
    return 0


def bench(options: argparse.Namespace) -> int:
    """Measures clipped steps, and what they stand on."""
    table, names = _asked(options.names)
    if options.rounds is not None and options.rounds < 1:
        raise ArgumentError(f"`--rounds` should be at least 1. Found {options.rounds}.")
    if table in PAPERS and options.rounds is not None:
        raise ArgumentError(f"`{table}` has the paper's trials. Leave out `--rounds`, or take another `--size`.")
    if table not in PAPERS and options.size is not None:
        raise ArgumentError(f"`--size` is for {' and '.join(PAPERS)}. Found it with `{table}`.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("`--device` should be one that torch sees. Found 'cuda', and torch sees no CUDA device.")
    try:
        from perexfx.bench import downsampled, layers, leekifer, peers, rochette, scale, suite  # noqa: PLC0415 (extras)
    except ModuleNotFoundError as error:
        raise _missing(error, "bench") from None
    if options.out is not None:
        make_folder(options.out)  # before anything is measured
    device = torch.device(options.device)
    given = (options.rounds or ROUNDS, device, options.out)
    of_workloads = {"suite": suite.run, "peers": peers.run}
    of_papers = {"rochette": rochette.run, "leekifer": leekifer.run}
    others = {"layers": layers.run, "scale": scale.run, "downsample": downsampled.run}
    if table in of_workloads:
        of_workloads[table]([WORKLOADS[name] for name in names or WORKLOADS], *given)
    elif table in of_papers:
        of_papers[table](options.size or "small", device, options.out)
    else:
        others[table](*given)
    return 0


def demo(options: argparse.Namespace) -> int:
    """Trains a small CNN on real images, with and without clipping, and leaves every view of it behind."""
    try:
        from perexfx.demo import run  # noqa: PLC0415 (its dependencies are an extra)
    except ModuleNotFoundError as error:
        raise _missing(error, "demo") from None
    run(options.out)
    return 0


def _missing(error: ModuleNotFoundError, extra: str) -> PerexError:
    return PerexError(f"{error}. Install the extra: pip install 'perexfx[{extra}]'.")


def _asked(names: list[str]) -> tuple[str, list[str]]:
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


def _transformed(options: argparse.Namespace) -> tuple[Transformed, Any]:
    """The model that the options name, transformed, and the inputs."""
    model, inputs = _model(options), _inputs(options)
    return perexfx.transform(model, inputs, **_settings(options)), inputs


def _model(options: argparse.Namespace) -> Any:
    model = model_named(options.model)
    model.train(not options.eval)
    if options.replace_batchnorm:
        perexfx.replace_batchnorm(model, report=logging.getLogger("perexfx").info)
    return model


def _inputs(options: argparse.Namespace) -> Any:
    inputs = inputs_of(options.input)
    if inputs is None:
        raise ArgumentError("Name the model's inputs by their shapes: `--input 32x3x224x224`, the batch first.")
    return inputs


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `transform` takes besides model and inputs."""
    return {
        "clip_norm": None if options.clip_norm == "none" else _number(options.clip_norm),
        "clipping": options.clipping,
        "strategy": _strategy(options.strategy),
        "memory_budget": None if options.memory_budget is None else bytes_of(options.memory_budget),
        "batch_dim": options.batch_dim,
        "cost_model": options.cost_model,
    }


def _strategy(given: list[str]) -> str | dict[str, str]:
    """One name for all sites, or site=name for some."""
    if not given:
        return "auto"
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    if any(one.find("=") < 1 for one in given):
        raise ArgumentError(f"`--strategy` is one name, or site=name for each site. Found {' '.join(given)}.")
    return dict(one.rsplit("=", 1) for one in given)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"`--clip-norm` should be a positive number, or none. Found {text!r}.") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"`--batch-sizes` should be numbers with commas between. Found {text!r}.") from None


def _any_loss(output: Any, _: Any) -> Tensor:
    """For timing: the mean square of everything that has a gradient."""
    parts = [tensor.square().mean() for tensor in pytree.tree_leaves(output) if _has_gradient(tensor)]
    if not parts:
        raise ArgumentError("The model's output has no gradient, so there is no step to time. Leave out `--measure`.")
    return torch.stack(parts).sum()


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _show(found: Any) -> None:
    """In colours where rich is installed and someone looks; as plain text otherwise."""
    try:
        from rich.console import Console  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError:
        print(found)
        return
    console = Console()
    if console.is_terminal:
        console.print(found)
    else:
        print(found)


COMMANDS = {command.__name__: command for command in (report, visualize, export, verify, check, calibrate, bench, demo)}
"""By name."""

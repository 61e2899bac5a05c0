"""The command line does what the functions do, and says what is wrong without a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import perexfx
from perexfx.cli import main
from perexfx.cli.subject import Given, bytes_of, inputs_of
from perexfx.cli.wording import in_shell

NETS = """
import torch
from torch import nn

def cnn():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

def normed():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(100, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        return self.head((self.table(ids) * mask.unsqueeze(-1)).mean(1))

class Holder:
    made = cnn()

def broken():
    raise RuntimeError("no weights")

def leaves():
    raise SystemExit(3)

number = 3

def dropped():
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout())

class Largest(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(1)

def largest():
    return Largest(3, 3)

class Functional(nn.Linear):
    def forward(self, x):
        return nn.functional.batch_norm(super().forward(x), None, None, training=True)

def functional():
    return Functional(3, 3)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "some_nets.py"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


IMAGES = ("--input", "4x3x8x8")


# What the commands do


def test_report(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "report", f"{nets}:cnn", *IMAGES, "--clip-norm", "0.5")
    assert code == 0
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    exec(NETS, namespace)
    gm = perexfx.transform(namespace["cnn"](), torch.zeros(4, 3, 8, 8), clip_norm=0.5)  # pyright: ignore
    assert out == f"{perexfx.report(gm)}\n"
    assert run(capsys, "report", "some_nets:cnn", *IMAGES, "--clip-norm", "0.5")[1] == out
    _, explained, _ = run(capsys, "report", f"{nets}:cnn", *IMAGES, "--explain", "0")
    assert explained.startswith("0: conv2d")
    _, sweep, _ = run(capsys, "report", f"{nets}:Holder.made", *IMAGES, "--batch-sizes", "1,64")
    assert "us per example" in sweep


def test_report_as_files(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--html", "report.html", "--json", "report.json")
    code, out, _ = run(capsys, "report", f"{nets}:cnn", *IMAGES, *files, "--measure", "1", "--verify")
    assert (code, out) == (0, "report.html\nreport.json\n")
    found = json.loads(Path("report.json").read_text())
    assert found["batch_size"] == 4
    assert found["proof"].startswith("Proved")
    assert found["measured"].startswith("ordinary step")
    assert "Strategy report" in Path("report.html").read_text()


def test_visualize(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "visualize", f"{nets}:cnn", "graph.dot", *IMAGES, "--depth", "0")
    assert (code, out) == (0, "graph.dot\n")
    assert "digraph" in Path("graph.dot").read_text()
    code, out, err = run(capsys, "visualize", f"{nets}:normed", "refused.html", *IMAGES)
    assert (code, out) == (2, "refused.html\n")
    assert err.startswith("perexfx: `batch_norm` in module `1`")
    assert "refused" in Path("refused.html").read_text()
    code, *_ = run(capsys, "visualize", f"{nets}:normed", "graph.html", *IMAGES, "--replace-batchnorm")
    assert code == 0
    assert run(capsys, "visualize", f"{nets}:normed", "graph.html", *IMAGES, "--eval")[0] == 0


def test_export(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "export", f"{nets}:cnn", "model.onnx", *IMAGES)
    assert (code, out) == (0, "model.onnx\n")
    onnx.checker.check_model("model.onnx", full_check=True)
    step = ("--graph", "step", "--loss", "cross_entropy", "--target", "4:int64:10")
    assert run(capsys, "export", f"{nets}:cnn", "step.onnx", *IMAGES, *step)[0] == 0
    names = {value.name for value in onnx.load("step.onnx").graph.output}
    assert {"loss", "norms", "grad.0.weight", "grad.4.bias"} <= names


def test_verify(nets: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, "verify", f"{nets}:cnn", *IMAGES)
    assert code == 0
    assert out.startswith("Proved on the dataflow of a step of 4")

    def unproved(_: nn.Module) -> None:
        raise perexfx.ProofError("The gradient of `0.weight` is not clipped.")

    monkeypatch.setattr(perexfx, "verify", unproved)
    assert run(capsys, "verify", f"{nets}:cnn", *IMAGES)[:2] == (1, "The gradient of `0.weight` is not clipped.\n")


def test_check(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ("--input", "ids=4x5:int64:100", "--input", "mask=4x5")
    code, out, _ = run(capsys, "check", f"{nets}:Tokens", *inputs, "--examples", "3")
    assert code == 0
    assert out.startswith("perexfx check: ok, 3 examples one at a time by the model")
    assert "tolerance 1e-09" in out
    assert "tolerance 1e-04" in run(capsys, "check", f"{nets}:Tokens", *inputs, "--float32")[1]


def test_a_check_that_fails(nets: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from perexfx.ir.factors import Product
    from perexfx.ir.kept import Kept

    for factors in (Product, Kept):
        monkeypatch.setattr(factors, "weighted_sum", lambda self, weights: 2 * self.gradients().sum(0))
    code, out, _ = run(capsys, "check", f"{nets}:cnn", *IMAGES)
    assert code == 1
    assert out.startswith("perexfx check: FAILED") or "4.weight" in out


def test_strategies_and_budgets(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "report", f"{nets}:cnn", *IMAGES, "--strategy", "0=gram", "--strategy", "4=materialize")
    assert [line.split()[-1] for line in out.splitlines() if "was asked for" in line]
    _, out, _ = run(capsys, "report", f"{nets}:cnn", *IMAGES, "--memory-budget", "1.5MB", "--clip-norm", "none")
    assert "memory budget 1.50 MB" in out
    assert "nothing is clipped" in out
    _, out, _ = run(capsys, "report", f"{nets}:cnn", *IMAGES, "--strategy", "gram", "--clipping", "per_layer")
    assert "per-layer clipping" in out


# What is wrong is said

STEP = ("export", "some_nets.py:cnn", "m.onnx", *IMAGES, "--graph", "step", "--loss", "cross_entropy", "--target")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nets"), "A model is named as package.module:factory or file.py:factory. Found 'nets'."),
        (("report", "nowhere.py:cnn"), "There is no file 'nowhere.py'."),
        (("report", "no.such.package:cnn"), "'no.such.package' cannot be imported: ModuleNotFoundError: No module"),
        (
            ("report", "some_nets.py:tail", *IMAGES),
            "There are Functional, Holder, Largest, Tokens, broken, cnn, dropped, functional, largest, leaves, normed.",
        ),
        (("report", "some_nets.py:broken", *IMAGES), "could not be made: RuntimeError: no weights at some_nets.py:23."),
        (("report", "some_nets.py:number", *IMAGES), "should be or return a torch.nn.Module. Found int."),
        (("report", "some_nets.py:cnn"), "Name the model's inputs by their shapes: `--input 32x3x224x224`"),
        (("report", "some_nets.py:cnn", "--input", "4by3"), "An input is written as its shape"),
        (("report", "some_nets.py:cnn", "--input", "4x3:int3"), "Dtypes are float16, bfloat16, float32, float64"),
        (("check", "some_nets.py:Tokens", "--input", "ids=4x5", "--input", "4x5"), "Name all inputs, or none."),
        (("report", "some_nets.py:cnn", *IMAGES, "--clip-norm", "much"), "`--clip-norm` should be a positive number"),
        (("report", "some_nets.py:cnn", *IMAGES, "--clip-norm", "-1"), "number, or none to clip nothing."),
        (("report", "some_nets.py:cnn", *IMAGES, "--memory-budget", "lots"), "A memory budget is written as 500000"),
        (("report", "some_nets.py:cnn", *IMAGES, "--strategy", "best"), "There is no strategy 'best'."),
        (("report", "some_nets.py:cnn", *IMAGES, "--strategy", "gram", "--strategy", "0=gram"), "`--strategy` is one"),
        (("report", "some_nets.py:cnn", *IMAGES, "--strategy", "=gram"), "`--strategy` is one name, or site=name"),
        (("report", "some_nets.py:cnn", "--input", "9999999999x4x9"), "has no room in memory. Give a smaller one."),
        (("report", "some_nets.py:cnn", "--input", "99999999999999999999x4"), "has no room in memory"),
        (("bench", "mlp", "--out", "some_nets.py"), "`--out` should be a folder that can be written"),
        (("report", "some_nets.py:cnn", *IMAGES, "--batch-sizes", "few"), "`--batch-sizes` should be numbers"),
        (("report", "some_nets.py:cnn", *IMAGES, "--batch-sizes", "1", "--explain", "0"), "Leave out `--batch-sizes`"),
        (("report", "some_nets.py:cnn", *IMAGES, "--batch-sizes", "1", "--verify"), "are for one batch size"),
        (("report", "some_nets.py:cnn", *IMAGES, "--measure", "0"), "`--measure` should be a positive number."),
        (("report", "some_nets.py:leaves", *IMAGES), "could not be made: SystemExit: 3"),
        (("export", "some_nets.py:cnn", "m.onnx", *IMAGES, "--loss", "mse"), "takes no `--loss`"),
        ((*STEP, "5:int64:10"), "A step fails: ValueError: Expected input batch_size"),
        ((*STEP, "y=4:int64:10"), "`--target` has no name. Found 'y=4:int64:10'."),
        (
            ("check", "some_nets.py:Tokens", "--input", "ids=4x5:int64:900", "--input", "mask=4x5"),
            "The check fails: Index",
        ),
        (("report", "some_nets.py:cnn", *IMAGES, "--explain", "9"), "There is no site '9'. The sites are 0, 1, 4."),
        (("demo", "--out", "some_nets.py"), "`--out` should be a folder that can be written. Found"),
        (("report", "some_nets.py:cnn", *IMAGES, "--html", "no/where.html"), "`--html` should be a file that can be"),
        (("report", "some_nets.py:cnn", *IMAGES, "--html", "a.html", "--json", "no/b"), "`--json` should be a file"),
        (("visualize", "some_nets.py:cnn", "graph.pdf", *IMAGES), "`path` should end in one of .html, .dot"),
        (("export", "some_nets.py:cnn", "m.onnx", *IMAGES, "--graph", "step"), "needs `--loss` and `--target`"),
        (("export", "some_nets.py:cnn", "m.onnx", *IMAGES, "--loss", "mse", "--target", "4"), "takes no `--loss`"),
        (("report", "some_nets.py:normed", *IMAGES), "is BatchNorm in training mode"),
    ],
)
def test_mistakes(nets: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("perexfx: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("report normed", "by GroupNorm with `--replace-batchnorm`, which does so for all such layers, or freeze"),
        ("report normed", "freeze its statistics with `--eval`, which has the whole model in eval mode."),
        ("report functional", "`--replace-batchnorm` cannot replace a call of a function: write"),
        ("report cnn --strategy reweight --memory-budget 1", "No plan fits the 1 bytes of `--memory-budget`. The"),
        ("report cnn --input y=4x3", "`--input` does not fit `Sequential.forward(input)`: missing a required argument"),
        ("report cnn --input y=4x3", "Give one `--input` for each argument, in order or all by name."),
        ("report cnn --input scalar", "Give inputs with the examples on the axis that `--batch-dim` names."),
        ("report cnn --batch-dim -1", "`--batch-dim` should be an axis counted from the front. Found -1."),
        ("report cnn --batch-sizes 0", "`--batch-sizes` should be positive numbers. Found [0]."),
        ("visualize cnn graph.dot --depth -1", "`--depth` should be a number of levels. Found -1."),
        ("verify cnn --input 0x3x8x8", "The last batch had no examples, and its step has no paths. Give an `--input`"),
        ("check cnn --input 0x3x8x8", "`--input` has no examples. Pass a batch of one at least; several show"),
        ("check cnn --examples 0", "`--examples` should be a positive number. Found 0."),
        ("check largest", "A loss of your own can be passed in Python alone, to `perexfx.check`."),
        ("export dropped m.onnx", "Pass `--eval`, if that is dropout; else"),
        ("export Tokens m.onnx --input ids=4x5:int64:900 --input mask=4x5", "The forward fails on `--input`: Index"),
        ("export largest m.onnx --graph step --loss mse --target 4", "`--loss` should return a loss that depends on a"),
    ],
)
def test_what_is_wrong_is_said_of_options(
    nets: str, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    command, model, *options = arguments.split()
    if "--input" not in options:
        options += IMAGES if model in ("cnn", "normed") else ("--input", "4x3")
    code, _, err = run(capsys, command, f"{nets}:{model}", *options)
    assert code == 2
    assert message in err
    assert not re.search(r"`\w+_\w+`(?= should| does| has)|memory_budget|example_inputs|loss_fn|\.eval\(\)", err)


def test_without_a_traceback(nets: str) -> None:
    command = [sys.executable, "-m", "perexfx", "report", f"{nets}:broken", *IMAGES]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2

    assert found.stderr.endswith("could not be made: RuntimeError: no weights at some_nets.py:23.\n")
    assert len(found.stderr.splitlines()) == 1


def test_output_that_nobody_reads_or_that_has_no_room(nets: str) -> None:
    command = f"{sys.executable} -m perexfx report {nets}:cnn {' '.join(IMAGES)}"
    found = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True, check=False)
    assert found.stderr == ""
    if Path("/dev/full").exists():
        found = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (
            2,
            "perexfx: the output cannot be written: No space left on device.\n",
        )


def test_interrupted(nets: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(perexfx, "transform", interrupted)
    code, _, err = run(capsys, "report", f"{nets}:cnn", *IMAGES)
    assert (code, err) == (130, "perexfx: interrupted\n")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("report", "visualize", "export", "verify", "check", "calibrate", "bench", "demo"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert f"perexfx {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit codes: 0 fine" in capsys.readouterr().out


# Parts


def test_names_of_the_model_stay_its_own() -> None:
    options = Namespace(html=Path("a.html"), model="net:Net")
    for message in (
        "`inputs` (net.py:3) combines different examples: it reduces over the example axis.",
        "Parameter `steps` is used by `depth` in module `path` (net.py:4), which no layer rule covers.",
        "`path` should be a file that can be written. Found 'b.onnx': No such file or directory.",
    ):
        assert in_shell(message, options) == message
    again = "Raise `memory_budget`, or name another strategy than 'reweight' for them."
    assert in_shell(again, options) == "Raise `--memory-budget`, or name another `--strategy` than 'reweight' for them."


def test_inputs() -> None:
    assert Given.parse("mask=2x3:bool") == Given("mask", (2, 3), torch.bool, 2)
    images, ids, scale = inputs_of(["2x3", "4:int64:7", "scalar:float64"])
    assert (images.shape, images.dtype) == ((2, 3), torch.float32)
    assert (ids.shape, ids.dtype) == ((4,), torch.int64)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 7
    assert (scale.shape, scale.dtype) == ((), torch.float64)
    assert torch.equal(inputs_of(["2x3"])[0], inputs_of(["2x3"])[0])
    assert inputs_of(["a=2", "b=3"]).keys() == {"a", "b"}
    assert inputs_of([]) is None


@pytest.mark.parametrize(
    ("text", "count"), [("500", 500), ("64MB", 64_000_000), ("1.5GiB", 1_610_612_736), ("2 kb", 2000)]
)
def test_bytes(text: str, count: int) -> None:
    assert bytes_of(text) == count

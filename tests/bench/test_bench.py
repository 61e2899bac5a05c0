"""Tables of the bench: what they say about made-up numbers, and that every one of them runs, on tiny inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import perexfx
from perexfx import kernels
from perexfx.bench import layers, leekifer, libraries, models, peers, rochette, scale, suite
from perexfx.bench.families import Family, Size
from perexfx.bench.libraries import PEERS, Peer, clip_factors
from perexfx.bench.measure import FEWEST, Timing, in_turn, timed
from perexfx.bench.memory import peak_allocation, peak_of_process
from perexfx.bench.steps import Setup, Step, ordinary, set_up
from perexfx.bench.workloads import WORKLOADS, Workload, numbers, tokens
from perexfx.cli import main
from perexfx.ir.cost import Cost, Work
from perexfx.ir.cost_model import Machine, Rate
from perexfx.ir.factors import GradientSignature, ProductSignature
from perexfx.machine.calibrate import Observation
from perexfx.steps import compiled

CPU = torch.device("cpu")
TINY = numbers("tiny", partial(models.mlp, (6, 5, 10)), 4, 6)


def files_of(table: str, folder: Path) -> dict:
    """The table's numbers; its other files are there, and can be read."""
    assert {path.name for path in folder.iterdir()} == {f"{table}.json", f"{table}.md", f"{table}.png"}
    assert imread(folder / f"{table}.png").shape[1] == 1200
    found = json.loads((folder / f"{table}.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    title, _, machine, *_ = (folder / f"{table}.md").read_text().splitlines()
    assert title.startswith("# ")
    assert torch.__version__ in machine
    return found


def rows_of(path: Path) -> list[list[str]]:
    """The cells of a table in Markdown, without headings."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return rows[2:]


# times and memory


def test_a_ratio_is_taken_within_the_round() -> None:
    timing = Timing({"ordinary": (1.0, 10.0, 2.0), "clipped": (2.0, 20.0, 6.0)})
    assert timing.median("ordinary") == 2
    assert timing.ratio("clipped") == 2


def test_steps_are_taken_in_turn() -> None:
    order: list[str] = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    every = list(in_turn(steps, 5))
    assert order == ["a", "b"] * (len(order) // 2)
    assert [len(timing.seconds["b"]) for timing in every] == [1, 2, 3, 4, 5]


def test_slow_steps_are_timed_less_often() -> None:
    assert len(timed({"a": lambda: None}, 100, limit=0).seconds["a"]) == FEWEST


def test_what_a_run_allocates_is_the_most_there_is_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first, second
        return torch.zeros(500)

    run()
    assert peak_allocation(run, CPU) == 4 * 3000


def test_a_process_of_its_own_says_its_peak() -> None:
    workload = numbers("large", partial(models.mlp, (10_000_000 // 50, 50, 10)), 2, 10_000_000 // 50)
    small, large = (peak_of_process(w, ordinary, CPU) for w in (TINY, workload))
    assert large - small > 2 * 40e6  # weights and their gradients


# suite


def test_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiled, "COMPILED_NODES", 0)  # a compiler takes longer than all else here
    monkeypatch.setattr(suite, "peak_of_process", lambda _, make, __: 200 if make is ordinary else 300)
    small = numbers("small", partial(models.mlp, (6, 5, 10)), 4, 6, is_small=True)
    eager, whole = suite.run([TINY, small], 2, CPU, tmp_path)
    assert eager.way == ""
    assert eager.ratio == eager.timing.ratio("clipped")
    assert whole.way in ("eager", "graph")
    assert whole.ratio == whole.timing.ratio("compiled")
    found = files_of("suite", tmp_path)
    assert [result["way"] for result in found["results"]] == ["", whole.way]
    assert found["geometric_mean"] == pytest.approx((eager.ratio * whole.ratio) ** 0.5)
    shown = capsys.readouterr().out
    assert f"{found['geometric_mean']:.3f}" in shown
    assert "the compiled step for small" in shown
    assert [(row[0], row[9]) for row in rows_of(tmp_path / "suite.md")] == [("tiny", "1.500"), ("small", "1.500")]
    assert all(result.added == pytest.approx(result.predicted_added, abs=2000) for result in (eager, whole))


def test_workloads_that_are_mostly_python_are_compiled() -> None:
    assert [name for name, workload in WORKLOADS.items() if workload.is_small] == ["mlp", "cnn-26k", "lstm-128"]


# peers


def forgets_to_clip(setup: Setup, clip_norm: float) -> Step:
    return ordinary(setup)


def forgets_a_parameter(setup: Setup, clip_norm: float) -> Step:
    step = libraries.vmapped(setup, clip_norm)

    def forgetful() -> None:
        step()
        setup.parameters[-1].grad = None

    return forgetful


def refuses(setup: Setup, clip_norm: float) -> Step:
    raise NotImplementedError("no rule for\nthis layer")


def test_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = [
        PEERS[0],
        Peer("fake", forgets_to_clip),
        Peer("forgetful", forgets_a_parameter),
        Peer("picky", refuses),
        Peer("absent", forgets_to_clip, "no_such_package", "no-such-package"),
    ]
    (result,) = peers.run([TINY], 2, CPU, tmp_path, ways)
    right, fake, forgetful, picky, absent = result.outcomes
    assert right.problem == ""
    assert right.ratio is not None
    assert right.ratio > 0
    assert fake.problem.startswith("wrong: gradients differ in 4 of 4 parameters")
    assert forgetful.problem == "wrong: gradients differ in 1 of 4 parameters, by 100% of theirs at most"
    assert picky.problem == "refuses: no rule for this layer"
    assert absent.problem == "not installed: pip install no-such-package"
    assert {outcome.ratio for outcome in (fake, forgetful, picky, absent)} == {None}
    assert files_of("peers", tmp_path)["results"][0]["outcomes"][1]["problem"] == fake.problem
    assert rows_of(tmp_path / "peers.md")[0][-4:] == ["wrong", "wrong", "refuses", "not installed"]
    assert fake.problem in capsys.readouterr().out


IMAGES = numbers("images", models.small_cnn, 3, 1, 28, 28)
TOKENS = tokens("tokens", partial(models.LanguageModel, 20, 8, 1, 2, 5), 3, 5, 20)


@pytest.mark.parametrize("workload", [TINY, IMAGES, TOKENS], ids=lambda workload: workload.name)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_is_right_or_refuses(peer: Peer, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    if not peer.is_installed:
        pytest.skip(f"{peer.package} is an extra")
    monkeypatch.setattr(peers, "peak_of_process", lambda *_: 1)
    expected = peers.expected_of(workload, CPU)
    found = peers.outcome(peer, workload, expected, 1, CPU)
    assert not found.problem.startswith("wrong")
    if workload is TOKENS and peer.package:  # positions without an example axis; layers that BackPACK leaves out
        assert found.problem.startswith("refuses")
    else:
        assert found.problem == ""


def test_half_of_the_examples_are_clipped() -> None:
    setup = set_up(TINY, CPU)
    norms = perexfx.engines.one_by_one(setup.model, setup.loss, setup.inputs, setup.targets, clip_norm=1.0).norms
    clip_norm = peers.expected_of(TINY, CPU).clip_norm
    assert int((clip_factors(norms, clip_norm) < 1).sum()) == 2


def test_the_expected_gradients_are_those_of_the_check() -> None:
    setup = set_up(TINY, CPU)
    every = perexfx.per_example_grads(setup.model, setup.loss, setup.inputs, setup.targets)
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in every.values()]).norm(dim=0)
    expected = peers.expected_of(TINY, CPU)
    factors = clip_factors(norms, expected.clip_norm) / setup.n
    for gradient, *found in zip(every.values(), *expected.gradients, strict=True):
        for value in found:
            torch.testing.assert_close(value.float(), torch.einsum("n,n...->...", factors, gradient))


# layers


def observed(*timings: tuple[str, int, float]) -> layers.Case:
    """Strategies by name, predicted and measured seconds."""
    seen = [Observation("size", name, Cost((Work("a", calls=calls),), 0), seconds) for name, calls, seconds in timings]
    return layers.Case(GradientSignature(2, (3,)), seen, {name: 0 for name, _, _ in timings})


SECONDS = Machine("seconds", {"a": Rate(1, 1, 1.0)})


def test_regret_is_the_price_of_the_choice() -> None:
    case = observed(("x", 1, 3.0), ("y", 2, 2.0), ("z", 3, 9.0))
    assert case.chosen(SECONDS).name == "x"
    assert case.best.name == "y"
    assert case.regret(SECONDS) == pytest.approx(1.5)


def test_choices_that_seem_bad_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []

    def again(rivals: Sequence[object], *_: object) -> dict[str, float]:
        taken.append([rival.name for rival in rivals])
        return {"materialize": 5.0, "loop": 5.5}

    monkeypatch.setattr(layers, "measure", again)
    case = observed(("materialize", 1, 3.0), ("gram", 3, 9.0), ("loop", 2, 2.0))
    found = layers.remeasured(case, [SECONDS], 4, CPU)
    assert taken == [["materialize", "loop"]] * 4
    assert {seen.name: seen.seconds for seen in found.observations} == {"materialize": 5.0, "gram": 9.0, "loop": 5.5}
    assert found.regret(SECONDS) == 1
    assert layers.remeasured(found, [SECONDS], 4, CPU) is found


def test_layers(tmp_path: Path) -> None:
    grid = [GradientSignature(3, (7,)), *(ProductSignature(n, 1, 40, 50, 60, (60, 50)) for n in (2, 4))]
    cases = layers.run(1, CPU, tmp_path, grid)
    assert [case.signature for case in cases] == grid
    found = files_of("layers", tmp_path)
    assert list(found["quality"]) == ["built-in profile"]
    assert len(rows_of(tmp_path / "layers.md")) == 2  # one per layer, at its worst batch size
    chosen = [row["case"] for row in found["cases"] if row["is_chosen"]]
    assert chosen == [layers.describe(signature) for signature in grid]


def test_bytes_are_those_of_what_is_made_and_kept() -> None:
    layer = ProductSignature(8, 1, 40, 50, 60, (60, 50), has_kernels=kernels.are_built())
    (case,) = layers.run(1, CPU, None, [layer])
    assert case.allocated["materialize"] >= 4 * 8 * 50 * 60
    assert case.allocated["gram"] >= 4 * 8 * 40 * (50 + 60)
    for seen in case.observations:
        assert case.allocated[seen.name] == pytest.approx(layers.predicted_bytes(seen.cost), rel=0.2)


def test_sizes_of_the_grid_differ_in_words() -> None:
    grid = layers.all_sizes()
    assert len({layers.describe(signature) for signature in grid}) == len(grid)


# scale


@pytest.mark.parametrize("power", [0, 0.5, 1, 2, 3.25])
def test_exponents_of_exact_powers(power: float) -> None:
    sizes = [3, 6, 12, 24]
    assert scale.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


def test_scale(tmp_path: Path) -> None:
    def make(batch: int, width: int) -> Workload:
        return numbers("", partial(models.mlp, (width, width, 10)), batch, width)

    family = Family("MLP", make, {"batch": Size(2, 2), "width": Size(4, 1)})
    batch, width = scale.run(1, CPU, tmp_path, [family])
    assert batch.values == [2, 4, 8]
    assert width.values == [4, 8]
    found = files_of("scale", tmp_path)
    assert {sweep["size"]: len(sweep["points"]) for sweep in found["sweeps"]} == {"batch": 3, "width": 2}
    memory = found["sweeps"][1]["exponents"]["ordinary memory"]
    assert 0 < memory < 2.5
    assert [row[:2] for row in rows_of(tmp_path / "scale.md")] == [["MLP, batch", "2 - 8"], ["MLP, width", "4 - 8"]]


def test_families_grow_one_size_at_a_time() -> None:
    for family in scale.FAMILIES:
        for name, size in family.sizes.items():
            assert size.values[0] == size.base
            setup = set_up(family.at(name, size.values[1]), CPU)
            scaled, base = setup.n, family.sizes["batch"].base
            assert scaled == (2 * base if name == "batch" else base)


# command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no table or workload nothing"),
        (["peers", "mlp", "nothing"], "no workload nothing"),
        (["layers", "mlp"], "takes no workloads"),
        (["scale", "mlp"], "takes no workloads"),
        (["--rounds", "0"], "`--rounds`"),
        (["rochette", "mlp"], "takes no workloads"),
        (["rochette", "--rounds", "3"], "`rochette` has the paper's trials"),
        (["suite", "--size", "small"], "`--size` is for rochette and leekifer"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    if "no " in message and "takes" not in message:
        assert (
            "The tables are suite, peers, layers, scale, downsample, rochette, leekifer; the workloads are mlp, "
            in said
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "table", "workloads"),
    [
        ([], suite, list(WORKLOADS)),
        (["mlp"], suite, ["mlp"]),
        (["suite", "mlp", "lstm-128"], suite, ["mlp", "lstm-128"]),
        (["peers", "cnn-26k"], peers, ["cnn-26k"]),
        (["layers"], layers, None),
        (["scale"], scale, None),
    ],
)
def test_tables_by_name(
    arguments: list[str], table: object, workloads: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr(table, "run", lambda *arguments: given.extend(arguments))
    assert main(["bench", *arguments, "--rounds", "3", "--out", "here"]) == 0
    if workloads is not None:
        assert [workload.name for workload in given.pop(0)] == workloads
    assert given == [3, CPU, Path("here")]


@pytest.mark.parametrize("table", [rochette, leekifer])
def test_papers_by_name(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(table, "run", lambda *arguments: given.append(arguments))
    name = table.__name__.rpartition(".")[2]
    assert main(["bench", name]) == 0
    assert main(["bench", name, "--size", "medium"]) == 0
    assert given == [("small", CPU, None), ("medium", CPU, None)]

"""Writes `docs/reference.md` from the docstrings of everything public; a test holds the two together.

Run it with `python docs/make_reference.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import griffe

HERE = Path(__file__).parent
GROUPS = {
    "The transform": "transform Rule Strategy replace_batchnorm",
    "The papers' methods": "engines",
    "Rewrites": "downsample interleave schedules guide_logits parallel_columns",
    "Without training": "per_example_norms per_example_grads gradient_gram",
    "Whole steps": "step_graph compile_step",
    "Is it right?": "check verify",
    "What was decided": "report profile visualize export_onnx",
    "Errors": "PerexError ArgumentError BudgetError CaptureError CoverageError ExportError MixingError ModeError "
    "ProofError RefusedError ShapeError StrategyError",
}
VALUES = {
    "transform": "perexfx.runtime.face.PerExample",
    "downsample": "perexfx.rewrites.rewritten.Rewriting perexfx.rewrites.rewritten.Change",
    "interleave": "perexfx.rewrites.interleave.Interleaved",
    "schedules": "perexfx.schedules.Every perexfx.schedules.Random perexfx.schedules.Then",
    "guide_logits": "perexfx.rewrites.guide.Guide",
    "compile_step": "perexfx.steps.compiled.CompiledStep",
    "check": "perexfx.inspecting.check.result.CheckResult",
    "verify": "perexfx.inspecting.proof.verify.Proof",
    "profile": "perexfx.inspecting.profile.Profile",
    "report": "perexfx.views.report.Report perexfx.views.sweep.Sweep perexfx.views.rewriting.RewriteReport "
    "perexfx.views.decisions.Row perexfx.views.decisions.Choice perexfx.views.decisions.Option",
}
"""Public function -> the classes of what it gives, which are documented below it."""

WITHOUT_METHODS = ("PerExample",)
"""Classes whose methods are for perexfx alone."""


def reference() -> str:
    """The page."""
    package = griffe.load("perexfx", search_paths=[HERE.parent], docstring_parser="google", resolve_aliases=True)
    listed = {name for names in GROUPS.values() for name in names.split()}
    assert listed == set(package.exports or ()), listed.symmetric_difference(package.exports or ())
    lines = ["# API reference", "", "Made from the docstrings by `docs/make_reference.py`."]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in names.split():
            if name == "engines":
                lines += _engines(package[name])
                continue
            if name == "schedules":
                lines += ["", "### `perexfx.schedules`", "", *_docstring(package[name])]
                for value in VALUES[name].split():
                    lines += _described(value.rpartition(".")[2], package[value.removeprefix("perexfx.")], level=4)
                continue
            found = package[name]  # a module where a function has the name of its module
            lines += _described(f"perexfx.{name}", found[name] if found.is_module else found, level=3)
            for value in VALUES.get(name, "").split():
                lines += _described(value.rpartition(".")[2], package[value.removeprefix("perexfx.")], level=4)
    return "\n".join(lines) + "\n"


def _engines(found: griffe.Object | griffe.Alias) -> list[str]:
    """The methods by name: each is an `Engine`."""
    lines = ["", "### `perexfx.engines`", "", *_docstring(found)]
    for file in ("one_by_one", "copies", "chain_rule", "losses", "reweight_gp"):
        method = next(c for c in found[file].classes.values() if "Method" in map(str, c.bases))
        values = {member: ast.literal_eval(method[member].value) for member in ("name", "also")}
        lines += [f"- `perexfx.engines.{values['name']}`: {_first_line(method)} Also: {values['also']}."]
    for file, name in (("engine", "Engine"), ("problem", "StepResult"), ("engine", "EngineStep")):
        lines += _described(name, found[file][name], level=4)
    for name in ("__call__", "step"):
        lines += ["", f"#### `Engine.{name}`", "", *_docstring(found["engine"]["Engine"][name])]
    return lines


def _described(title: str, found: griffe.Object | griffe.Alias, level: int) -> list[str]:
    lines = ["", f"{'#' * level} `{title}`", ""]
    if found.is_function:
        lines += ["```python", _signature(found), "```", ""]
    lines += _docstring(found)
    if found.is_class and title not in WITHOUT_METHODS:
        for member in {**found.inherited_members, **found.members}.values():
            if (member.is_function or "property" in member.labels) and not member.name.startswith("_"):
                call = f"{member.name}()" if member.is_function else member.name
                lines += [f"- `.{call}`: {_first_line(member)}"]
    return lines


def _signature(function: griffe.Object | griffe.Alias) -> str:
    parts, is_keyword = [], False
    for parameter in function.parameters:
        if parameter.kind is griffe.ParameterKind.keyword_only and not is_keyword:
            parts.append("*")
            is_keyword = True
        default = "" if parameter.default is None else f" = {parameter.default}"
        annotation = "" if parameter.annotation is None else f": {parameter.annotation}"
        parts.append(f"{parameter.name}{annotation}{default}")
    inside = "".join(f"    {part},\n" for part in parts)
    return f"{function.name}(\n{inside}) -> {function.returns}"


def _docstring(found: griffe.Object | griffe.Alias) -> list[str]:
    lines: list[str] = []
    for section in found.docstring.parsed if found.docstring else []:
        match section.kind:
            case griffe.DocstringSectionKind.text:
                lines += [section.value, ""]
            case griffe.DocstringSectionKind.parameters | griffe.DocstringSectionKind.attributes:
                lines += [f"- `{item.name}`: {_joined(item.description)}" for item in section.value] + [""]
            case griffe.DocstringSectionKind.returns:
                lines += [f"Returns: {_joined(' '.join(item.description for item in section.value))}", ""]
            case griffe.DocstringSectionKind.raises:
                raised = (f"`{item.annotation}`: {_joined(item.description)}" for item in section.value)
                lines += [f"Raises {' '.join(raised)}", ""]
            case griffe.DocstringSectionKind.admonition:
                lines += [f"{section.title}: {_joined(section.value.description)}", ""]
    return lines


def _first_line(found: griffe.Object | griffe.Alias) -> str:
    return found.docstring.value.splitlines()[0] if found.docstring else ""


def _joined(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    (HERE / "reference.md").write_text(reference())

"""What a command works on: a model by name, and inputs by shape.

Promises: a model is found as Python would find it, or the message says what is missing; whatever the user's own code
raises is said with its place, and never as a traceback of ours. Inputs are random, and the same for every run.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from perexfx.capture import line_of, reason_of
from perexfx.ir.errors import ArgumentError, PerexError


def model_named(name: str) -> nn.Module:
    """The model of `package.module:factory` or `file.py:factory`: a module, or a function or class that makes one.

    Raises:
        ArgumentError: There is none of that name, or making it fails.
    """
    where, separator, attribute = name.rpartition(":")
    if not separator or not where or not attribute:
        raise ArgumentError(f"A model is named as package.module:factory or file.py:factory. Found {name!r}.")
    torch.manual_seed(0)
    module = _module(where)
    try:
        found = _attribute(module, attribute, name)
        made = found if isinstance(found, nn.Module) or not callable(found) else found()
    except ArgumentError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise ArgumentError(f"`{name}` could not be made: {in_words(error)}") from error
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"`{name}` should be or return a torch.nn.Module. Found {type(made).__name__}.")
    return made


def _module(where: str) -> ModuleType:
    """A module by its dotted name, or by the path of its file."""
    path = Path(where)
    try:
        if path.suffix != ".py":
            sys.path.insert(0, "")  # as `python -m` does
            return importlib.import_module(where)
        if not path.is_file():
            raise ArgumentError(f"There is no file {where!r}.")
        specification = importlib.util.spec_from_file_location(path.stem, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.path.insert(0, str(path.parent))  # as running the file does
        sys.modules[path.stem] = module
        specification.loader.exec_module(module)
        return module
    except ArgumentError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise ArgumentError(f"{where!r} cannot be imported: {in_words(error)}") from error


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ArgumentError(f"`{name}`: there is no {part!r}. There are {', '.join(sorted(known)[:12]) or 'none'}.")
        found = getattr(found, part)
    return found


def in_words(error: BaseException) -> str:
    """What was raised, and the last line of the user's code that it came from."""
    place = line_of(error)
    reason = reason_of(error)
    return f"{type(error).__name__}: {reason}{place}."


@contextmanager
def running(what: str) -> Iterator[None]:
    """What fails inside is the user's model, loss or inputs.

    Raises:
        ArgumentError: Something else than an error of ours was raised.
    """
    try:
        yield
    except PerexError:
        raise
    except Exception as error:  # whatever the user's code does
        raise ArgumentError(
            f"{what} fails: {in_words(error)} Do the inputs fit the model, and targets the loss?"
        ) from error


_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?(?::(?P<high>\d+))?")

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Given:
    """One input as the user writes it: `32x3x224x224`, `32x128:int64:30522`, `mask=32x128:bool`.

    Attributes:
        name: The keyword, or "" for a positional input.
        shape: Its shape.
        dtype: Its dtype.
        high: Integers are below it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    high: int

    @classmethod
    def parse(cls, text: str) -> Given:
        """Raises: ArgumentError, saying how it is written."""
        match = _INPUT.fullmatch(text)
        dtype = match["dtype"] or "float32" if match else ""
        if match is None or dtype not in DTYPES:
            raise ArgumentError(
                "An input is written as its shape, then, where needed, its dtype and a bound for integers: "
                f"32x3x224x224, 32x128:int64:30522, mask=32x128:bool. Dtypes are {', '.join(DTYPES)}. Found {text!r}."
            )
        shape = () if match["shape"] == "scalar" else tuple(map(int, match["shape"].split("x")))
        return cls(match["name"] or "", shape, DTYPES[dtype], int(match["high"] or 2))

    def draw(self, random: torch.Generator) -> Tensor:
        """Random numbers of that shape."""
        try:
            return self._drawn(random)
        except (RuntimeError, TypeError):  # torch has no error of its own for either
            shape = "x".join(map(str, self.shape))
            raise ArgumentError(f"An input of shape {shape} has no room in memory. Give a smaller one.") from None

    def _drawn(self, random: torch.Generator) -> Tensor:
        if self.dtype is torch.bool:
            return torch.rand(self.shape, generator=random) < 0.5
        if not self.dtype.is_floating_point:
            return torch.randint(0, max(1, self.high), self.shape, generator=random, dtype=self.dtype)
        return torch.randn(self.shape, generator=random).to(self.dtype)


def inputs_of(given: Sequence[str]) -> Any:
    """Inputs as `perexfx.transform` takes them: a tuple, or a dict where one has a name.

    Raises:
        ArgumentError: One cannot be read, or only some have names.
    """
    parsed = [Given.parse(text) for text in given]
    if not parsed:
        return None
    named = [one.name for one in parsed if one.name]
    if named and len(named) < len(parsed):
        raise ArgumentError(f"Name all inputs, or none. Found names for {', '.join(named)} alone.")
    if len(set(named)) < len(named):
        raise ArgumentError(f"Name each input once. Found {', '.join(named)}.")
    random = torch.Generator().manual_seed(0)
    tensors = [one.draw(random) for one in parsed]
    return dict(zip(named, tensors, strict=True)) if named else tuple(tensors)


def bytes_of(text: str) -> int:
    """A number of bytes: `500000`, `64MB`, `1.5GiB`.

    Raises:
        ArgumentError: It is none.
    """
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text)
    if match is None or match[2].upper() not in units:
        raise ArgumentError(f"A memory budget is written as 500000, 64MB or 1.5GiB. Found {text!r}.")
    return math.floor(float(match[1]) * units[match[2].upper()])

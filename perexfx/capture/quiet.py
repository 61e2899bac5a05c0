"""Silence: what torch tells its own developers while it traces and exports is not for users."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

LOGGERS = (
    *("torch.export", "torch.fx", "torch._export", "torch._dynamo", "torch._subclasses", "torch.onnx"),
    *("onnxscript", "onnx_ir"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch logs, prints and warns about itself; a run with real tensors gives users' own warnings."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

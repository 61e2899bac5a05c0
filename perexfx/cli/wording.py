"""Messages as a shell has them: the library names Python's arguments and calls, a command its options.

Promises: nothing else of a message changes. Words that a model may have for its own names, as `inputs`, are taken for
an argument only where a message of the library begins with them.
"""

from __future__ import annotations

import argparse
import re

_IN_SHELL = (
    (r"`example_inputs`", "`--input`"),
    (r"Pass a tensor, a tuple .* keyword inputs\.", "Give one `--input` for each argument, in order or all by name."),
    (r"Pass tensors with (.*) that `batch_dim` names", r"Give inputs with \1 that `--batch-dim` names"),
    (r"Call the module on one that has\.", "Give an `--input` that has some."),
    (r"memory_budget=([\d,]+) bytes", r"the \1 bytes of `--memory-budget`"),
    (r"Raise `memory_budget`, or name another strategy", "Raise `--memory-budget`, or name another `--strategy`"),
    (r"`perexfx\.replace_batchnorm(?:\(model\))?`", "`--replace-batchnorm`"),
    (r"with `model\.\S*eval\(\)` before the transform", "with `--eval`, which has the whole model in eval mode"),
    (r"Call `gm\.eval\(\)` first", "Pass `--eval`"),
    (r"Pass `loss_fn` and `targets`\.", "A loss of your own can be passed in Python alone, to `perexfx.check`."),
    (r"^`inputs`(?= has no)", "`--input`"),
    (r"^`batch_dim`(?= should)", "`--batch-dim`"),
    (r"^`batch_sizes`(?= should)", "`--batch-sizes`"),
    (r"^`clip_norm`( should .*), or None", r"`--clip-norm`\1, or none"),
    (r"^`depth`( should .*), or None", r"`--depth`\1"),
    (r"^`examples`(?= should)", "`--examples`"),
    (r"^`loss_fn`(?= should)", "`--loss`"),
    (r"^`steps`(?= should)", "`--measure`"),
)
"""Pattern -> what takes its place."""

_PATHS = ("html", "json", "out")
"""Options that a path may come from; where it has a place of its own it is called `path` there too."""


def in_shell(message: str, options: argparse.Namespace) -> str:
    """A message of the library, naming the options of the command that it was raised in."""
    for pattern, replacement in _IN_SHELL:
        message = re.sub(pattern, replacement, message)
    for option in _PATHS:
        path = getattr(options, option, None)
        if path is not None and f"Found {str(path)!r}" in message:
            message = message.replace("`path`", f"`--{option}`", 1)
    return message

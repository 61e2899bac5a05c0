"""Rewrites: graphs into other graphs, around the same parameters.

In comes a model; out goes a `Rewritten` one, a GraphModule that computes something else and can be trained, transformed
and drawn as any other. Open `rewritten.py` first; then one file for each rewrite.
"""

from perexfx.rewrites.downsample import downsample
from perexfx.rewrites.interleave import Interleaved, interleave
from perexfx.rewrites.rewritten import Change, Rewriting, Rewritten, rewritten
from perexfx.rewrites.subject import Subject, subject_of

__all__ = [
    "Change",
    "Interleaved",
    "Rewriting",
    "Rewritten",
    "Subject",
    "downsample",
    "interleave",
    "rewritten",
    "subject_of",
]

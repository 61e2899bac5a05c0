"""Rewrites: graphs into other graphs, around the same parameters.

In comes a model; out goes a `Rewritten` one, a GraphModule that computes something else and can be trained, transformed
and drawn as any other. Open `rewritten.py` first; then one file for each rewrite.
"""

from perexfx.rewrites.downsample import downsample
from perexfx.rewrites.guidance import Guidance
from perexfx.rewrites.guide import Guide, refuse_batch_tables
from perexfx.rewrites.guide_logits import guide_logits
from perexfx.rewrites.interleave import Interleaved, interleave
from perexfx.rewrites.parallel_columns import ParallelColumns, parallel_columns
from perexfx.rewrites.rewritten import Change, Rewriting, Rewritten, rewritten
from perexfx.rewrites.subject import Subject, subject_of

__all__ = [
    "Change",
    "Guidance",
    "Guide",
    "Interleaved",
    "ParallelColumns",
    "Rewriting",
    "Rewritten",
    "Subject",
    "downsample",
    "guide_logits",
    "interleave",
    "parallel_columns",
    "refuse_batch_tables",
    "rewritten",
    "subject_of",
]

"""Sites: where parameters meet values that carry examples.

In come a captured graph, layer rules and an analysis where there is one; out go sites (every use of every trainable
parameter is in one, or the model is refused), and what a plan may choose about parts of the graph: regions, whose
images may lie with their channels last, and segments, which may run a second time. Open `match.py` first.
"""

from perexfx.sites.classify import passes_no_gradient, reads_shape_only
from perexfx.sites.match import confirm, match
from perexfx.sites.refuse import refuse_batch_statistics, refuse_other_trainables
from perexfx.sites.regions import (
    Region,
    convolution_work,
    faster_with_channels_last,
    image_work,
    images_of,
    reads_either_format,
    regions_of,
    with_formats,
)
from perexfx.sites.segments import Segment, fit_segments, numbers_of, rerun_cost, segments_of
from perexfx.sites.table import SiteTable

__all__ = [
    "Region",
    "Segment",
    "SiteTable",
    "confirm",
    "convolution_work",
    "faster_with_channels_last",
    "fit_segments",
    "image_work",
    "images_of",
    "match",
    "numbers_of",
    "passes_no_gradient",
    "reads_either_format",
    "reads_shape_only",
    "refuse_batch_statistics",
    "refuse_other_trainables",
    "regions_of",
    "rerun_cost",
    "segments_of",
    "with_formats",
]

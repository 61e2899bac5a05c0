"""Modules that are one node of every graph, whoever traces them."""

from __future__ import annotations

from torch import nn


class LeafModule(nn.Module):
    """A module without parameters or buffers that tracing does not look into."""


__all__ = ["LeafModule"]

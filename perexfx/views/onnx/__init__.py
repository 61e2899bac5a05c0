"""ONNX: a transformed module's forward, or its whole step, as a file that any runtime reads.

The forward is exported once, by torch's own exporter, with every graph node in a module of its own; the exporter says
of each ONNX node which module it comes from, and the nodes of each site are then cut out of the graph and become a
function with a body. (To export the sites one by one, as small models, would take a second each, and would have to
find out again which of their numbers follow the batch size.)

Promises: what is written is valid, computes what the module computes, and is the same to the byte for the same module,
inputs and versions. Neither the module nor what it knows is changed.
"""

from perexfx.views.onnx.write import export_onnx

__all__ = ["export_onnx"]

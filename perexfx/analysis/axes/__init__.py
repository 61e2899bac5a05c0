"""How tensor operations treat the example axis, at the level of aten: one rule per operation, or a probe."""

"""What `perexfx.check` is made of: the reference, the comparison, and the result."""

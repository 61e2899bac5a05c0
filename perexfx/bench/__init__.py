"""The measurements anyone can repeat: `python -m perexfx bench`."""

"""Views of a transformed module: read-only."""

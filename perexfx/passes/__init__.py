"""Other rewrites of models and graphs, each usable by itself."""

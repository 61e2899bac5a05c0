"""Other rewrites of models, each usable by itself, before a transform: a file for each, named by what it does."""

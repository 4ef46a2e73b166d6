"""A run on disk: folder, checkpoints, lock, provenance. Whole or not at all."""

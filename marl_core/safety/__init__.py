"""Checks before the first update, at every step and around plugins; and dumps of the batches that failed."""

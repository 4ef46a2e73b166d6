"""Whose weights are whose: fingerprints of a base, certificates of reward adapters, and what they are compared with."""

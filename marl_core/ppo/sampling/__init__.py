"""Sampling responses: token by token with a cache, or by transformers."""

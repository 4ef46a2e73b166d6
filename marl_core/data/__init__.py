"""Prompts: rows of data, written as the model reads them."""

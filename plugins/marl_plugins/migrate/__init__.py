"""Configs of other trainers carried over: `marl import`."""

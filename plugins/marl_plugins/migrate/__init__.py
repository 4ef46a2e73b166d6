"""Configs of other trainers converted: `marl import`."""

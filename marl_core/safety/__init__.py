"""What is watched and how it is told: the checks before the first update and of every step, plugins, dumps."""

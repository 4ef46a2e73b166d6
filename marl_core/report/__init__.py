"""A run, seen afterwards: the page, the curves, the model card. Knows a run folder and nothing else."""

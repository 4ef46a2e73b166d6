"""The config with its strategies built: what will run, what can't work, what it will hold, before any weight is read."""

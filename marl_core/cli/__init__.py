"""The command line: `marl`."""

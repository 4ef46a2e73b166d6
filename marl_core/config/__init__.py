"""What was asked for: RunConfig, and how it is read. Imports no torch."""

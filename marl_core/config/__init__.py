"""What was asked for: RunConfig, how it is read, and the Plan made of it. Imports no torch."""

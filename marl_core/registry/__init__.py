"""Who offers what: strategies, hooks and the catalog of what is installed. Imports no torch."""

"""One base, many adapters: the bank, its heads and views."""

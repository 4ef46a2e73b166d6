"""What files on disk say, read without torch: adapters, models, the hub's cache, rows of data."""

"""One run as several processes."""

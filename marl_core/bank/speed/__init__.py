"""Fast ways through the base that give the plain way's numbers to rounding; each has its switch in the config."""

"""marl's built-in strategies: guests of marl_core like any other package's."""

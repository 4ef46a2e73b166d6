"""Built-in kinds of adapters: what is trained on the frozen base."""

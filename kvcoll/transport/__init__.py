"""Ways to move bytes among ranks: one contract, one file a way."""

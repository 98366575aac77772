"""Which layers go on which device, and how fast that is. Pure functions over bytes, speeds and budgets; no torch."""

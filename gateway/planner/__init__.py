"""Which layers go where, and what fits: pure functions over a cost model."""

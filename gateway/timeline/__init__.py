"""When each stage of a pipeline was busy, from the times that come back with every step. Pure: no clocks, no calls."""

"""Many arms, one budget, one report."""

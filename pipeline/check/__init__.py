"""Is it right? The checks before a move, and the comparison after it."""

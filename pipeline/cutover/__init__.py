"""The switch from legacy to main, step by step, and the way back."""

"""One folder per op: its mathematics, its reference and every kernel that computes it."""

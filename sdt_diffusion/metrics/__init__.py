"""Numbers that say how good samples are, and the features they are computed from."""

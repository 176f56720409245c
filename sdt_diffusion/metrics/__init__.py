"""Metrics of sample quality, and the features they are computed from."""

"""Helpers that know nothing of models: arguments, files, fingerprints, seeds."""

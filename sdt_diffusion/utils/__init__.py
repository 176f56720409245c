"""Helpers that do not depend on models: arguments, files, fingerprints, seeds."""

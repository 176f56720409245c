"""Studies that compare variants of a training run over seeds: declared in YAML, run in cells, reported in pages."""

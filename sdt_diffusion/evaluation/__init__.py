"""The evaluation scripts of eval/: from arguments to numbers, tables and pictures."""

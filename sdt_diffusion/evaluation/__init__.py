"""What eval/ runs: from arguments to numbers, tables and pictures."""

"""What the command line writes: standard output, rows, whole files."""

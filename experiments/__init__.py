"""Entry points; run them from the repository's root, for instance `python -m experiments.atari100k --help`."""

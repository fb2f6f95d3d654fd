"""Running the agent on an environment: host loop, evaluation, logging, checkpoints, scores.

The modules here need `python -m pip install -e '.[experiments]'`; each third-party package is imported where it
is used.
"""

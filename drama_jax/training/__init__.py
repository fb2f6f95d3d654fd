"""Running the agent on an environment: host loop, evaluation, logging, checkpoints, scores.

The modules here need `pip install 'drama_jax[experiments]'`; each third-party package is imported where it is used.
"""

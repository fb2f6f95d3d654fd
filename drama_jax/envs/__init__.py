"""Environments behind one small protocol. Importing this package imports no emulator."""

from drama_jax.envs.atari import make_atari
from drama_jax.envs.base import Env, Observation

__all__ = ["Env", "Observation", "make_atari"]

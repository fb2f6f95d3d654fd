"""The world model: autoencoder, sequence model, and the heads for prior, reward and termination (paper section 2).

    z_t ~ q(z_t | frame_t)     d_t = f(z_<=t, a_<=t)     z_(t+1) ~ p(z_(t+1) | d_t)     r_t, e_t from d_t

d_t has seen the action a_t, so it predicts the *next* latent, and the reward and termination that a_t caused.
Shapes: B batch, T time, K categoricals, C classes, S = K * C, D backbone width.
"""

from drama_jax.world_model.inference import (
    decode,
    embed,
    observe,
    open_window,
    posterior,
    prior,
    reward_logits,
    step,
    termination_logits,
)
from drama_jax.world_model.networks import Head, WorldModelState, compute_dtype, init
from drama_jax.world_model.training import Forward, forward, kl_loss, loss, losses, update

__all__ = [
    "Forward",
    "Head",
    "WorldModelState",
    "compute_dtype",
    "decode",
    "embed",
    "forward",
    "init",
    "kl_loss",
    "loss",
    "losses",
    "observe",
    "open_window",
    "posterior",
    "prior",
    "reward_logits",
    "step",
    "termination_logits",
    "update",
]

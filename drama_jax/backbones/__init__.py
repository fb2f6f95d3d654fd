"""Sequence models (z_t, a_t) -> d_t, behind one interface.

A backbone is a flax.linen module with four methods:

* `__call__(latent [B, T, S], action [B, T] int, *, state=None, segment_ids=None) -> (features [B, T, D], state)`,
  the parallel form over a sequence;
* `step(latent [B, S], action [B] int, state) -> (feature [B, D], state)`, one step, by
  `module.apply(variables, latent, action, state, method="step")`;
* `open_window(latent [B, T, S], action [B, T] int, *, horizon, segment_ids=None, unrolled=False, classes=None)
  -> (features [B, T, D], window)`, the parallel form before a rollout of at most `horizon` steps: the window takes the
  place of the state in `step` (`unrolled`: in a loop unrolled whole; `classes`: with latents one-hot in groups of C);
* `initial_state(batch_size) -> state`, zeros; needs no parameters.

Where actions are `Continuous(A)`, `action` is float `[B, T, A]`, or `[B, A]` in `step`: its product with the
rows of the stem's kernel takes the place of one row.

All forms agree: a sequence may be cut anywhere and continued in either from the returned state. In the parallel form
the state is dropped where the segment id changes, and the given state belongs to segment 0, so that
`segment_ids = cumsum(is_first, axis=1)` drops it when a sequence begins with an episode's first step.

| name | mixes over time by | remembers |
|---|---|---|
| `mamba2` | SSD, one decay a head (Drama) | a state, or a window over short rollouts |
| `mamba` | selective scan, decays for every channel and state entry | a state |
| `gru` | gated recurrent units, step by step (DreamerV3's cell) | a state |
| `transformer` | attention, learned positions (Drama's comparison) | keys and values of up to `max_length` steps |
| `rwkv` | RWKV-6, a decay for every key channel that depends on the data | a state |
"""

from __future__ import annotations

import jax.typing
from flax import linen as nn

from drama_jax import checks
from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.backbones.gru import GruBackbone
from drama_jax.backbones.mamba import MambaBackbone
from drama_jax.backbones.mamba2 import Mamba2Backbone, Mamba2LayerState, Mamba2State
from drama_jax.backbones.mamba2_window import Mamba2LayerWindow, Mamba2Window
from drama_jax.backbones.residual import RecurrentState
from drama_jax.backbones.rwkv import RwkvBackbone
from drama_jax.backbones.transformer import TransformerBackbone, TransformerState
from drama_jax.config import BackboneConfig, ConfigError

__all__ = [
    "GruBackbone",
    "Mamba2Backbone",
    "Mamba2LayerState",
    "Mamba2LayerWindow",
    "Mamba2State",
    "Mamba2Window",
    "MambaBackbone",
    "RecurrentState",
    "RwkvBackbone",
    "TransformerBackbone",
    "TransformerState",
    "make",
]

_BACKBONES: dict[str, type[nn.Module]] = {
    "mamba2": Mamba2Backbone,
    "mamba": MambaBackbone,
    "gru": GruBackbone,
    "transformer": TransformerBackbone,
    "rwkv": RwkvBackbone,
}


def make(config: BackboneConfig, num_actions: ActionSpace, dtype: jax.typing.DTypeLike) -> nn.Module:
    """The backbone that `config` names.

    Args:
      config: sizes; static.
      num_actions: A, the number of discrete actions, or `Continuous(A)`.
      dtype: compute dtype of the matrix products; states of the recurrence and norms are at least float32.

    Raises:
      ConfigError: if there is no action.
    """
    checks.instances("backbones.make", config=(config, BackboneConfig))
    discrete = isinstance(num_actions, int) and not isinstance(num_actions, bool) and num_actions >= 1
    if not discrete and not isinstance(num_actions, Continuous):
        raise ConfigError(f"num_actions must be at least 1, an integer, got {num_actions!r}")
    return _BACKBONES[config.name](config, num_actions, dtype)

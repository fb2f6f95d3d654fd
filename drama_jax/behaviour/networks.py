"""Actor and critic: multilayer perceptrons over the behaviour feature.

Each hidden layer is Dense, RMSNorm (eps 1e-6), SiLU; then one Dense. Matrix products run in the compute dtype, norms
and outputs in at least float32. F feature size, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.config import BehaviourConfig
from drama_jax.nn.rms_norm import rms_norm
from drama_jax.precision import at_least_float32, named

EPSILON = 1e-6
"""Of the norms."""
HIDDEN_GAIN = 2**0.5
GAUSSIAN = "gaussian"
"""Name of the output layer of an actor for continuous actions; any other's is "output"."""
OUTPUT_GAIN = 1e-3
"""A near-uniform policy and values near zero at the start."""


class MLP(nn.Module):
    """`layers` x [Dense, RMSNorm, SiLU] of width `units`, then Dense to `outputs`.

    Weights are orthogonal (gain sqrt(2), and 0.001 for the output), biases 0.
    """

    layers: int
    units: int
    outputs: int
    dtype: DTypeLike
    output_name: str = "output"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., F] to [..., outputs] in at least float32."""
        wide = at_least_float32(self.dtype)

        def dense(units: int, gain: float, name: str) -> nn.Dense:
            init = nn.initializers.orthogonal(gain)
            return nn.Dense(units, dtype=self.dtype, param_dtype=wide, kernel_init=init, name=name)

        x = x.astype(self.dtype)
        for i in range(self.layers):
            x = dense(self.units, HIDDEN_GAIN, f"hidden_{i}")(x).astype(wide)
            x = nn.silu(rms_norm(EPSILON, wide, name=f"norm_{i}")(x)).astype(self.dtype)
        return dense(self.outputs, OUTPUT_GAIN, self.output_name)(x).astype(wide)


def actor(config: BehaviourConfig, num_actions: ActionSpace) -> MLP:
    """Normalised features [..., F] -> policy logits [..., A], or [..., 2 A] of a tanh-Gaussian (see `policies`)."""
    sizes = (config.actor_layers, config.actor_units)
    if isinstance(num_actions, Continuous):
        return MLP(*sizes, 2 * num_actions.size, named(config.compute_dtype), output_name=GAUSSIAN)
    return MLP(*sizes, num_actions, named(config.compute_dtype))


def actor_of(config: BehaviourConfig, params: Mapping[str, Any]) -> MLP:
    """The actor that these are the parameters of."""
    return actor(config, actions_of(params))


def actions_of(params: Mapping[str, Any]) -> ActionSpace:
    """What an actor with these parameters chooses from: A actions, or `Continuous(A)`."""
    if is_continuous(params):
        return Continuous(params[GAUSSIAN]["bias"].shape[-1] // 2)
    return int(params["output"]["bias"].shape[-1])


def is_continuous(actor: Mapping[str, Any]) -> bool:
    """Whether these are the parameters of an actor for continuous actions."""
    return GAUSSIAN in actor


def critic(config: BehaviourConfig) -> MLP:
    """Features [..., F], not normalised -> symlog two-hot logits of the value [..., num_bins]."""
    return MLP(config.critic_layers, config.critic_units, config.num_bins, named(config.compute_dtype))

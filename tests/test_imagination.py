"""`imagination.rollout` with hand-made models: alignment, determinism of the order, vmap."""

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax import imagination


def counting(horizon):
    """A model that adds the action to a counter, and a policy that plays counter + 1."""

    def policy(carry, output, key):
        return carry + 1, output + 1

    def model(carry, output, action, key):
        return carry, output + action

    start = (jnp.zeros((), jnp.int32), jnp.asarray([0, 10]))
    return imagination.rollout(model, policy, start, horizon, jax.random.key(0))


def test_output_then_action_then_next_output():
    trajectory, carry = counting(3)
    np.testing.assert_array_equal(trajectory.outputs, [[0, 10], [1, 21], [3, 43], [7, 87]])
    np.testing.assert_array_equal(trajectory.actions, [[1, 11], [2, 22], [4, 44]])
    assert carry == 3  # the policy was called once per step and could keep something


def test_every_call_gets_its_own_key():
    def policy(carry, output, key):
        return carry, jax.random.bits(key, (1,))

    def model(carry, output, action, key):
        return carry, jax.random.bits(key, (1,))

    start = (None, jnp.zeros((1,), jnp.uint32))
    trajectory, _ = imagination.rollout(model, policy, start, 8, jax.random.key(0))
    drawn = np.concatenate([trajectory.outputs[1:].ravel(), trajectory.actions.ravel()])
    assert len(set(drawn.tolist())) == 16


def test_gradient_flows_through_the_model():
    def loss(x):
        def model(carry, output, action, key):
            return carry, output * x

        start = (None, jnp.ones((1,)))
        trajectory, _ = imagination.rollout(model, lambda c, o, k: (c, o), start, 3, jax.random.key(0))
        return trajectory.outputs[-1, 0]

    np.testing.assert_allclose(jax.grad(loss)(2.0), 3 * 2.0**2)

"""The world model against three updates of the released PyTorch code, and its own invariants."""

import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drama_jax import distributions, interop, optim, world_model
from drama_jax.config import AutoencoderConfig, BackboneConfig, OptimizerConfig, WorldModelConfig, preset
from drama_jax.nn import depth_to_space
from drama_jax.replay import Batch
from tests.tools import assert_trees_close, flat, named

CONFIG = WorldModelConfig(
    autoencoder=AutoencoderConfig(depths=(4, 8, 12, 16, 16), categoricals=8, classes=8),
    backbone=BackboneConfig(width=64, head_dim=16, chunk_size=4),
    head_units=32,
    free_bits_each=False,
    compute_dtype="float64",
)
ACTIONS = 4
# Names in our tree whose gradient the released code stores as rounding noise: biases in front of a batch norm.
SKIP = {"skip": ("encoder/conv_", "decoder/conv_"), "skip_leaf": "bias"}
LOSSES = {
    "reconstruction_loss": "reconstruction_loss",
    "reward_loss": "reward_loss",
    "termination_loss": "termination_loss",
    "dynamics_loss": "dynamics_loss",
    "dynamics_kl": "dynamics_real_kl_div",
    "representation_loss": "representation_loss",
    "representation_kl": "representation_real_kl_div",
    "total_loss": "total_loss",
    "grad_norm": "grad_norm",
}


def to_dtype(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def golden_batch(data):
    return Batch(
        frames=jnp.asarray(data["obs"]),
        actions=jnp.asarray(data["action"], jnp.int32),
        rewards=jnp.asarray(data["reward"], jnp.float32),
        terminals=jnp.asarray(data["termination"] > 0),
        firsts=jnp.zeros(data["action"].shape, bool),
    )


def initial_state(data, config, dtype):
    params = to_dtype(interop.from_torch(named(data, "param0/"))["params"], dtype)
    shapes = jax.eval_shape(lambda: world_model.init(jax.random.key(0), config, ACTIONS))
    stats = jax.tree.map_with_path(
        lambda path, a: jnp.full(a.shape, float(path[-1].key == "var"), dtype), shapes.batch_stats
    )
    return world_model.WorldModelState(params, stats, optim.make_optimizer(config.optimizer).init(params))


@pytest.fixture(scope="module")
def data(golden):
    return golden("world_model_update_old")


def value_and_grad(config, batch):
    def objective(params, stats, gumbel):
        return world_model.loss(config, params, stats, batch, gumbel, None, num_actions=ACTIONS)

    return jax.value_and_grad(objective, has_aux=True)


def test_three_updates_match_released_code(data, x64):
    """Losses, gradients, statistics and parameters after each of three updates, in float64."""
    state = initial_state(data, CONFIG, jnp.float64)
    start, batch = state.params, golden_batch(data)
    gradient = value_and_grad(CONFIG, batch)

    @jax.jit  # one program: what gradient and update have in common is compiled once
    def run(state, gumbel):
        updated = world_model.update(CONFIG, state, batch, gumbel, None, num_actions=ACTIONS)
        return gradient(state.params, state.batch_stats, gumbel), updated

    drift = NoisyBiases(data)
    for k in (1, 2, 3):
        gumbel = jnp.asarray(data[f"step{k}/gumbel"], jnp.float64)
        ((_, (_, _, out)), grads), (state, metrics) = run(state, gumbel)
        if k == 1:
            check_forward(data, out)
        sample = out.latent.reshape(*data[f"step{k}/sample_index"].shape, -1)
        np.testing.assert_array_equal(jnp.argmax(sample, axis=-1), data[f"step{k}/sample_index"])
        expected = interop.from_torch(named(data, f"step{k}/grad/"))["params"]
        assert_trees_close(grads, expected, rtol=1e-6, **SKIP)
        for ours, theirs in LOSSES.items():
            np.testing.assert_allclose(metrics[ours], data[f"step{k}/{theirs}"], rtol=1e-8, err_msg=ours)
        statistics = interop.from_torch(named(data, f"step{k}/buffer/"))["batch_stats"]
        assert_trees_close(drift.added_to(state.batch_stats, k), statistics, rtol=1e-8)
        moved = jax.tree.map(jnp.subtract, state.params, start)
        # LaProp divides every gradient by its own size: where a gradient is 1e-9 of its neighbours the last digits of
        # two float64 programs differ by 1e-7 of it, and so do the steps. Stored in float32.
        assert_trees_close(moved, interop.from_torch(named(data, f"step{k}/delta/"))["params"], rtol=1e-4, **SKIP)


class NoisyBiases:
    """What the released code's noise-driven biases (Q15) add to its running means, from its stored bias changes.

    A bias in front of a batch norm has no effect but this one. Its gradient is rounding noise there, which LaProp
    turns into full-size steps, and exactly zero here.
    """

    def __init__(self, data):
        self.data, self.means = data, {}

    def added_to(self, batch_stats, k):
        if k > 1:
            changed = flat(interop.from_torch(named(self.data, f"step{k - 1}/delta/"))["params"])
            noisy = [path for path in changed if "/conv_" in path and path.endswith("/bias") and "/norm/" not in path]
            assert len(noisy) == len(self.data["zero_grad_params"])
            for path in noisy:
                mean = path.replace("/bias", "/norm/mean")
                self.means[mean] = 0.9 * self.means.get(mean, 0.0) + 0.1 * changed[path]
        shifted = {path: np.asarray(value) + self.means.get(path, 0.0) for path, value in flat(batch_stats).items()}
        return flax.traverse_util.unflatten_dict(shifted, sep="/")


def check_forward(data, out):
    size, depth = CONFIG.autoencoder.map_size, CONFIG.autoencoder.depths[-1]
    embedding = out.embedding.reshape(3, 10, size, size, depth).transpose(0, 1, 4, 2, 3).reshape(3, 10, -1)
    pairs = {
        "embedding": embedding,
        "post_logits": out.posterior,
        "dist_feat": out.features,
        "prior_logits": out.prior,
        "reward_logits": out.reward_logits,
        "termination_logits": out.termination_logits,
    }
    for name, ours in pairs.items():
        np.testing.assert_allclose(ours, data[f"fwd/{name}"], rtol=1e-8, atol=1e-11, err_msg=name)
    np.testing.assert_array_equal(out.latent, data["fwd/sample"])
    frames = depth_to_space(out.reconstruction[:, :2].reshape(-1, *out.reconstruction.shape[2:]))
    frames = jnp.moveaxis(frames, -1, 1).reshape(data["fwd/obs_hat"].shape)
    np.testing.assert_allclose(frames, data["fwd/obs_hat"], rtol=0, atol=6e-8)  # stored in float32


def test_float32_losses_and_gradients(data):
    """The same pass in float32: losses to 1e-5, gradients to 1e-3 of each array's largest entry.

    Errors of 1e-7 are amplified by five batch norms over batches of 30 frames; the optimiser itself is tested in
    float32 on stored gradients in tests/test_optim.py.
    """
    config = WorldModelConfig(**{**vars(CONFIG), "compute_dtype": "float32"})
    state = initial_state(data, config, jnp.float32)
    gumbel = jnp.asarray(data["step1/gumbel"])
    gradient = jax.jit(value_and_grad(config, golden_batch(data)))
    (_, (terms, _, _)), grads = gradient(state.params, state.batch_stats, gumbel)
    for ours, theirs in LOSSES.items():
        if ours != "grad_norm":
            np.testing.assert_allclose(terms[ours], data[f"step1/{theirs}"], rtol=1e-5, err_msg=ours)
    np.testing.assert_allclose(optax.tree.norm(grads), data["step1/grad_norm"], rtol=1e-5)
    assert_trees_close(grads, interop.from_torch(named(data, "step1/grad/"))["params"], rtol=1e-3, **SKIP)


def test_active_clipping(data, x64):
    """One step of a fresh model with the norm clipped to a quarter."""
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_updates=0, max_grad_norm=float(data["clip/max_norm"]))
    config = WorldModelConfig(**{**vars(CONFIG), "optimizer": optimizer})
    state = initial_state(data, config, jnp.float64)
    grads = to_dtype(interop.from_torch(named(data, "step1/grad/"))["params"], jnp.float64)
    np.testing.assert_allclose(data["clip/grad_norm"], data["step1/grad_norm"], rtol=1e-9)
    tx = optim.make_optimizer(config.optimizer)
    updates, _ = tx.update(grads, state.opt_state, state.params)
    # The file leaves out encoder and decoder; the encoder's names tell how the posterior head's inputs are laid out.
    encoder = {name: value for name, value in named(data, "param0/").items() if name.startswith("encoder.")}
    expected = interop.from_torch({**named(data, "clip/delta/"), **encoder})["params"]
    del expected["encoder"]
    assert_trees_close(updates, expected, rtol=1e-4)


def test_learning_rates_and_bins(data, x64):
    schedule = optim.warmup(CONFIG.optimizer.learning_rate, CONFIG.optimizer.warmup_updates)
    np.testing.assert_allclose([schedule(jnp.asarray(k)) for k in range(3)], data["lr_used"], rtol=1e-12)
    bins = distributions.two_hot_bins(CONFIG.num_bins, jnp.float64)
    np.testing.assert_array_equal(bins, data["bins"])


@pytest.mark.parametrize("num_actions", [18, 4])
def test_parameter_counts(num_actions):
    """Every parameter of the released XS model, by name and shape, and their number."""
    table = json.loads((pathlib.Path(__file__).parent / "golden" / "param_shapes_XS_old.json").read_text())
    released = table[f"action_dim={num_actions},backbone=Mamba2"]
    config = WorldModelConfig(compute_dtype="float32")
    shapes = jax.eval_shape(lambda: world_model.init(jax.random.key(0), config, num_actions))
    ours = {path: leaf.shape for path, leaf in flat(shapes.params).items()}
    mapped = interop.from_torch({name: np.zeros(shape, np.int8) for name, shape in released["world_model"].items()})
    assert ours == {path: leaf.shape for path, leaf in flat(mapped["params"]).items()}
    assert sum(int(np.prod(shape)) for shape in ours.values()) == released["counts"]["total_world_model"]


def test_initialisation_matches_released_statistics():
    """Mean and spread of every freshly drawn array are those of a released seed-0 model."""
    table = json.loads((pathlib.Path(__file__).parent / "golden" / "param_shapes_XS_old.json").read_text())
    stats = table["init_stats(mean,std,min,max) action_dim=4 Mamba2 seed0"]
    config = WorldModelConfig(compute_dtype="float32")
    params = jax.jit(lambda key: world_model.init(key, config, 4).params)(jax.random.key(0))
    shapes = table["action_dim=4,backbone=Mamba2"]["world_model"]
    ours = flat(params)
    for name, (mean, std, low, high) in ((n, s) for n, s in stats.items() if n in shapes):
        # Which of our arrays is it? Map an array that is 1 there and 0 elsewhere.
        marked = {other: np.full(shape, other == name, np.int8) for other, shape in shapes.items()}
        (path,) = [path for path, leaf in flat(interop.from_torch(marked)["params"]).items() if leaf.any()]
        value, count = np.asarray(ours[path]), ours[path].size
        tolerance = 5 * max(std, 1e-12) / np.sqrt(count)
        assert abs(value.mean() - mean) <= 2 * tolerance, (name, path)
        assert abs(value.std() - std) <= 2 * tolerance + 1e-9, (name, path)
        if count > 1000:
            np.testing.assert_allclose([value.min(), value.max()], [low, high], rtol=0.1, err_msg=name)


def tiny_batch(rng, batch=2, steps=6, size=16):
    return Batch(
        frames=jnp.asarray(rng.integers(0, 256, (batch, steps, size, size, 3)), jnp.uint8),
        actions=jnp.asarray(rng.integers(0, ACTIONS, (batch, steps)), jnp.int32),
        rewards=jnp.asarray(rng.normal(size=(batch, steps)), jnp.float32),
        terminals=jnp.asarray(rng.random((batch, steps)) < 0.2),
        firsts=jnp.zeros((batch, steps), bool),
    )


TINY = WorldModelConfig(
    autoencoder=AutoencoderConfig(image_size=16, depths=(4, 8, 8), categoricals=4, classes=4),
    backbone=BackboneConfig(width=16, head_dim=8, chunk_size=4),
    head_units=16,
    batch_size=2,
    batch_length=6,
    compute_dtype="float32",
)


def test_nothing_crosses_an_episode_start():
    """With segment ids, what comes after an episode start is independent of the actions before it; without, not."""
    batch = tiny_batch(np.random.default_rng(0))
    state = jax.jit(lambda key: world_model.init(key, TINY, ACTIONS))(jax.random.key(0))
    gumbel = jax.random.gumbel(jax.random.key(1), (2, 6, 4, 4))
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1], [1, 1, 1, 2, 2, 2]])

    @jax.jit
    def features(actions, segment_ids):
        out, _ = world_model.forward(
            TINY,
            state.params,
            state.batch_stats,
            batch.replace(actions=actions),
            gumbel,
            segment_ids,
            num_actions=ACTIONS,
        )
        return out.features

    changed = batch.actions.at[:, :3].set((batch.actions[:, :3] + 1) % ACTIONS)
    np.testing.assert_array_equal(features(batch.actions, segments)[:, 3:], features(changed, segments)[:, 3:])
    together = jnp.zeros_like(segments)
    assert not np.allclose(features(batch.actions, together)[:, 3:], features(changed, together)[:, 3:])


def test_kl_pairs_across_an_episode_start_do_not_count():
    rng = np.random.default_rng(0)
    posterior, prior = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, 4, 2, 3)))) for _ in range(2))
    kl = np.sum(np.exp(posterior[:, 1:]) * (posterior[:, 1:] - prior[:, :-1]), axis=(-2, -1))[0]

    def kl_loss(weight=None, **fields):
        return world_model.kl_loss(WorldModelConfig(**fields), posterior, prior, weight)

    weight = jnp.asarray([[1.0, 0.0, 1.0]])
    _, mean = kl_loss(weight, free_bits=0.0)
    np.testing.assert_allclose(mean, (kl[0] + kl[2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(kl_loss(free_bits=1e3), [1e3, kl.mean()], rtol=1e-6)
    np.testing.assert_allclose(kl_loss(free_bits=1e3, free_bits_each=False), [1e3, kl.mean()], rtol=1e-6)
    threshold = float((kl[0] + kl[2]) / 2)
    each = kl_loss(weight, free_bits=threshold)
    np.testing.assert_allclose(each, [np.maximum(kl[np.asarray([0, 2])], threshold).mean(), threshold], rtol=1e-6)


def test_a_rare_surprise_among_predictable_steps_is_still_learnt():
    """A ball that is served once in many still frames: the mean KL is below the free bits, that step's is not."""
    posterior = jnp.zeros((1, 40, 2, 3)).at[0, 20, :, 1].set(8.0)
    posterior = jax.nn.log_softmax(posterior)
    prior = jnp.zeros((1, 40, 2, 3)).at[0, 19, :, 0].set(8.0)

    def gradient(config):
        return jax.grad(lambda q: world_model.kl_loss(config, posterior, jax.nn.log_softmax(q), None)[0])(prior)

    assert world_model.kl_loss(WorldModelConfig(), posterior, jax.nn.log_softmax(prior), None)[1] < 1
    rare = gradient(WorldModelConfig())[0]
    assert np.flatnonzero(np.abs(rare).sum((1, 2))).tolist() == [19]
    assert not gradient(preset("reference").agent.world_model).any()

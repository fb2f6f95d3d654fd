"""What the benchmarks say about themselves: the README's tables are those of the result files, floors are counted."""

import jax

from benchmarks import floors, tables
from drama_jax import agent
from drama_jax.config import AutoencoderConfig, preset


def test_the_tables_of_the_readme_are_those_of_the_result_files():
    text = tables.README.read_text()
    assert tables.rewritten(text) == text
    for name in tables.TABLES:
        assert f"<!-- {name} -->" in text


def test_a_changed_result_changes_the_table():
    row = {"name": "act", "median_ms": 1.0, "queued_ms": 2.0, "floor_ms": 0.5, "ratio": 2.0}
    assert "| act | 1.00 | 2.00 | 0.50 | 2.0 | 0.8 |" in tables.stages([row])


def test_encoder_work_is_that_of_its_layers():
    layers = floors.encoder_layers(AutoencoderConfig(image_size=64, depths=(16, 32)))
    assert layers == [(64 * 64 * 25 * 3 * 16, 64 * 64 * 16), (32 * 32 * 25 * 16 * 32, 32 * 32 * 32)]


def test_the_whole_step_is_the_sum_of_its_two_updates():
    state = jax.eval_shape(lambda key: agent.init(key, preset("xs").agent, 18), jax.random.key(0))
    work = floors.work(state)
    parts = work["world_model_update"], work["imagination_behaviour_update"]
    assert work["environment_step"] == tuple(map(sum, zip(*parts, strict=True)))
    # 1.9 TFLOP a step, of which the autoencoder's training 0.85.
    assert 1.8e12 < work["environment_step"][0] < 2.1e12

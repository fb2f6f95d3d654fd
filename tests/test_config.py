"""The configuration as a package: one set of names, arrows one way, values that pickle and hash."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import pickle

import pytest

from drama_jax import config

FOLDER = pathlib.Path(config.__file__).parent
# Each layer imports only from those above it.
LAYERS = (
    ("validation",),
    ("fidelity", "learning", "autoencoder", "backbone", "replay"),
    ("world_model", "behaviour"),
    ("agent",),
    ("run",),
    ("presets",),
)
CLASSES = [getattr(config, name) for name in config.__all__ if dataclasses.is_dataclass(getattr(config, name))]


def test_the_arrows_between_its_modules_point_one_way():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", *(name for layer in LAYERS for name in layer)}
    above: set[str] = set()
    for layer in LAYERS:
        for name in layer:
            tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
            found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
            own = {module.removeprefix("drama_jax.config.") for module in found if module.startswith("drama_jax")}
            assert own <= above, name
        above |= set(layer)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_value_is_found_by_its_equal_even_after_pickling(kind):
    value = kind()
    copy = pickle.loads(pickle.dumps(value))
    assert copy == value and {value: "found"}[copy] == "found" and type(copy) is kind
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))


@pytest.mark.parametrize("name", config.PRESETS)
def test_a_preset_is_the_same_value_each_time(name):
    assert config.preset(name) == config.preset(name) and hash(config.preset(name)) == hash(config.preset(name))

"""How many parameters the sequence models have at matched size, as a table.

    python -m experiments.parameters

The rows are what `--backbone NAME` chooses for a preset, the shares against `mamba2`.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from drama_jax import backbones
from drama_jax.config import PRESETS, BackboneName, ConfigError, preset
from experiments.command_line import parse_plain
from experiments.tables import markdown_table

_PROGRAM = "python -m experiments.parameters"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is counted."""

    actions: int = 18
    """Actions of the game; each has a row in the first layer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code: 0, or 2 after a mistake of the user."""
    try:
        options = parse_plain(Options, arguments, _PROGRAM, __doc__)
        if options.actions < 1:
            raise ConfigError(f"--actions must be positive, got {options.actions}")
        print(table(options.actions))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table(actions: int) -> str:
    """A Markdown table: a row for each backbone, and for each preset its parameters and their share of `mamba2`'s."""
    names = typing.get_args(BackboneName)
    counts = {name: {backbone: count(name, backbone, actions) for backbone in names} for name in PRESETS}
    # Presets of equal counts share a column.
    columns: dict[tuple[int, ...], list[str]] = {}
    for name, column in counts.items():
        columns.setdefault(tuple(column.values()), []).append(name)
    head = ["backbone", *(cell for presets in columns.values() for cell in (", ".join(presets), "of `mamba2`"))]
    body = [
        [f"`{backbone}`", *(cell for column in columns for cell in (f"{column[i]:,}", f"{column[i] / column[0]:.1%}"))]
        for i, backbone in enumerate(names)
    ]
    return markdown_table(head, body)


def count(name: str, backbone: BackboneName, actions: int) -> int:
    """Parameters of the sequence model that `--preset name --backbone backbone` trains."""
    config = preset(name, backbone).agent.world_model
    module = backbones.make(config.backbone, actions, jnp.float32)
    latent, action = jnp.zeros((1, 1, config.autoencoder.latent_size)), jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), latent, action)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


if __name__ == "__main__":
    sys.exit(main())

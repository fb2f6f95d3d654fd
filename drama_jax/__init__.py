"""Drama (arXiv 2410.08893) in JAX: a Mamba-2 world model that learns Atari from 100k steps.

The modules are the interface; each works alone:

* `agent`: `init`, `act`, `update`, the whole learner as pure functions of one state;
* `ssd`: the state-space-duality scan of Mamba-2 with resets; `backbones`: Mamba-2 and other sequence models;
* `vae`, `world_model`, `imagination`, `behaviour`: the learner's parts; `replay`, `dfs`: its memory and sampler;
* `action_space`: discrete actions or continuous ones;
* `interop`: weights of the released PyTorch code; `config`: every setting.

`drama_jax.envs` and `drama_jax.training` need `python -m pip install -e '.[experiments]'` and are not imported here.
"""

from drama_jax import (
    action_space,
    agent,
    backbones,
    behaviour,
    config,
    dfs,
    distributions,
    imagination,
    interop,
    nn,
    optim,
    replay,
    ssd,
    vae,
    world_model,
)

__all__ = [
    "action_space",
    "agent",
    "backbones",
    "behaviour",
    "config",
    "dfs",
    "distributions",
    "imagination",
    "interop",
    "nn",
    "optim",
    "replay",
    "ssd",
    "vae",
    "world_model",
]

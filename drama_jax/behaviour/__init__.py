"""Behaviour learning in imagination: actor, critic, lambda-returns, normalisers; `ppo` updates them another way."""

from drama_jax.behaviour import ppo
from drama_jax.behaviour.actor_critic import (
    BehaviourState,
    LossTerms,
    init,
    loss,
    policy_logits,
    sample_actions,
    update,
    value_logits,
)
from drama_jax.behaviour.normalisers import InputNormaliser, ReturnScale
from drama_jax.behaviour.returns import lambda_returns, survival

__all__ = [
    "BehaviourState",
    "InputNormaliser",
    "LossTerms",
    "ReturnScale",
    "init",
    "lambda_returns",
    "loss",
    "policy_logits",
    "ppo",
    "sample_actions",
    "survival",
    "update",
    "value_logits",
]

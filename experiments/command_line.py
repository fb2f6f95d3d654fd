"""Flags: what is looked at before the others, dataclasses from tyro, and every mistake as one line."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import shlex
import sys
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from drama_jax.config import BackboneName, BehaviourName, ConfigError

Parsed = TypeVar("Parsed")


def given(arguments: Sequence[str], flag: str) -> str | None:
    """What a flag is given, the last time, before anything else is parsed; None if it is not there."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == f"--{flag}" and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"--{flag}="):
            found = argument.removeprefix(f"--{flag}=")
    return found


def chosen(arguments: Sequence[str], flag: str, name: str, accepted: Sequence[str]) -> Any:
    """What a flag is given, else `name`, before anything else is parsed, because it decides the others' defaults.

    Raises:
      ConfigError: if it is none of what is accepted.
    """
    found = given(arguments, flag)
    name = name if found is None else found
    if name not in accepted:
        raise ConfigError(f"--{flag}: unknown {flag} {name!r}; accepted: {', '.join(accepted)}")
    return name


def chosen_parts(arguments: Sequence[str]) -> tuple[BackboneName, BehaviourName]:
    """What --backbone and --behaviour are given; see `chosen`."""
    return (
        chosen(arguments, "backbone", "mamba2", typing.get_args(BackboneName)),
        chosen(arguments, "behaviour", "actor_critic", typing.get_args(BehaviourName)),
    )


def to_continue(arguments: Sequence[str], program: str, directory: pathlib.Path) -> str:
    """The command that continues the run in `directory` which `arguments` started, quoted for a shell."""
    kept: list[str] = []
    values = iter(arguments)
    for argument in values:
        flag = argument.partition("=")[0].replace("_", "-")  # tyro takes either
        if argument == "--logdir":
            next(values)
        elif flag not in ("--no-resume", "--resume", "--logdir"):
            kept.append(argument)
    return f"{program} {shlex.join([*kept, '--logdir', str(directory)])}"


def compilation_cache() -> pathlib.Path | None:
    """Where compiled programs are kept if no flag says otherwise; None for a user without a home."""
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drama_jax"
    except RuntimeError:
        return None


def parse_plain(
    kind: type[Parsed],
    arguments: Sequence[str] | None,
    program: str,
    description: str | None,
    default: Parsed | None = None,
) -> Parsed:
    """The command line of a small program as a dataclass, the values of `default` where a flag is not given.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    how = {} if default is None else {"default": default}
    return _parse(kind, arguments, prog=program, description=description, **how)


def _parse(kind: type[Parsed], arguments: Sequence[str], **how: Any) -> Parsed:
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(kind, args=list(arguments), **how)
    except SystemExit as stop:
        if not stop.code:
            sys.stderr.write(messages.getvalue())
            raise
    raise ConfigError(with_flags(_plain(_one_line(messages.getvalue()), arguments)))


def _one_line(box: str) -> str:
    """What tyro prints in a box (Unicode or ASCII), as one line: the error, and the flags it thinks were meant."""
    lines = [line.strip("│╭╰╮╯|+ ") for line in box.splitlines()[1:]]  # the first line is the title
    text = "\n".join("\0" if line and not line.strip("─-") else line for line in lines)
    error, *rest = (section.strip() for section in text.split("\0") if section.strip())
    error = " ".join(error.split())
    meant = re.findall(r"^--[\w.-]+", "\n".join(rest), re.MULTILINE) if "Perhaps" in box else []
    return f"{error}; perhaps {' or '.join(meant[:4])}" if meant else f"{error}; see --help"


# How tyro says that a value does not fit, and how this program does.
_WORDS = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 must be an integer, got \2"),
    (r"Error parsing (\S+): Exceeds the limit .*", r"\1 must be an integer of fewer digits"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 must be a number, got \2"),
    (r"Error parsing (\S+): Could not find valid parse for arguments: (.*)", r"\1 must be numbers, got \2"),
    (r"Missing value for argument '(\S+)'. Expected 1 values.(.*)", r"\1 needs a value\2"),
    (r"Missing value for argument '(\S+)'. Expected (\d+) values.(.*)", r"\1 needs \2 values\3"),
    (r"invalid choice (.*) for argument '(\S+)'. Expected one of \((.*?),?\)\.(.*)", r"\2 must be one of \3, got \1\4"),
)


def _letters(text: str) -> str:
    """What of a text is sure to survive tyro's boxes, which wrap long words and drop control characters."""
    return "".join(filter(str.isalnum, text))


def _plain(error: str, arguments: Sequence[str]) -> str:
    """An error of tyro's with the flag in front, what was given and what is accepted."""
    for theirs, ours in _WORDS:
        error = re.sub(rf"^{theirs}$", ours, error)
    unknown = re.match(r"Unrecognized options: ?(.*?)(, .*)?; ", error)
    if unknown and not re.match("--?[A-Za-z]", unknown[1]):
        values = [given.partition("=")[2] if re.match("--.*=", given, re.DOTALL) else given for given in arguments]
        place = max((i for i, value in enumerate(values) if _letters(value) == _letters(unknown[1])), default=-1)
        flag = next((given for given in reversed(arguments[: place + 1]) if given.startswith("--")), None)
        if flag:
            error = f"{flag.partition('=')[0]}: {values[place]!r} is one value too many; see --help-all"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in error)


def with_flags(message: str) -> str:
    """Names the flag where a message names a field of the configuration."""
    message = re.sub(r"\b(Task)?RunConfig\.", "", message)
    message = re.sub("^compute_dtype", "--agent.world-model.compute-dtype or --agent.behaviour.compute-dtype", message)
    if message.startswith("Missing from") and "--game" in message:
        return "--game is missing; name an Atari game, for example --game Breakout"
    message = message.replace("ReplayConfig.", "agent.replay.").replace(
        "raise warmup_steps", "raise --agent.warmup-steps"
    )
    message = re.sub("^image_size ", "--agent.world-model.autoencoder.image-size ", message)
    field = re.match(r"(?:Error parsing (?P<group>[\w.-]+): )?(?P<owner>[\w.]+)\.(?P<name>\w+)", message)
    if field:
        # A group's own checks name its class; a check across groups names another one.
        owner = field["group"] if field["group"] and field["owner"].endswith("Config") else field["owner"]
        owner = owner.replace("EvaluationConfig", "evaluation")
        flag = f"--{owner}.{field['name']}".replace("_", "-").replace("lambda-", "lambda_")
        message = flag + message[field.end() :]
    message = message.replace("--evaluation.episodes", "--eval-episodes")
    return re.sub("^(steps|seed|max_skipped_updates)(?= )", lambda name: f"--{name[0].replace('_', '-')}", message)

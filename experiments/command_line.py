"""The command line of a run: a few plain flags, a preset, and a dotted flag for every field of the configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shlex
import sys
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import tyro

from drama_jax.config import (
    AgentConfig,
    AnyRunConfig,
    AtariConfig,
    BackboneName,
    BehaviourName,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    RunConfig,
    preset,
)

Parsed = TypeVar("Parsed")
_MOST_AGENTS = 1024
_PRESETS = ("tiny", "xs", "s", "reference")
_DESCRIPTION = """Trains Drama on one Atari game and evaluates it. Steps are agent steps: 1 step = 4 emulator frames.

Every other setting has a dotted flag, applied over the preset, for example
--agent.replay.tau 20, --atari.sticky-actions 0.25, --logging.no-tensorboard.
--help-all lists them with the chosen preset's values."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that most runs need."""

    game: str
    """Atari game, for example Breakout or MsPacman."""
    preset: Literal["tiny", "xs", "s", "reference"]
    """tiny: minutes on a laptop CPU. xs: the paper's 7 M-parameter model. s: twice the autoencoder channels.
    reference: xs with the quirks of the released PyTorch code."""
    steps: int
    """Agent steps to train for."""
    seed: int
    """Seed of everything random."""
    seeds: int
    """Agents to train in one process, of seeds SEED, SEED + 1, ...; each has its own run directory."""
    devices: int | None
    """GPUs of this machine to share the agents out to; as many as divide their number if not given."""
    logdir: pathlib.Path
    """Runs go to LOGDIR/GAME/PRESET/seedK-TIME. May also be such a directory, to continue that run."""
    env_backend: Literal["envpool", "ale"]
    """Emulator: EnvPool, or ale-py (python -m pip install -e '.[ale]')."""
    eval_episodes: int
    """Episodes played to their end after training; 0 skips the evaluation."""
    backbone: BackboneName
    """Sequence model, of mamba2's size."""
    behaviour: BehaviourName
    """How actor and critic learn."""
    sampler: Literal["dfs", "uniform"]
    """How the replay is sampled: dynamic frequency-based sampling, or uniformly."""
    compilation_cache: pathlib.Path | None
    """Where compiled programs are kept for the next run; None to keep none."""
    resume: bool
    """Continue the newest unfinished run of this game, preset and seed; --no-resume starts a new one."""
    deterministic: bool
    """Make a GPU give the same numbers in every run of a seed, and take longer. A CPU always does."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Several values of one number: an agent for each, all in one process; with --seeds, so many for each.

    Of two numbers with as many values the first belong together, the second, and so on."""

    learning_rate: tuple[float, ...] = ()
    """Of the world model."""
    behaviour_learning_rate: tuple[float, ...] = ()
    """Of actor and critic."""
    entropy_scale: tuple[float, ...] = ()
    """Weight of the policy's entropy."""
    tau: tuple[float, ...] = ()
    """Temperature of the world model's sampler."""
    imagination_tau: tuple[float, ...] = ()
    """Temperature of imagination's sampler."""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The same command started several times, on one machine or several; each process trains its share of the agents.

    They meet at the start and then go on by themselves."""

    coordinator: str | None = None
    """HOST:PORT of process 0, any free port of its machine; auto: all from Slurm, Open MPI or Kubernetes."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """The number of this one, from 0."""
    timeout: int = 300
    """Seconds to wait for the others."""

    @property
    def label(self) -> str:
        """What tells this process's output from the others'."""
        return "" if self.process is None else f"process {self.process} of {self.processes}: "


_SWEPT = {
    "learning_rate": "agent/world_model/optimizer/learning_rate",
    "behaviour_learning_rate": "agent/behaviour/optimizer/learning_rate",
    "entropy_scale": "agent/behaviour/entropy_scale",
    "tau": "agent/replay/tau",
    "imagination_tau": "agent/replay/imagination_tau",
}
"""Field of `Sweep` -> the field of the configuration that it gives values to."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One agent of a command."""

    config: RunConfig
    swept: dict[str, float]
    """The fields of its configuration that `Sweep` has set, by path."""

    @property
    def label(self) -> str:
        """What tells it from the command's other agents."""
        values = "".join(f" {path.rpartition('/')[2]} {value:g}" for path, value in self.swept.items())
        return f"seed {self.config.seed}{values}"

    @property
    def same(self) -> dict[str, Any]:
        """Fields of a run's configuration, by path, that make it a run of this agent."""
        agent = self.config.agent
        backbone, behaviour = agent.world_model.backbone.name, agent.behaviour.name
        return {"agent/world_model/backbone/name": backbone, "agent/behaviour/name": behaviour} | self.swept


@dataclasses.dataclass(frozen=True)
class AllOptions(Options):
    """The flags that most runs need, and every other field."""

    sweep: Sweep
    distributed: Distributed
    agent: AgentConfig
    atari: AtariConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig
    max_skipped_updates: int
    """Stop after so many updates in a row whose loss or gradient was not finite; each is skipped and counted."""
    debug_nans: bool
    """For developers: stop with a traceback where the first NaN is made (jax_debug_nans); slow."""
    check: bool
    """For developers: check the agent's invariants after every step (chex); slow."""


def parse(arguments: Sequence[str], program: str) -> tuple[AllOptions, RunConfig]:
    """The options and the resolved configuration: the preset, then dotted flags, then plain flags.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help or --help-all.
    """
    base = preset(
        chosen(arguments, "preset", "xs", _PRESETS),
        chosen(arguments, "backbone", "mamba2", typing.get_args(BackboneName)),
        chosen(arguments, "behaviour", "actor_critic", typing.get_args(BehaviourName)),
    )
    if "--help-all" in arguments:
        arguments = ["--help"]
    elif "--help" in arguments or "-h" in arguments:
        tyro.cli(Options, args=["--help"], prog=program, description=_DESCRIPTION, default=_defaults(Options, base))
    options = _parse(AllOptions, arguments, prog=program, default=_defaults(AllOptions, base))
    try:
        return options, _resolve(options, base)
    except ConfigError as error:
        raise ConfigError(with_flags(str(error))) from None


def plan(options: AllOptions, config: RunConfig) -> list[Planned]:
    """The agents of a command: every seed with every value swept.

    Raises:
      ConfigError: if there are too many, or if a value cannot be taken.
    """
    given = {name: values for name, values in dataclasses.asdict(options.sweep).items() if values}
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"--sweep.{name.replace('_', '-')} has {count}" for name, count in lengths.items())
        raise ConfigError(f"{counts} values; give each as many")
    points = [dict(zip(given, values)) for values in zip(*given.values())] or [{}]
    if not 1 <= options.seeds * len(points) <= _MOST_AGENTS:
        raise ConfigError(
            f"--seeds {options.seeds}: must be at least 1, and with the values swept at most {_MOST_AGENTS} agents"
        )
    if len({tuple(point.values()) for point in points}) < len(points):
        raise ConfigError(f"--sweep.{next(iter(given)).replace('_', '-')} gives the same agent twice; leave one out")
    return [
        _planned(config, seed, {_SWEPT[name]: value for name, value in point.items()})
        for point in points
        for seed in range(config.seed, config.seed + options.seeds)
    ]


def _planned(config: RunConfig, seed: int, swept: dict[str, float]) -> Planned:
    try:
        config = dataclasses.replace(config, seed=seed)
        for path, value in swept.items():
            config = _with(config, path.split("/"), value)
    except ConfigError as error:
        raise ConfigError(with_flags(str(error))) from None
    return Planned(config, swept)


def _with(config: Any, path: Sequence[str], value: float) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def to_continue(arguments: Sequence[str], program: str, directory: pathlib.Path) -> str:
    """The command that continues the run in `directory` which `arguments` started, quoted for a shell."""
    kept: list[str] = []
    values = iter(arguments)
    for argument in values:
        if argument == "--logdir":
            next(values)
        elif argument not in ("--no-resume", "--resume") and not argument.startswith("--logdir="):
            kept.append(argument)
    return f"{program} {shlex.join([*kept, '--logdir', str(directory)])}"


def chosen(arguments: Sequence[str], flag: str, name: str, accepted: Sequence[str]) -> Any:
    """What a flag is given, else `name`, before anything else is parsed, because it decides the others' defaults."""
    for index, argument in enumerate(arguments):
        if argument == f"--{flag}" and index + 1 < len(arguments):
            name = arguments[index + 1]
        elif argument.startswith(f"--{flag}="):
            name = argument.removeprefix(f"--{flag}=")
    if name not in accepted:
        raise ConfigError(f"--{flag}: unknown {flag} {name!r}; accepted: {', '.join(accepted)}")
    return name


def _defaults(kind: type[Any], base: RunConfig) -> Any:
    """The preset's values, as the defaults of the flags."""
    values = {
        "game": tyro.MISSING,
        "preset": "xs",
        "steps": base.steps,
        "seed": base.seed,
        "seeds": 1,
        "devices": None,
        "sweep": Sweep(),
        "distributed": Distributed(),
        "logdir": pathlib.Path("runs"),
        "env_backend": base.atari.backend,
        "eval_episodes": base.evaluation.episodes,
        "backbone": base.agent.world_model.backbone.name,
        "behaviour": base.agent.behaviour.name,
        "sampler": base.agent.replay.sampler,
        "compilation_cache": compilation_cache(),
        "resume": True,
        "deterministic": False,
        "agent": base.agent,
        "atari": base.atari,
        "evaluation": base.evaluation,
        "logging": base.logging,
        "max_skipped_updates": base.max_skipped_updates,
        "debug_nans": False,
        "check": False,
    }
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


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


def _resolve(options: AllOptions, base: RunConfig) -> RunConfig:
    atari = options.atari
    if options.env_backend != base.atari.backend:
        atari = dataclasses.replace(atari, backend=options.env_backend)
    return RunConfig(atari=atari, **resolve_common(options, base))


def resolve_common(options: Any, base: AnyRunConfig) -> dict[str, Any]:
    """The fields that every run has; a plain flag that differs from the preset's value wins over its dotted twin.

    Args:
      options: What was parsed, of Atari or of EnvPool's other tasks.
      base: The preset.
    """
    agent, evaluation = options.agent, options.evaluation
    if options.sampler != base.agent.replay.sampler:
        agent = dataclasses.replace(agent, replay=dataclasses.replace(agent.replay, sampler=options.sampler))
    if options.eval_episodes != base.evaluation.episodes:
        evaluation = dataclasses.replace(evaluation, episodes=options.eval_episodes)
    same = {name: getattr(options, name) for name in ("logging", "steps", "max_skipped_updates", "seed")}
    return {"agent": agent, "evaluation": evaluation} | same


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
    message = message.replace("RunConfig.", "")
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
    return re.sub(r"^(steps|seed) ", r"--\1 ", message.replace("--evaluation.episodes", "--eval-episodes"))

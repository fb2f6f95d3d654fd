"""Names of the Atari games, and the finding of one from what a user typed."""

from __future__ import annotations

import difflib
import re

from drama_jax.config import ConfigError

ATARI_100K = (
    "Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout", "ChopperCommand",
    "CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero", "Jamesbond", "Kangaroo", "Krull",
    "KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert", "RoadRunner", "Seaquest", "UpNDown",
)  # fmt: skip
"""The 26 games of the Atari 100k benchmark."""

# The other games that both backends have.
_OTHERS = (
    "Adventure", "AirRaid", "Asteroids", "Atlantis", "Atlantis2", "Backgammon", "BasicMath", "BeamRider", "Berzerk",
    "Blackjack", "Bowling", "Carnival", "Casino", "Centipede", "Crossbow", "Darkchambers", "Defender", "DonkeyKong",
    "DoubleDunk", "Earthworld", "ElevatorAction", "Enduro", "Entombed", "Et", "FishingDerby", "FlagCapture", "Frogger",
    "Galaxian", "Gravitar", "Hangman", "HauntedHouse", "HumanCannonball", "IceHockey", "JourneyEscape", "Kaboom",
    "KeystoneKapers", "KingKong", "Klax", "Koolaid", "LaserGates", "LostLuggage", "MarioBros", "MiniatureGolf",
    "MontezumaRevenge", "MrDo", "NameThisGame", "Othello", "Pacman", "Phoenix", "Pitfall", "Pitfall2", "Pooyan",
    "Riverraid", "Robotank", "SirLancelot", "Skiing", "Solaris", "SpaceInvaders", "SpaceWar", "StarGunner", "Superman",
    "Surround", "Tennis", "Tetris", "TicTacToe3d", "TimePilot", "Trondead", "Turmoil", "Tutankham", "Venture",
    "VideoCheckers", "VideoChess", "VideoCube", "VideoPinball", "WizardOfWor", "WordZapper", "YarsRevenge", "Zaxxon",
)  # fmt: skip

GAMES = tuple(sorted(ATARI_100K + _OTHERS))
"""Every game that can be played, as `make_atari` names it."""


def canonical_game(name: str) -> str:
    """The game's name in CamelCase; `name` may also be in snake_case or lower case ("ms_pacman", "mspacman").

    Raises:
      ConfigError: no such game; the message suggests the nearest names.
    """
    if not isinstance(name, str):
        raise ConfigError(f"a game's name must be a string, got {name!r}")
    games = {_fold(game): game for game in GAMES}
    if _fold(name) in games:
        return games[_fold(name)]
    near = [games[key] for key in difflib.get_close_matches(_fold(name), games, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"for instance {', '.join(ATARI_100K[:5])}"
    raise ConfigError(f"unknown game {name!r}: {hint}")


def rom_name(game: str) -> str:
    """The emulator's snake_case name of a CamelCase game: MsPacman -> ms_pacman, TicTacToe3d -> tic_tac_toe_3d."""
    return re.sub(r"(?<=.)(?=[A-Z]|\d+d)", "_", game).lower()


def _fold(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())

"""Names of games."""

import pytest

from drama_jax.config import ConfigError
from drama_jax.envs import games


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Breakout", "Breakout"),
        ("ms_pacman", "MsPacman"),
        ("MsPacman", "MsPacman"),
        ("mspacman", "MsPacman"),
        ("up_n_down", "UpNDown"),
        ("KUNG-FU-MASTER", "KungFuMaster"),
    ],
)
def test_accepted_spellings(given, expected):
    assert games.canonical_game(given) == expected


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [("Brakout", "did you mean Breakout"), ("Pacmann", "Pacman"), ("Pongg", "Pong"), ("", "for instance Alien")],
)
def test_unknown_names_get_one_line_with_the_nearest(given, suggestion):
    with pytest.raises(ConfigError) as error:
        games.canonical_game(given)
    assert repr(given) in str(error.value)
    assert suggestion in str(error.value)
    assert "\n" not in str(error.value)


def test_every_game_is_known_to_both_backends():
    import envpool
    from ale_py import roms

    assert len(games.ATARI_100K) == 26
    assert len(set(games.GAMES)) == len(games.GAMES)
    assert {f"{game}-v5" for game in games.GAMES} <= set(envpool.list_all_envs())
    assert {games.rom_name(game) for game in games.GAMES} <= set(roms.get_all_rom_ids())

"""What the README says is true: its Python runs, its commands and files exist, its numbers are right."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from drama_jax import agent
from drama_jax.config import PRESETS, Fidelity, preset

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_runs(code):
    # As a user has it: without the strict dtype promotion of the tests.
    with jax.numpy_dtype_promotion("standard"):
        names: dict[str, object] = {}
        exec(compile(code, "README.md", "exec"), names)
    for line in code.splitlines():
        shape = re.search(r"^(\w+), .*# (\[[\d, ]+\])$", line)
        if shape:
            result = names[shape[1]]
            assert isinstance(result, jax.Array) and str(list(result.shape)) == shape[2]
            assert jnp.isfinite(result).all()


def test_there_is_python_to_run():
    assert PYTHON and all(len(code.splitlines()) <= 14 for code in PYTHON)


def test_the_first_screen_holds_the_two_commands():
    commands = [code.strip() for language, code in BLOCKS if language == "bash"][:2]
    assert commands == [
        "python -m pip install -e '.[experiments]' && python -m experiments.atari100k --game Breakout --preset tiny",
        "python -m pip install -e '.[test]' && python -m pytest",
    ]
    assert README.index(commands[1]) < README.index("## ")


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets(name):
    config = preset(name)
    state = jax.eval_shape(lambda key: agent.init(key, config.agent, 18), jax.random.key(0))
    trees = state.world_model.params, state.behaviour.params["actor"], state.behaviour.params["critic"]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees]
    (row,) = re.findall(rf"^\| `{name}`.*$", README, re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")[2:6]] == [f"{number:,}" for number in (*counts, config.steps)]


def test_every_field_of_fidelity_is_explained():
    section = README.split("## Fidelity")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert rows == [field.name for field in dataclasses.fields(Fidelity)]


def test_every_path_in_the_layout_exists():
    layout = next(code for language, code in BLOCKS if not language)
    inside, outside = layout.split("drama_jax/\n")[1].split("\nexperiments/")
    paths = [ROOT / "drama_jax" / name for name in re.findall(r"(?:^|\s)(\w+(?:\.py|/))(?=\s)", inside)]
    paths += [ROOT / name for name in re.findall(r"(?:^|\s)(\w+/)(?=\s)", "experiments/" + outside)]
    assert len(paths) == 29
    assert [str(path) for path in paths if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_and_section_exists(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert links
    for link in links:
        name, _, section = link.partition("#")
        target = (page.parent / name).resolve()
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", PAGES[target], re.MULTILINE) if section else []
        assert not section or section in [title.lower().replace(" ", "-") for title in titles], link


def test_every_page_is_linked():
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"docs/{page.name}" not in README] == []


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[\w.-]+)", "".join(PAGES.values())))))
def test_every_flag_is_accepted(flag, capsys):
    from experiments import atari_options

    arguments = ["--help-all"]
    with pytest.raises(SystemExit) as stop:
        atari_options.parse(arguments, "x")
    assert stop.value.code in (0, None)
    assert flag in (output := capsys.readouterr().out) or flag in ("--help", "--help-all"), output[:200]

"""What the grid world's study found: its file, its tables, its picture.

The file holds two parts, made together or apart: `errors` and `costs`, each with the settings that all its rows share,
and a row for every backbone and length. A row says on which device, with which versions and at which commit it was
made.
"""

from __future__ import annotations

import json
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drama_jax.config import BackboneName, ConfigError
from drama_jax.training import scores
from experiments import figures
from experiments.tables import markdown_table, standard_error

NAME = "grid_world"
"""Of the files in OUT: grid_world.json, .md and .png."""
_KINDS = ("colour", "cell", "frame")
Row = dict[str, Any]


def bins(frames: int) -> list[tuple[int, int]]:
    """First and last gap of each group: 0 (never shown), 1, 2-3, 4-7, ..., as far as `frames` frames reach."""
    edges = [0, 1]
    while 2 * edges[-1] < frames:
        edges.append(2 * edges[-1])
    return list(zip(edges, [*(edge - 1 for edge in edges[1:]), frames - 1]))


def bin_name(low: int, high: int) -> str:
    """A group of gaps in words."""
    return "never" if high == 0 else str(low) if low == high else f"{low}-{high}"


def binned(counts: np.ndarray, frames: int) -> list[list[int]]:
    """Counts by gap [seeds, W] -> by group of gaps, [seeds][groups]."""
    sums = [counts[:, low : high + 1].sum(axis=1) for low, high in bins(frames)]
    return [[int(count) for count in seed] for seed in np.stack(sums, axis=1)]


def rates(row: Row, kind: str, *, groups: slice = slice(None)) -> np.ndarray:
    """Share of frames predicted wrong, per seed, over some groups of gaps together; `kind` is one of `_KINDS`."""
    wrong, frames = (np.asarray(row[name])[:, groups].sum(axis=1) for name in (kind, "frames_by_gap"))
    return wrong / np.maximum(frames, 1)


def rates_by_gap(row: Row, kind: str) -> np.ndarray:
    """The same for each group by itself, [seeds, groups]; NaN where there was none."""
    frames = np.asarray(row["frames_by_gap"], np.float64)
    return np.asarray(row[kind]) / np.where(frames > 0, frames, np.nan)


def read(path: pathlib.Path) -> dict[str, Any]:
    """The file's content; without parts if there is none.

    Raises:
      ConfigError: if it is not one of this study's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"study": NAME}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); name another --out") from error
    if not isinstance(content, dict) or content.get("study") != NAME:
        raise ConfigError(f"{path} is not of this study; name another --out")
    return content


def check(content: Mapping[str, Any], part: str, settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raises a ConfigError if the file at `path` has rows of this part that were made with other settings."""
    held = content.get(part, {"settings": settings})["settings"]
    for name, given in settings.items():
        if held.get(name) != given:
            raise ConfigError(
                f"{path} has {part} made with {name} {held.get(name)}, here {given}; give that, or another --out"
            )


def add(out: pathlib.Path, part: str, settings: Mapping[str, Any], row: Row) -> None:
    """Puts a row into the file, in place of the one of this backbone and length if there is one.

    The file is read anew, so that one process may make errors while another one makes costs.

    Raises:
      ConfigError: if the file has rows that were made with other settings, or cannot be written.
    """
    path = out / f"{NAME}.json"
    content = read(path)
    check(content, part, settings, path)
    rows: list[Row] = content.get(part, {"rows": []})["rows"]
    here = row["backbone"], row["frames"]
    rows = [*(old for old in rows if (old["backbone"], old["frames"]) != here), row]
    order = typing.get_args(BackboneName)
    rows.sort(key=lambda row: (order.index(row["backbone"]), row["frames"]))
    content[part] = {"settings": dict(settings), "rows": rows}
    try:
        out.mkdir(parents=True, exist_ok=True)
        scores.write(path, content)
    except OSError as error:
        raise ConfigError(f"--out {error.filename}: cannot be written ({error.strerror})") from error


def report(content: Mapping[str, Any], out: pathlib.Path) -> str:
    """Writes tables and picture to `out`; returns the tables.

    Raises:
      ConfigError: if there is nothing to show, or it cannot be written.
    """
    text = "\n\n".join(
        table(content) for part, table in (("costs", costs_table), ("errors", errors_table)) if part in content
    )
    if not text:
        raise ConfigError(f"--out {out}: there is nothing to report yet; leave --only report out")
    try:
        (out / f"{NAME}.md").write_text(text + "\n", encoding="utf-8")
        draw(content, out / f"{NAME}.png")
    except OSError as error:
        raise ConfigError(f"--out {error.filename}: cannot be written ({error.strerror})") from error
    return text


def costs_table(content: Mapping[str, Any]) -> str:
    """A row per backbone: what an update and a token cost at every length, and how much more at the longest."""
    part = content["costs"]
    lengths = sorted({row["frames"] for row in part["rows"]})
    tokens = {row["frames"]: row["tokens"] for row in part["rows"]}
    longest = max(tokens.values()) / min(tokens.values())
    units = {"update_ms": "update, ms", "update_mb": "memory, MB", "step_us": "one token, µs", "state_kb": "state, kB"}
    head = ["backbone"]
    for unit in units.values():
        head += [unit, "times"] if len(lengths) > 1 else [unit]
    body = []
    for name in dict.fromkeys(row["backbone"] for row in part["rows"]):
        rows = {row["frames"]: row for row in part["rows"] if row["backbone"] == name}
        cells = [f"`{name}`"]
        for unit in units:
            cells.append(" / ".join(_short(rows[frames][unit]) if frames in rows else "-" for frames in lengths))
            if len(lengths) > 1:
                both = lengths[0] in rows and lengths[-1] in rows
                cells.append(f"{rows[lengths[-1]][unit] / rows[lengths[0]][unit]:.1f}" if both else "")
        body.append(cells)
    note = f"{' / '.join(f'{tokens[frames]:,}' for frames in lengths)} tokens, {part['settings']['batch']} sequences. "
    if len(lengths) > 1:
        note += f"There are {longest:.0f} times as many tokens: {longest:.0f} is linear, {longest**2:.0f} quadratic. "
    note += _made(part["rows"])
    return markdown_table(head, body) + "\n\n" + note


def errors_table(content: Mapping[str, Any]) -> str:
    """A row per backbone and length: errors in per cent, mean ± standard error over seeds, with what chance gets."""
    part = content["errors"]
    colours = part["settings"]["colours"]
    chance = 1 - 1 / colours
    groups = bins(max(row["frames"] for row in part["rows"]))
    head = ["backbone", "frames", "parameters", "frame", "cell", "colour", "colour, shown before"]
    head += [f"{'' if high == 0 else 'gap '}{bin_name(low, high)}" for low, high in groups]
    body = []
    for row in part["rows"]:
        seen = rates(row, "colour", groups=slice(1, None))
        values = [rates(row, "frame"), rates(row, "cell"), rates(row, "colour"), seen]
        by_gap = [_percent(column) for column in rates_by_gap(row, "colour").T]
        cells = [_percent(value) for value in values] + by_gap + [""] * (len(groups) - len(by_gap))
        body.append([f"`{row['backbone']}`", str(row["frames"]), f"{row['parameters']:,}", *cells])
    for frames in sorted({row["frames"] for row in part["rows"]}):
        rows = [row for row in part["rows"] if row["frames"] == frames]
        new = np.concatenate([np.asarray(row["frames_by_gap"]) for row in rows]).sum(axis=0)
        least = f"{chance * new[0] / new.sum():.1%}".rstrip("%")
        known = ["0"] * (len(new) - 1) + [""] * (len(groups) - len(new))
        body.append(["best possible", str(frames), "", least, least, least, "0", f"{100 * chance:.0f}", *known])
    body.append(["chance", "", "", "100", "100", *[f"{100 * chance:.0f}"] * (2 + len(groups))])
    settings = part["settings"]
    note = f"Per cent, {settings['seeds']} seeds, {settings['updates']:,} updates of {settings['frames_per_update']} "
    note += f"frames, learning rate {settings['learning_rate']:g}. {_made(part['rows'])}"
    return markdown_table(head, body) + "\n\n" + note


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    error = standard_error(list(known))
    return "" if not len(known) else f"{100 * known.mean():.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _made(rows: Sequence[Row]) -> str:
    """Where rows come from, in one sentence."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for made in (row["made"] for row in rows):
        kinds.setdefault((made["device"], made["versions"]["jax"]), set()).add(f"`{str(made['commit'])[:7]}`")
    texts = (
        f"{device}, jax {jax}, at {', '.join(sorted(commits))}" for (device, jax), commits in sorted(kinds.items())
    )
    return f"Made on {'; '.join(texts)}."


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Error against gap, and time and memory against length, as far as they are known.

    Raises:
      ConfigError: if matplotlib is missing.
    """
    parts = [part for part in ("errors", "costs") if part in content]
    panels = sum({"errors": 1, "costs": 2}[part] for part in parts)
    picture = figures.import_figure()(figsize=(1.5 + 4.0 * panels, 3.8), layout="constrained")
    axes = list(np.atleast_1d(picture.subplots(1, panels)))
    there = {row["backbone"] for part in parts for row in content[part]["rows"]}
    colour_of = {name: f"C{i}" for i, name in enumerate(typing.get_args(BackboneName)) if name in there}
    if "errors" in parts:
        _draw_errors(axes.pop(0), content["errors"], colour_of)
    if "costs" in parts:
        for axis, unit, label in zip(axes, ("update_ms", "update_mb"), ("update, ms", "memory of an update, MB")):
            _draw_costs(axis, content["costs"], unit, label, colour_of)
    picture.savefig(path, dpi=110)


def _draw_errors(axis: Any, part: Mapping[str, Any], colour_of: Mapping[str, str]) -> None:
    """Error of the colour of a cell by how long ago it was shown: longest sequences solid, with the seeds' range."""
    longest = max(row["frames"] for row in part["rows"])
    for row in part["rows"]:
        values = 100 * rates_by_gap(row, "colour")
        known = np.isfinite(values).all(axis=0)
        places, colour = np.arange(values.shape[1])[known], colour_of[row["backbone"]]
        style = "-" if row["frames"] == longest else "--"
        label = f"{row['backbone']}, {row['frames']} frames"
        axis.plot(places, values[:, known].mean(axis=0), style, color=colour, marker="o", markersize=3, label=label)
        if row["frames"] == longest:
            low, high = values[:, known].min(axis=0), values[:, known].max(axis=0)
            axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.axhline(100 - 100 / part["settings"]["colours"], color="0.5", linestyle=":", linewidth=1, label="chance")
    groups = bins(longest)
    axis.set_xticks(range(len(groups)), [bin_name(*group) for group in groups])
    axis.set_ylim(-3, 100)
    axis.set_xlabel("frames since the cell was last shown")
    axis.set_ylabel("colour predicted wrong, %")
    axis.legend(fontsize=6, ncol=2, loc="lower right")


def _draw_costs(axis: Any, part: Mapping[str, Any], unit: str, label: str, colour_of: Mapping[str, str]) -> None:
    """A cost against the tokens of a sequence, with a line of what is linear."""
    for name, colour in colour_of.items():
        rows = sorted((row for row in part["rows"] if row["backbone"] == name), key=lambda row: row["tokens"])
        axis.plot(
            [row["tokens"] for row in rows], [row[unit] for row in rows], "o-", color=colour, label=name, markersize=4
        )
    tokens = sorted({row["tokens"] for row in part["rows"]})
    least = min(row[unit] for row in part["rows"] if row["tokens"] == tokens[0])
    guide = [0.7 * least * length / tokens[0] for length in tokens]
    axis.plot(tokens, guide, ":", color="0.5", linewidth=1, label="linear")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(tokens, [f"{length:,}" for length in tokens])
    axis.minorticks_off()
    axis.set_xlabel("tokens of a sequence")
    axis.set_ylabel(label)
    axis.legend(fontsize=7)

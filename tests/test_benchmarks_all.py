"""`benchmarks.all`: parts run in their order, within their time, and only as often as needed."""

import pathlib
import sys
import time

import pytest

from benchmarks import all as everything


@pytest.fixture
def parts(monkeypatch):
    """Three parts: one that ends well and writes a line each time, one that fails, one that takes too long."""
    programs = {
        "good": "import sys; open(sys.argv[1] + '/result', 'a').write('measured\\n'); print('said')",
        "bad": "raise SystemExit('went wrong')",
        "long": "import time; print('begun', flush=True); time.sleep(600)",
    }
    monkeypatch.setattr(everything, "PARTS", {name: (3 if name == "long" else 60, name) for name in programs})
    monkeypatch.setattr(everything, "command", lambda part, out: [sys.executable, "-c", programs[part], str(out)])
    monkeypatch.setattr(everything, "LEAST", 1)


def test_what_is_done_is_left_alone_and_what_fails_keeps_nothing_from_running(parts, tmp_path, capsys):
    start = time.monotonic()
    assert everything.main(["--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 60
    said = [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["good: done", "bad: failed", "long: cut off"]
    assert (tmp_path / "logs" / "good.txt").read_text() == "said\n"
    assert "went wrong" in (tmp_path / "logs" / "bad.txt").read_text()
    assert (tmp_path / "logs" / "long.txt").read_text() == "begun\n"
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["good"]
    assert everything.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert (tmp_path / "result").read_text() == "measured\n"


def test_nothing_is_begun_that_has_no_time(parts, tmp_path, capsys):
    assert everything.main(["--out", str(tmp_path), "--seconds", "0.5"]) == 1
    assert capsys.readouterr().out == "no time left for good, bad, long; the same command goes on\n"


def test_every_part_is_a_benchmark_whose_flags_are_known(tmp_path):
    for part, (seconds, _) in everything.PARTS.items():
        words = everything.command(part, tmp_path)
        module = pathlib.Path("benchmarks") / f"{words[2].removeprefix('benchmarks.')}.py"
        text = module.read_text()
        if "processes.main(" in text:
            text += module.with_name("processes.py").read_text()
        assert seconds > 0 and all(f'"{word}"' in text for word in words[3:] if word.startswith("--"))


def test_the_first_start_of_the_loop_finds_nothing_compiled(tmp_path):
    cold, warm = (
        everything.environment(part, tmp_path)["JAX_COMPILATION_CACHE_DIR"] for part in ("loop_cold", "loop_warm")
    )
    assert cold == warm != everything.environment("update", tmp_path)["JAX_COMPILATION_CACHE_DIR"]
    pathlib.Path(warm).mkdir()
    everything.environment("loop_warm", tmp_path)
    assert pathlib.Path(warm).exists()
    everything.environment("loop_cold", tmp_path)
    assert not pathlib.Path(warm).exists()

"""The served scorer's benchmark at a smoke size: all requests are answered, and overload is counted."""

import re

import pytest

from benchmarks import serve

SMALL = {
    **{"requests": 4, "repeats": 1, "concurrency": 2, "max-batch": 2},
    **{"overload-clients": 3, "overload-room": 1, "overload-samples": 16, "overload-s": 0.3},
}
WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


def test_the_command_prints_rates_and_what_overload_does(tiny_reward, capsys: pytest.CaptureFixture) -> None:
    serve.main([*WORDS, "--reward", str(tiny_reward)])
    out = capsys.readouterr().out
    rows = [line.rsplit(maxsplit=3) for line in out.splitlines() if re.search(r"(clients, |without a server)", line)]
    rates = [float(middle) for name, _, middle, _ in rows if "overload" not in name]
    assert len(rates) == 4 + 3
    assert min(rates) > 0
    statuses = dict(re.findall(r"(\d+) x (\d+)", out.partition("answers")[2].partition("\n")[0]))
    assert set(statuses.values()) == {"200", "503"}
    assert re.search(r"memory, MiB\s+\d+ before, \d+ at its peak", out)


def test_a_reward_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ending:
        serve.main(["--reward", "/nowhere/reward"])
    assert ending.value.code == 2
    assert "/nowhere/reward" in capsys.readouterr().err

"""What `--help` shows."""

import subprocess
import sys

import pytest

from dina_rl.cli import load
from dina_rl.config import AlignRun, EvaluateRun, LocalRun


def test_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        load(LocalRun, ["--help"], program="python -m dina_rl.local")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for key in ("--learner.lora.rank", "--reward.thurstone.sigma-u", "--world.train-groups", "--run-dir"):
        assert key in text


def test_help_may_be_read_as_far_as_one_likes():
    """`--help | head`: the pipe is closed while more comes."""
    ask = "from dina_rl.cli import load; from dina_rl.config import FitRun; load(FitRun, ['--help'], program='test')"
    with subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
        asked.stdout.close()
        assert (asked.stderr.read(), asked.wait(60)) == (b"", 0)


def test_help_shows_what_a_named_section_may_hold(capsys):
    with pytest.raises(SystemExit):
        load(EvaluateRun, ["--help"], program="test")
    text = capsys.readouterr().out
    assert "--sets.NAME.path" in text
    assert "--scorers.NAME.levels" in text


@pytest.mark.parametrize(
    ("model", "default", "line"),
    [
        (AlignRun, "--rewards.pickscore.weight FLOAT factor of the normalised score (default: 1.0)",
         "--rewards.pickscore is off; any of its keys switches it on"),
        (AlignRun, "--learner.lora.rank INT rank of every adapter matrix (default: 32)",
         "--learner.lora is on; --learner.lora None switches it off"),
        (EvaluateRun, "--training.path STR directory of the set (required)",
         "--training is off; any of its keys switches it on"),
        (EvaluateRun, "--sets.NAME.path STR directory of the set (required)",
         "--uncertainty is on; --uncertainty None switches it off"),
    ],
)  # fmt: skip
def test_help_shows_sections_that_are_off_and_how_to_switch_them(model, default, line, capsys):
    with pytest.raises(SystemExit):
        load(model, ["--help"], program="test")
    text = capsys.readouterr().out
    assert default in " ".join(text.replace("\u2502", " ").split())
    assert line in text.splitlines()


def test_help_says_what_the_command_line_has_switched(capsys):
    with pytest.raises(SystemExit):
        load(AlignRun, ["--rewards.pickscore", "{}", "--rewards.dina", "None", "--help"], program="test")
    lines = capsys.readouterr().out.splitlines()
    assert "--rewards.pickscore is on; --rewards.pickscore None switches it off" in lines
    assert "--rewards.dina is off; any of its keys switches it on" in lines

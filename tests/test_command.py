"""How the tools end."""

import os
import subprocess
import sys

import pytest

from megatron_lite.command import command


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (None, 3, ""),
        (ValueError("no such data"), 2, "error: no such data\n"),
        (OSError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: [Errno 32] Broken pipe\n"),
        (KeyboardInterrupt(), 130, "interrupted: half is done\n"),
    ],
)
def test_what_is_raised_becomes_a_status(capsys, raised, status, says):
    @command("half is done")
    def main(number):
        if raised:
            raise raised
        return number

    assert main(3) == status
    assert capsys.readouterr().err == says


def test_an_interruption_with_nothing_to_say(capsys):
    @command()
    def main():
        raise KeyboardInterrupt

    assert main() == 130 and capsys.readouterr() == ("", "")


def test_mistakes_of_ours_are_shown_whole():
    @command()
    def main():
        raise TypeError

    with pytest.raises(TypeError):
        main()


PRINTS = """
import sys
from megatron_lite.command import command

@command()
def main():
    sys.stdin.read()
    print("a line")
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_is_gone(buffered):
    """At the first line, and, where lines are gathered, at the end."""
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    tool = subprocess.Popen([sys.executable, "-c", PRINTS], env=environment, **pipes)
    tool.stdout.close()
    tool.stdin.close()
    assert (tool.wait(), tool.stderr.read()) == (141, b"")
    tool.stderr.close()

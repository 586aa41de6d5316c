"""What C and child processes write, kept off standard output; a stream read by another program must hold nothing else."""

import subprocess
import sys

import pytest

from featherweight.descriptors import nowhere

SAYS = """
import ctypes, os, sys
from featherweight.descriptors import nowhere
c = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
{before}
c.puts(b"before")
with nowhere({descriptors}):
    c.puts(b"within")
    os.write(2, b"error within")
c.puts(b"after")
os.write(2, b"error after")
"""


def said(descriptors, before=""):
    """What a process writes into pipes, where C holds its lines back."""
    script = SAYS.format(descriptors=descriptors, before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split(), done.stderr


def test_what_c_writes_within_goes_nowhere_and_the_rest_stays():
    assert said("1") == (["before", "after"], "error withinerror after")
    assert said("1, 2") == (["before", "after"], "error after")


def test_a_closed_descriptor_stays_closed():
    assert said("1", "os.close(1)") == ([], "error withinerror after")


def test_an_error_rises_and_the_stream_is_back(capfd):
    with pytest.raises(ZeroDivisionError), nowhere(1):
        1 / 0  # noqa: B018
    sys.stdout.write("here")
    sys.stdout.flush()
    assert capfd.readouterr().out == "here"

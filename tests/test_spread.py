"""spread.py: one file's text becomes the others', and nothing else of them changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import spread

SCRIPT = Path(spread.__file__)
ONE = '''"""One."""

from functools import cache

SIZES = dict(a=1)
RECOMMENDED = {"x": SIZES}

# Plumbing ----
# how far
LIMIT = 3  # steps
"""of an episode"""


# why it is cached
@cache
def f(x):
    """New…"""
    return x + 1


class Run:
    """New."""

    def f(self):
        return 2


def alone():
    return 0


def train():
    return "one"
'''
OTHER = '''"""Other."""

SIZES = dict(a=2)
RECOMMENDED = {"y": SIZES}

def f(x):
    return x   # ends here
LIMIT: int = 4


# Plumbing ----
class Run:
    """Old."""
# the last line
def train():
    return "other"
'''
EXPECTED = '''"""Other."""

SIZES = dict(a=2)
RECOMMENDED = {"y": SIZES}

# why it is cached
@cache
def f(x):
    """New…"""
    return x + 1
# how far
LIMIT = 3  # steps
"""of an episode"""


# Plumbing ----
class Run:
    """New."""

    def f(self):
        return 2
# the last line
def train():
    return "other"
'''


@pytest.fixture
def files(tmp_path):
    """one.py, other.py and a third one that has nothing of theirs."""
    algos, tests = tmp_path / "algos", tmp_path / "tests"
    algos.mkdir()
    tests.mkdir()
    (tests / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    for name, text in (("one", ONE), ("other", OTHER), ("third", "import sys\n\nprint(sys.path)\n")):
        (algos / f"{name}.py").write_bytes(text.encode())
    return algos


def run(folder, *argv):
    """(exit code, stdout, stderr) of the copy of spread.py beside `folder`."""
    command = [sys.executable, str(folder.parent / "tests" / SCRIPT.name), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def test_all_that_is_not_each_files_own_becomes_the_same(files):
    code, out, _ = run(files, "--check")
    assert code == 1 and out.splitlines() == [f"{name}: one.py | other.py" for name in ("LIMIT", "f", "Run")]
    assert run(files, "--all", files / "one.py") == (0, "LIMIT: other.py\nf: other.py\nRun: other.py\n", "")
    assert (files / "other.py").read_bytes().decode() == EXPECTED and (files / "one.py").read_text("utf-8") == ONE
    assert (files / "third.py").read_text() == "import sys\n\nprint(sys.path)\n"
    assert run(files, "--check")[0] == 0 and run(files, "--all", files / "one.py") == (0, "", "")


def test_only_the_names_given_are_written(files):
    assert run(files, "Run", "alone", "SIZES", files / "one.py")[1] == "Run: other.py\nSIZES: other.py\n"
    text = OTHER.replace('    """Old."""\n', '    """New."""\n\n    def f(self):\n        return 2\n')
    assert (files / "other.py").read_text("utf-8") == text.replace("SIZES = dict(a=2)", "SIZES = dict(a=1)")
    code, _, err = run(files, "Run", "typo", files / "one.py")
    assert code == 1 and "one.py does not define typo" in err
    assert run(files)[0] == 1

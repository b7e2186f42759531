"""What the tests stand on: where a real ComfyUI is looked for, and programs that are forks."""

import os
import signal
from pathlib import Path

import pytest
from support.checkout import Checkout, checkouts
from support.forked import forks


def test_each_folder_of_the_variable_is_a_checkout():
    folders = ["/one/ComfyUI", "/another one/ComfyUI"]
    found = checkouts({"COMFYUI_DIR": os.pathsep.join([*folders, ""])})
    assert found == [Checkout(Path(folder)) for folder in folders]


@pytest.mark.parametrize("environment", [{}, {"COMFYUI_DIR": ""}])
def test_without_the_variable_the_home_folder_is_looked_in(environment):
    assert checkouts(environment) == [Checkout(Path.home() / "ComfyUI")]


def test_a_program_has_its_own_arguments_environment_output_and_exit_code():
    code = "import os, sys; print(sys.argv[1], os.environ['WORD']); sys.exit(input.__name__)"
    done = forks("json").run(["-c", code, "first"], {**os.environ, "WORD": "second"})
    assert (done.returncode, done.stdout, done.stderr) == (1, "first second\n", "input\n")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_program_that_is_killed_leaves_the_next_one_unharmed():
    program = forks("json").start(["-c", "import time; time.sleep(600)"], {**os.environ})
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert forks("json").run(["-c", "print(1)"], {**os.environ}).stdout == "1\n"

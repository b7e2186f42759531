"""What the tests stand on: real ComfyUIs that are found, forks as programs, fast convolutions."""

import gc
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.checkout import Checkout, checkouts
from support.convolutions import fast_convolutions
from support.forked import forks
from support.peak import PeakBytes, _returned
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


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


def test_garbage_is_reported_at_the_limit_of_recursion_as_elsewhere():
    """A socket that is left open: pyproject.toml says that its report is no error."""

    def leave_a_socket():
        cycle = [socket.socket()]
        cycle.append(cycle)

    frames_left = 0

    def descend():
        nonlocal frames_left
        try:
            descend()
        except RecursionError:
            frames_left += 1
            if frames_left == 10:
                gc.collect()
            raise

    leave_a_socket()
    with pytest.raises(RecursionError):
        descend()
    assert frames_left > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without forks nothing is imported before")
def test_an_interpreter_that_is_a_fork_has_imported_what_both_were_asked_to():
    code = "import os, sys; print({'json', 'wave'} <= set(sys.modules), os.getppid())"
    done = forks("json", "wave").run(["-c", code], {**os.environ})
    assert (done.returncode, done.stderr) == (0, "")
    has_both, parent = done.stdout.split()
    assert has_both == "True"
    only = forks("json").run(["-c", code], {**os.environ}).stdout.split()
    assert only[0] == "False" and only[1] != parent


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, (1, 2, 2)])
def test_fast_convolutions_are_oneDNNs_and_torchs_own_to_the_last_digits(stride):
    x, weight, bias = torch.randn(1, 8, 5, 10, 12), torch.randn(6, 8, 3, 3, 3), torch.randn(6)
    right = F.conv3d(x.double(), weight.double(), bias.double(), stride)
    with fast_convolutions(), torch.no_grad(), Names() as names:
        found = F.conv3d(x, weight, bias, stride)
    assert (found - right).abs().max() <= 1e-6 * right.abs().max()
    assert ("aten::mkldnn_convolution" in names.seen) == torch.backends.mkldnn.is_available()
    assert F.conv3d is torch.conv3d


def test_shapes_that_are_known_count_as_much_as_new_ones():
    """Also for a counter around the one of bytes, which must see each operator."""
    wide, high = torch.empty(3, 40, device="meta"), torch.empty(40, 5, device="meta")

    def count() -> tuple[int, int]:
        with FlopCounterMode(display=False) as flops, PeakBytes() as memory:
            product = wide @ high
            total = product + 1
            del product, total
        with PeakBytes() as alone:
            product = wide @ high
            (product + 1).mul_(2)
        assert alone.peak == memory.peak
        return flops.get_total_flops(), memory.peak

    assert count() == count() == (2 * 3 * 40 * 5, 2 * 3 * 5 * 4)


def test_several_results_and_what_is_overwritten_count_as_much_when_they_are_known():
    x = torch.empty(300, 40, device="meta")

    def count() -> tuple[int, int]:
        known = len(_returned)
        with PeakBytes() as memory:
            spread, mean = torch.var_mean(x, 1)
            assert spread.shape == mean.shape == (300,)
            assert spread.mul_(2) is spread
            assert torch.add(mean, 1, out=spread) is spread
        return memory.peak, len(_returned) - known

    assert count() == (2 * 300 * 4, 3)
    assert count() == (2 * 300 * 4, 0)

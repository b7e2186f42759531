"""Files that are written under a temporary name and then renamed."""

import re
import subprocess
import sys

import pytest
from comfyui_skyreels.wiro_api.parts import new_part, write_whole
from support.project import ROOT

PROGRAM = """
import sys
from pathlib import Path
from wiro_api.parts import new_part
print(*(new_part(Path(sys.argv[1])).name for _ in range(20)), flush=True)
sys.stdin.read()
"""


def open_program(folder) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_never_write_one_file_and_leave_nothing_when_they_are_gone(tmp_path):
    programs = [open_program(tmp_path) for _ in range(2)]
    names = [name for program in programs for name in program.stdout.readline().split()]
    assert len(set(names)) == 40
    write_whole(tmp_path / "limits.json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {*names, "limits.json"}
    for program in programs:
        program.communicate(timeout=60)
    write_whole(tmp_path / "limits.json", "[]")
    assert [path.name for path in tmp_path.iterdir()] == ["limits.json"]
    assert (tmp_path / "limits.json").read_text() == "[]"


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path):
    file = tmp_path / "limits.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["limits.json"]


def test_a_temporary_file_may_be_for_its_owner_only(tmp_path):
    assert new_part(tmp_path, 0o600).stat().st_mode & 0o077 == 0 or sys.platform == "win32"


@pytest.mark.parametrize("folder", ["nodes", "skyreels", "wiro_api"])
def test_every_temporary_name_of_the_packages_names_its_process(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"\.part\"\)?$", line.split("  #")[0]) and "re.compile" not in line:
                assert "os.getpid()" in line, f"{path.name}: {line}"

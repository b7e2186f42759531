"""The script for a GPU runs everywhere, and says what it could not measure."""

import json
import subprocess
import sys

from support.project import ROOT


def test_every_phase_runs_at_tiny_size_on_a_cpu():
    command = [sys.executable, "tests/scripts/gpu_check.py", "--size", "tiny", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["gpu_check"] == "tiny"
    assert report["failed"] == 0
    phases = report["phases"]
    skipped = {name for name, phase in phases.items() if phase.get("status") == "skipped"}
    assert skipped == {"streaming"}
    assert "only device" in phases["streaming"]["reason"]
    # a small model on a CPU says nothing about these, nor is there fast attention or a kernel
    assert set(phases["bars"].values()) == {None}
    assert not any("fast attention" in name for name in phases["full_model"]["median_s"])
    assert phases["fused_kernels"]["fused"] == 0

"""`doctor --plan`, and the lines around a run of `generate`."""

import json

import pytest
from comfyui_skyreels.skyreels.cli import main
from comfyui_skyreels.skyreels.transformer import rates


@pytest.fixture
def no_probe(monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "_measure", lambda name, device: 1e12)
    monkeypatch.setattr(rates, "_measured", {})
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))


def test_doctor_adds_the_plan_to_its_findings(no_probe, capsys):
    size = ["--width", "480", "--height", "272", "--frames", "17", "--steps", "10", "--cfg", "1"]
    assert main(["doctor", "--plan", "--device", "cpu", "--json", *size]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "kernels", "weights", "plan"} <= set(found)
    plan = found["plan"]["bf16"]
    assert plan["job"] == {
        "width": 480, "height": 272, "num_frames": 17, "num_steps": 10, "num_evaluations": 10,
    }  # fmt: skip
    chosen = plan["modes"][plan["chosen"]]
    assert chosen["precision"] == "auto"
    assert set(chosen["peak_bytes"]) == {"condition", "sample", "decode"}
    assert chosen["seconds"]["total"] > 0


def test_doctor_shows_the_plan_to_people(no_probe, capsys):
    assert main(["doctor", "--plan", "--device", "cpu", "--frames", "17"]) == 0
    text = capsys.readouterr().err
    assert "plan, for a file in bf16" in text
    assert "17 frames of 960x544" in text


@pytest.mark.parametrize("size", [["--frames", "18"], ["--width", "100"], ["--steps", "0"]])
def test_an_illegal_clip_is_refused(no_probe, size, capsys):
    assert main(["doctor", "--plan", "--device", "cpu", *size]) == 1
    assert "use" in capsys.readouterr().err


def test_a_run_says_what_is_expected_and_what_happened(caplog, tmp_path):
    size = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "3"]
    out = str(tmp_path / "clip.npy")
    assert main(["generate", "--prompt", "a red circle", *size, "--out", out]) == 0
    own = [r.getMessage() for r in caplog.records if r.name == "skyreels.sampling.planned"]
    assert len(own) == 2
    assert own[0].startswith("Plan for 5 frames of 32x32: fp32 (exact)")
    assert own[1].startswith("Sampled 3 steps of ")

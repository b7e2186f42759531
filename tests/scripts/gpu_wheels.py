"""Collect the packages that a GPU machine without a network lacks, into .gpu-wheels/ (ignored).

    python tests/scripts/gpu_wheels.py [--limit MIB]

For CPython 3.12 on x86-64 Linux: diffusers and importlib_metadata, which it needs, to compare with;
nvidia-cudnn-frontend and comfy-kitchen for their attention, the latter without its half for AMD
GPUs. tests/scripts/gpu_check.py installs what is missing there. Prints what was collected, and
fails if that and the files of the repository together are more than may travel.
"""

import argparse
import base64
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu-wheels"
PACKAGES = ("diffusers", "importlib_metadata", "nvidia-cudnn-frontend==1.18.0", "comfy-kitchen")
#: newest first: pip matches each exactly
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
LIMIT_MIB = 64
MIB = 2**20


def download(package: str, folder: Path) -> Path:
    """Fetch a wheel of a package and nothing that it needs.

    Raises:
        SystemExit: pip found none.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    before = set(folder.iterdir())
    done = subprocess.run([*command, "--dest", str(folder), package], check=False)
    new = sorted(set(folder.iterdir()) - before)
    if done.returncode or not new:
        sys.exit(f"pip could not fetch {package} for Python 3.12: see its message above.")
    return new[0]


def without(wheel: Path, is_unwanted) -> None:
    """Write a wheel anew without some of its files, and its RECORD without their lines."""
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if is_unwanted(entry.filename):
                continue
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = record_without(data, is_unwanted)
            new.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
    smaller.replace(wheel)


def record_without(record: bytes, is_unwanted) -> bytes:
    """The list of a wheel's files without some of them."""
    rows = [row for row in csv.reader(io.StringIO(record.decode())) if not is_unwanted(row[0])]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def problems_of(wheel: Path) -> list[str]:
    """What RECORD says that is not so: files that are missing or differ."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        for name, digest, _ in csv.reader(io.StringIO(archive.read(record).decode())):
            if name not in names:
                found.append(f"{name} is missing")
            elif digest:
                kind, _, expected = digest.partition("=")
                got = hashlib.new(kind, archive.read(name)).digest()
                if base64.urlsafe_b64encode(got).rstrip(b"=").decode() != expected:
                    found.append(f"{name} differs")
    return found


def is_for_amd(name: str) -> bool:
    """Whether a file of a wheel is a compiled library for AMD GPUs."""
    parts = name.lower().split("/")
    return name.endswith(".so") and any(word in part for part in parts for word in ("hip", "rocm"))


def tracked_bytes() -> int:
    """Of all files of the repository that travel: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in names if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> int:
    """Collect, list and judge the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT_MIB, help="MiB that may travel")
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            wheel = download(package, Path(folder))
            if package == "comfy-kitchen":
                without(wheel, is_for_amd)
            for problem in problems_of(wheel):
                sys.exit(f"{wheel.name}: {problem}")
            shutil.move(wheel, FOLDER / wheel.name)
    wheels = sorted(FOLDER.glob("*.whl"))
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        print(f"{name:28}{version:12}{wheel.stat().st_size / MIB:8.2f} MiB")
    carried, own = sum(wheel.stat().st_size for wheel in wheels), tracked_bytes()
    print(f"{'wheels':40}{carried / MIB:8.2f} MiB\n{'repository':40}{own / MIB:8.2f} MiB")
    print(f"{'together':40}{(carried + own) / MIB:8.2f} MiB of {options.limit:g}")
    if carried + own > options.limit * MIB:
        print(
            f"The wheels and the repository are {(carried + own) / MIB:.1f} MiB together, more "
            f"than the {options.limit:g} MiB that may travel: leave out a wheel."
        )
        return 1
    print(f'\ncarry: ["{FOLDER.name}"]   timeout_s: 590\n'
          "command: PYTHONUNBUFFERED=1 python3 tests/scripts/gpu_check.py --size full "
          "--device cuda")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

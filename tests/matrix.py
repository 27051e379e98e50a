"""Runs the tests with several versions of nnU-Net: ``make test-matrix``.

Each version gets an environment of its own that holds nnU-Net and this package and takes everything else from the
environment that runs this script, so that it costs megabytes and seconds instead of gigabytes and minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The oldest that is supported, and the newest that the index has.
VERSIONS = ("nnunetv2==2.8.0", "nnunetv2>=2.8,<3")


def environment(folder: Path, requirement: str) -> tuple[Path, str]:
    """Make or renew an environment with one version of nnU-Net.

    Args:
        folder: where to put it.
        requirement: of nnU-Net, for pip.

    Returns:
        Its Python, and the version that it has.
    """
    venv.create(folder, with_pip=True, clear=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip
    # addsitedir and not a bare path: editable installations are .pth files of that folder. Our own is not wanted twice,
    # but it comes first here and registers itself once.
    beneath = sysconfig.get_path("purelib")
    Path(site, "zz_beneath.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    # What lies beneath counts as installed for pip, so the version is forced into this environment.
    subprocess.run([*pip, "--upgrade", "--force-reinstall", requirement], check=True)
    subprocess.run([*pip, "--force-reinstall", "--editable", ROOT], check=True)
    version = subprocess.run(
        [python, "-c", "import importlib.metadata, nnunetv2; print(nnunetv2.__file__)\n"
         "print(importlib.metadata.version('nnunetv2'))"],
        check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    if not Path(version[0]).is_relative_to(site):
        raise SystemExit(f"{folder}: nnU-Net comes from {version[0]}, not from this environment")
    return python, version[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="of the environments [%(default)s]")
    parser.add_argument("--only", help="one requirement, as in nnunetv2==2.8.0 [both]")
    arguments, options = parser.parse_known_args()
    failed = []
    for requirement in [arguments.only] if arguments.only else VERSIONS:
        name = "".join(c if c.isalnum() or c == "." else "-" for c in requirement)
        python, version = environment(arguments.folder / name, requirement)
        print(f"nnunetv2 {version} ({requirement})", flush=True)
        # What is asked for comes last, and wins.
        command = [python, "-m", "pytest", "-m", "not full", *options]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(version)
    print(f"failed with nnunetv2 {', '.join(failed)}" if failed else "passed with all versions")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

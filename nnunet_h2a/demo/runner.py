"""Runs nnU-Net's and our commands as a user would, and writes them down."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nnunet_h2a._autoreg import SWITCH
from nnunet_h2a.command import CommandError

#: Makes runs on few CPU cores several times faster; see docs/demo.md. Harmless on a GPU.
CPU_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    "MALLOC_MMAP_THRESHOLD_": "10000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "nnUNet_def_n_proc": "1",
}


#: Lines in which our commands say what is wrong: "error: …", "h2a_convert_sts: error: …", "refused STS_007: …".
COMPLAINT = re.compile(r"(\w+: )?error: |refused ")


class CommandRunner:
    """Runs console commands with all nnU-Net folders below one folder.

    Each command is printed, appended to ``commands.txt`` and its output kept in ``logs/``. The file is a shell script;
    what is done without a command stands in it as a comment.

    Args:
        output: folder of the run.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.resolve()
        self.logs = self.output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.script = self.output / "commands.txt"
        self.folders = {name: self.output / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in self.folders.values():
            folder.mkdir(exist_ok=True)
        settings = {name: str(folder) for name, folder in self.folders.items()} | CPU_SETTINGS | {SWITCH: "1"}
        self.environment = os.environ | settings
        lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
        self.script.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def note(self, text: str) -> None:
        """Print a remark and write it down as a comment."""
        print(f"# {text}", flush=True)
        self._write(f"# {text}")

    def run(
        self, *command: str | Path, environment: dict[str, str] | None = None, accepted: Sequence[int] = (0,)
    ) -> None:
        """Run a command and wait for it; what it prints goes to a log file.

        Args:
            command: name and arguments.
            environment: further variables for this command.
            accepted: exit codes to go on with. With another than 0, what the command refused is printed.

        Raises:
            CommandError: where it fails, with the end of what it printed.
        """
        words = [str(word) for word in command]
        line = " ".join([*(f"{k}={shlex.quote(v)}" for k, v in (environment or {}).items()), shlex.join(words)])
        print(f"$ {line}", flush=True)
        self._write(line)
        log = self.logs / f"{len(list(self.logs.iterdir())):02d}_{Path(words[0]).stem}.log"
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as handle:
            process = subprocess.Popen(
                [self._executable(words[0]), *words[1:]],
                env=self.environment | (environment or {}), stdout=handle, stderr=subprocess.STDOUT,
            )  # fmt: skip
            code = self._wait(process, log)
        complaints = [line for line in log.read_text(errors="replace").splitlines() if COMPLAINT.match(line)]
        if code not in accepted:
            last = complaints[-1] if complaints else _last_line(log) or "it printed nothing"
            raise CommandError(f"{words[0]} ended with code {code}: {last} (all it printed: {log})")
        if code:
            print("\n".join(f"  {line}" for line in complaints), flush=True)
        print(f"  done in {time.monotonic() - started:.0f} s", flush=True)

    @staticmethod
    def _wait(process: subprocess.Popen, log: Path) -> int:
        """Wait for a command; on a terminal, show the time gone and the last line of its log."""
        with tqdm(bar_format="  {elapsed} {desc}", leave=False, disable=None) as bar:
            while True:
                try:
                    return process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if not bar.disable:
                        bar.set_description_str(_last_line(log)[:100])
                except BaseException:
                    process.kill()
                    raise

    def _write(self, line: str) -> None:
        with self.script.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    @staticmethod
    def _executable(name: str) -> str:
        """The command of this Python environment, whether or not it is activated."""
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        if found is None:
            raise CommandError(f"the command {name} is not installed beside {sys.executable}: pip install nnunet-h2a")
        return found


def _last_line(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as handle:
        return next((line.strip() for line in reversed(deque(handle, 20)) if line.strip()), "")

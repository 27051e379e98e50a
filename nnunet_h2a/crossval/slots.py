"""Where jobs run: a GPU or the CPU of this machine, or a worker of a Dask cluster."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from nnunet_h2a.command import CommandError
from nnunet_h2a.crossval.jobs import Job
from nnunet_h2a.crossval.run_job import BUSY, Settings, run_job

if TYPE_CHECKING:
    from distributed import Client, Future

_DASK_TIMEOUT = 20


class Slot(Protocol):
    """A place for one job at a time."""

    name: str

    def start(self, job: Job, number: int) -> None:
        """Begin a job; ``number`` is its place among all jobs."""

    def poll(self) -> int | None:
        """Exit code of the job, None while it runs."""

    def is_there(self) -> bool:
        """Whether jobs can still begin here."""

    def stop(self) -> None:
        """Ask the job to end; it can be continued later."""

    def join(self) -> None:
        """Wait until it has ended."""


class Places(Protocol):
    """All slots there are; more may come."""

    def newcomers(self, known: Collection[str]) -> list[Slot]:
        """Slots that have come since, given the names of those that are known."""


class LocalSlot:
    """A GPU, or the CPU, of this machine: this command in a process of its own, for one job."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen | None = None

    def start(self, job: Job, number: int) -> None:
        """See :class:`Slot`."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        # In a session of its own: Ctrl-C reaches it once, through stop().
        separate = {} if os.name == "nt" else {"start_new_session": True}
        with job.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*self._command, "--job", str(number)], env=os.environ | self._environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, **separate,
            )  # fmt: skip

    def poll(self) -> int | None:
        """See :class:`Slot`."""
        return self._process.poll()

    def is_there(self) -> bool:
        """See :class:`Slot`."""
        return True

    def stop(self) -> None:
        """See :class:`Slot`."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def join(self) -> None:
        """See :class:`Slot`."""
        if self._process is not None:
            self._process.wait()


class DaskSlot:
    """A worker of a Dask cluster; it must see the same folders under the same names."""

    def __init__(self, client: Client, address: str, settings: Settings, environment: Mapping[str, str]) -> None:
        self.name = address
        self._client = client
        self._settings = settings
        self._environment = environment
        self._future: Future | None = None

    def start(self, job: Job, number: int) -> None:
        """See :class:`Slot`."""
        self._job = job
        # Where a worker cannot begin, the reason is written there.
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._future = self._client.submit(
            run_job, job, self._settings, self._environment, workers=[self.name], pure=False, retries=0
        )

    def poll(self) -> int | None:
        """See :class:`Slot`; the job of a worker that has left the cluster is begun again on another."""
        if not self._future.done():
            if self.is_there():
                return None
            self.stop()
            return BUSY
        if self._future.status == "finished":
            return self._future.result()
        # What a scheduler that has gone leaves behind.
        if self._future.status in ("cancelled", "lost"):
            return BUSY
        job_log, error = self._job.log, self._future.exception()
        with job_log.open("a", encoding="utf-8") as log:
            log.write(f"{type(error).__name__} on {self.name}: {error}\n")
        return 1

    def is_there(self) -> bool:
        """See :class:`Slot`."""
        return self.name in _workers(self._client)

    def stop(self) -> None:
        """See :class:`Slot`: a job that a worker has begun is left to it."""
        from distributed.client import ClosedClientError

        if self._future is not None:
            with suppress(OSError, ClosedClientError):
                self._future.cancel()

    def join(self) -> None:
        """See :class:`Slot`."""


def _workers(client: Client) -> list[str]:
    """Addresses of the workers there are; none where the scheduler has gone."""
    return sorted(client.scheduler_info(n_workers=-1).get("workers", ()))


class LocalPlaces:
    """One slot per GPU that ``CUDA_VISIBLE_DEVICES`` lets us see, or one for the CPU.

    Args:
        device: nnU-Net's ``-device``.
        gpus: how many PyTorch finds.
        command: that runs a job with ``--job N``.

    Raises:
        CommandError: where there is no GPU and one is wanted.
    """

    def __init__(self, device: str, gpus: int, command: Sequence[str]) -> None:
        if device != "cuda":
            self._slots = [LocalSlot(device, command, {})]
            return
        if not gpus:
            raise CommandError("no GPU is found: give  -device cpu , or look with  h2a_doctor")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",")[:gpus] if visible else [str(number) for number in range(gpus)]
        self._slots = [LocalSlot(f"GPU {name}", command, {"CUDA_VISIBLE_DEVICES": name}) for name in names]

    def newcomers(self, known: Collection[str]) -> list[Slot]:
        """See :class:`Places`."""
        return [slot for slot in self._slots if slot.name not in known]


class DaskPlaces:
    """One slot per worker of a cluster; those that join later are used too.

    Args:
        address: of the scheduler.
        settings: of the jobs.

    Raises:
        CommandError: where there is no scheduler or no worker.
    """

    def __init__(self, address: str, settings: Settings) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise CommandError("--dask needs the package distributed: pip install 'nnunet-h2a[dask]'") from error
        try:
            self._client = Client(address, timeout=_DASK_TIMEOUT)
            self._client.wait_for_workers(1, timeout=_DASK_TIMEOUT)
        except (OSError, TimeoutError, ValueError) as error:
            raise CommandError(f"--dask {address}: no scheduler with a worker answers there") from error
        self._settings = settings
        self._passed = {key: value for key, value in os.environ.items() if key.startswith("nnUNet")}

    def newcomers(self, known: Collection[str]) -> list[Slot]:
        """See :class:`Places`."""
        return [
            DaskSlot(self._client, name, self._settings, self._passed)
            for name in _workers(self._client) if name not in known
        ]  # fmt: skip

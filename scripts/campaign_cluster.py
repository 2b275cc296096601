"""A SLURM cluster of two virtual nodes on this machine, for `slurm_campaign`."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from getpass import getuser
from pathlib import Path
from types import TracebackType

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel"]
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
NODES = ["node1", "node2"]
CPUS = 4  # of each node; SLURM does not compare them with the machine
REQUEUE_SECONDS = 10  # a requeued job waits until its credential expires; SLURM's default is 120
START_SECONDS = 20.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.2

CONFIG = """\
ClusterName=campaign
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=0
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,defer,batch_sched_delay=0
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(Exception):
    """SLURM does not start, or does not do what the campaign needs."""


def missing_programs() -> list[str]:
    """Return the programs of SLURM and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


class Cluster:
    """SLURM's daemons, which run in the block of a `with` statement.

    All files are in one folder, and all connections are on 127.0.0.1. At the end all jobs are
    canceled, and the daemons are stopped.

    Args:
        folder: for the configuration, the logs and the state.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {"SLURM_CONF": str(self.config), "PATH": SEARCH_PATH}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemons, and wait until the nodes accept jobs.

        Raises:
            ClusterError: the nodes do not accept jobs in time.
        """
        self.folder.mkdir(mode=0o700)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        text = CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            ports=free_ports(3),
            user=getuser(),
            folder=self.folder,
            requeue_seconds=REQUEUE_SECONDS,
            cpus=CPUS,
        )
        self.config.write_text(text, encoding="utf-8")
        munge_socket = self.folder / "munge.socket"
        self.start_daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={munge_socket}",
            f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munge.seed",
        )
        self.wait(munge_socket.exists, "munged does not start")
        self.start_daemon("slurmctld", "-D", "-c", "-f", str(self.config))
        for node in NODES:
            self.start_daemon("slurmd", "-D", "-c", "-N", node, "-f", str(self.config))
        self.wait(self.is_idle, "the nodes do not accept jobs")

    def start_daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=SEARCH_PATH) or name
        with (self.folder / f"output-{len(self.daemons)}-{name}").open("wb") as output:
            daemon = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        self.daemons.append(daemon)

    def wait(self, condition: Callable[[], bool], problem: str) -> None:
        if not wait_until(condition, START_SECONDS):
            logs = ", ".join(str(path) for path in sorted(self.folder.glob("output-*")))
            raise ClusterError(f"{problem} within {START_SECONDS:.0f} s; see {logs}")

    def is_idle(self) -> bool:
        """Return whether no job runs and all nodes accept jobs."""
        try:
            states = self.call("sinfo", "--noheader", "--partition=low", "--Node", "--format=%T")
        except ClusterError:  # the controller does not answer yet
            return False
        return states.split() == ["idle"] * len(NODES)

    def call(self, *command: str) -> str:
        """Run a command of SLURM and return its output.

        Raises:
            ClusterError: the command fails.
        """
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=60, check=False
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def jobs(self) -> list[str]:
        """Return the running jobs, e.g. 12 or 12_3 for a job of an array, in order."""
        lines = self.call("squeue", "--noheader", "--array", "--states=R", "--format=%i")
        return sorted(lines.split(), key=lambda name: [int(part) for part in name.split("_")])

    def cancel_jobs(self) -> None:
        """Cancel all jobs and wait for their end."""
        self.call("scancel", "--user", getuser())
        wait_until(lambda: not self.call("squeue", "--noheader").strip(), STOP_SECONDS)

    def stop(self) -> None:
        """Cancel all jobs and stop the daemons; kill what does not end."""
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            self.cancel_jobs()
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.remaining_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def remaining_processes(self) -> list[int]:
        """Return the processes that SLURM has started: they have its configuration."""
        entry = f"SLURM_CONF={self.config}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            process = int(path.parent.name)
            with contextlib.suppress(OSError):
                if process != os.getpid() and entry in path.read_bytes().split(b"\0"):
                    found.append(process)
        return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def free_ports(count: int) -> list[int]:
    """Return ports that no program uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

"""A real Slurm on one machine: munged, slurmctld and a slurmd for each of two nodes, on loopback, in one folder.

Needs only Debian's packages ``slurm-wlm`` and ``munge``; the machine's own Slurm is not used.
``python tests/cluster/slurm.py`` starts one with a shell in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
NODES = ("one", "two")
PATIENCE_S = 30.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

# cred_expire: how long a requeued job waits; 5 s is the least that Slurm takes (its default is 2 minutes)
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=30
KillOnBadExit=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1000,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """Why no Slurm can be started here, None if one can."""
    absent = [program for program in PROGRAMS if executable(program) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs as root only"
    return None


def executable(program: str) -> str | None:
    """Daemons are in /usr/sbin, which may be missing in PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(holds: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition; raises TimeoutError with what did not happen."""
    end = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {patience_s:g} s: {what}")
        time.sleep(0.05)


class Slurm:
    """A context with running daemons. A node has ``cpus`` CPUs, regardless of the machine."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder = folder
        self.cpus = cpus
        self.daemons = ExitStack()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]  # from a job that runs these tests
        self.environment["MASTER_ADDR"] = "127.0.0.1"  # only Slurm knows the nodes' names

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if (self.folder / "slurm.conf").exists():
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.daemons.close()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self._start_munge()
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={self.cpus} State=UNKNOWN"
            for name in NODES
        ]
        configuration = CONFIGURATION.format(
            host=host, controller=free_port(), folder=self.folder, nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(configuration)
        self._daemon("slurmctld", "-D", "-i")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        wait_until(self._all_idle, f"nodes that are idle; see the logs in {self.folder}")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        # --force: munged complains about the permissions of the folder above the socket
        self._daemon("munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, "munged's socket")

    def _daemon(self, program: str, *arguments: str) -> None:
        command = [executable(program) or program, *arguments]
        with (self.folder / f"{program}.out").open("ab") as out:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.daemons.callback(end, process)

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).split("\n")
        return {f"{name} idle" for name in NODES} <= {state.strip() for state in states}

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, timeout_s: float = 60) -> str:
        """Output of one of Slurm's commands; with ``check``, a failure raises RuntimeError with the output."""
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: Path, *options: str, cwd: Path, arguments: Sequence[str] = ()) -> int:
        """sbatch; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd).split(";")[0])

    def state(self, job: int | str) -> str:
        """RUNNING, PENDING, COMPLETED, …"""
        return self.field(job, "JobState")

    def field(self, job: int | str, name: str) -> str:
        """One of ``scontrol show job``: Restarts, ExitCode, …"""
        told = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(word.partition("=")[::2] for word in told.split())[name]

    def wait_for_end(self, job: int | str, patience_s: float) -> str:
        """The state in which the job ended."""
        wait_until(lambda: self.state(job) in ENDED, f"the end of job {job}", patience_s)
        return self.state(job)

    def requeue(self, job: int | str) -> None:
        self.run("scontrol", "requeue", str(job))

    def warn(self, job: int | str) -> None:
        """Send the signal of ``--signal=USR1@120``."""
        self.run("scancel", "--signal=USR1", str(job))

    def preempt(self) -> None:
        """Preempt all jobs, with a short job of higher priority."""
        self.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a daemon, or kill it."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(command: Sequence[str]) -> int:
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder) / "slurm") as slurm:
        print(f"export SLURM_CONF={slurm.folder / 'slurm.conf'}", flush=True)
        return subprocess.run(command or [os.environ.get("SHELL", "bash")], env=slurm.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

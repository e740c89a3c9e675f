"""Two nodes on one machine: network namespaces that are connected by a virtual cable and share the file system.

Each has its own network: processes cannot find each other through loopback or the machine's name. This needs root and
permission to create namespaces (``ip netns``).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from slurm import executable

INTERFACE = "eth0"  # in each of them
PREFIX = "10.213.7"


def missing() -> str | None:
    """Why namespaces cannot be created here; None if they can."""
    if executable("ip") is None:
        return "ip is missing: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


class Node:
    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def start(self, command: Sequence[str], log: Path, cwd: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A process on this node, whose output is appended to ``log``."""
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **environment},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def processes(self) -> dict[int, str]:
        """Process id → command line of everything that runs on this node."""
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout
        return {int(pid): command for pid in told.split() if (command := command_line(int(pid)))}

    def kill(self, only: str = "") -> int:
        """kill -9 for every process with this in its command line; returns their number."""
        victims = [pid for pid, command in self.processes().items() if only in command]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                victims.remove(pid)
        return len(victims)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class TwoNodes:
    """A context with two connected nodes, which are removed after it with everything that runs there."""

    def __init__(self) -> None:
        self.nodes = [Node(f"ipa{os.getpid()}-{number}", f"{PREFIX}.{number + 1}") for number in range(2)]
        self.undo = ExitStack()

    def __enter__(self) -> list[Node]:
        try:
            for node in self.nodes:
                ip("netns", "add", node.name)
                self.undo.callback(ip, "netns", "delete", node.name)
                self.undo.callback(node.kill)
            first, second = (node.name for node in self.nodes)
            ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for node in self.nodes:
                ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", INTERFACE)
                for device in ("lo", INTERFACE):
                    ip("-n", node.name, "link", "set", device, "up")
        except BaseException:
            self.undo.close()
            raise
        return self.nodes

    def __exit__(self, *error: object) -> None:
        self.undo.close()


def ip(*arguments: str) -> None:
    subprocess.run([shutil.which("ip") or executable("ip") or "ip", *arguments], check=True, capture_output=True)

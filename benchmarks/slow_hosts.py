"""Hosts with slow links on this machine: network namespaces on one switch, each uplink and downlink limited by ``tc`` (tbf).

::

    process of rank 0          process of rank 1
    eth0 10.81.0.1             eth0 10.81.0.2        a network namespace for each host; tbf on eth0 is its uplink
        |                          |
    port0 ------- bridge ------- port1               a namespace for the switch; tbf on a port is the downlink of its host

A namespace has no name. It lives as long as the process that holds it, and that process ends when this one does, however it ends. So
nothing is left behind, and several runs do not meet. TCP uses reno: BBR, the default of some machines, measures the rate itself, and its
runs differ.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

ADDRESS = "10.81.0.{}"
PORT = 29500
INTERFACE = "eth0"
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux", "unshare": "util-linux"}
"""Programs that are called, and the Debian packages that have them."""
MOST_HOSTS = 250
_LEAST_BURST_BYTES, _BURST_S, _QUEUE_S = 64 * 1024, 0.5e-3, 50e-3
"""A small burst keeps short messages from passing at full speed after an idle moment."""
_HOLD = "echo ready; exec cat"
"""Holds a namespace until the other end of its standard input is closed."""


class SlowHostsError(RuntimeError):
    """Slow hosts cannot be made here, or a process on one of them has failed."""


_TRIAL = """
ip link add trial type bridge
ip link add one type veth peer name other
tc qdisc add dev one root tbf rate 1mbit burst 64kb latency 50ms
"""
"""Makes one of each thing that slow hosts need, in a namespace that ends with it."""


def missing() -> list[str]:
    """Returns what this machine lacks for slow hosts, one sentence each; empty where all is there."""
    found = [f"{name} is not installed (Debian package {package})" for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if os.geteuid() != 0:
        found.append(f"root is needed to make network namespaces, not user {os.geteuid()}")
    if not found:
        made = subprocess.run(["unshare", "--net", "sh", "-ec", _TRIAL], capture_output=True, text=True, check=False)
        found += [f"this kernel cannot make slow hosts: {made.stderr.strip()}"] if made.returncode else []
    return found


def sent_bytes(process: int | str = "self") -> int:
    """Returns the bytes that ``eth0`` of a process's host has sent since it was made, headers included. ``process``: its id."""
    # /sys/class/net shows the namespace in which /sys was mounted, /proc/PID/net that of the process.
    lines = Path(f"/proc/{process}/net/dev").read_text().splitlines()
    counters = next(line.split(":", 1)[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(counters[8])


class SlowHosts:
    """Makes the hosts on entry, and ends their processes and removes them on exit.

    Args:
        hosts: Their number, from 1 to 250.
        bits_per_s: Rate of each uplink and of each downlink; ``None`` for no limit.
        delay_s: Added to every packet on its uplink. It needs a kernel with netem.
        ranks_per_host: Processes of a command on each host. What they send to one another has no limit.

    Raises:
        ValueError: A number is out of range.
        SlowHostsError: On entry: what is missing, or the command that failed.
    """

    def __init__(self, hosts: int, bits_per_s: float | None, delay_s: float = 0.0, ranks_per_host: int = 1) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise ValueError(f"hosts is {hosts}, allowed is 1 to {MOST_HOSTS}")
        if delay_s < 0:
            raise ValueError(f"delay_s is {delay_s}, allowed is 0 or more")
        if ranks_per_host < 1:
            raise ValueError(f"ranks_per_host is {ranks_per_host}, allowed is 1 or more")
        self.hosts, self.bits_per_s, self.delay_s = hosts, _checked(bits_per_s), delay_s
        self.ranks_per_host = ranks_per_host
        self._holders: list[subprocess.Popen[str]] = []
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "SlowHosts":
        lacking = missing()
        if lacking:
            raise SlowHostsError("slow hosts cannot be made here: " + "; ".join(lacking))
        try:
            self._make()
            self.set_rate(self.bits_per_s)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def set_rate(self, bits_per_s: float | None) -> None:
        """Changes the rate of all links. Processes on the hosts go on."""
        self.bits_per_s = _checked(bits_per_s)
        for host in range(self.hosts):
            self._limit(host, INTERFACE, self.delay_s)
            self._limit(self.hosts, f"port{host}", 0.0)

    def start(self, command: Sequence[str], environment: dict[str, str] | None = None) -> list[subprocess.Popen[str]]:
        """Starts ``command`` on each host, as torchrun would with so many processes per node, and returns the processes by rank.

        Standard input and output are pipes of text, errors go where those of this process go. The processes end with this one.
        """
        each = self.ranks_per_host
        ours = {"WORLD_SIZE": self.hosts * each, "LOCAL_WORLD_SIZE": each, "MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": PORT}
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), "GLOO_SOCKET_IFNAME": INTERFACE}
        started = []
        for rank in range(self.hosts * each):
            host, local = divmod(rank, each)
            variables = inherited | {name: str(value) for name, value in (ours | {"RANK": rank, "LOCAL_RANK": local}).items()}
            bound = ["setpriv", "--pdeathsig", "KILL", *self._inside(host), *command]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(bound, env=variables, stdin=pipe, stdout=pipe, text=True, start_new_session=True))
            self._processes.append(started[-1])
        return started

    def run(self, command: Sequence[str], timeout_s: float, environment: dict[str, str] | None = None) -> list[str]:
        """Runs ``command`` on each host to its end. Returns what each rank has printed.

        Raises:
            SlowHostsError: A rank has failed, or has not ended in time. The others are ended.
        """
        processes = self.start(command, environment)
        try:
            printed = [process.communicate(timeout=timeout_s)[0] for process in processes]
        except subprocess.TimeoutExpired as error:
            raise SlowHostsError(f"{command} has not ended after {timeout_s} s") from error
        finally:
            self.end(processes)
        failed = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
        if failed:
            raise SlowHostsError(f"{command} has ended with {', '.join(f'{code} on rank {rank}' for rank, code in failed.items())}")
        return printed

    def end(self, processes: Iterable[subprocess.Popen[str]]) -> None:
        """Ends ``processes`` that :meth:`start` has returned."""
        for process in list(processes):
            process.kill()
            process.wait()
            self._processes.remove(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def sent_bytes(self) -> list[int]:
        """Returns the bytes that each host has sent since it was made, headers included."""
        return [sent_bytes(holder.pid) for holder in self._holders[: self.hosts]]

    def _make(self) -> None:
        for _ in range(self.hosts + 1):
            pipe = subprocess.PIPE
            holder = subprocess.Popen(["unshare", "--net", "sh", "-c", _HOLD], stdin=pipe, stdout=pipe, text=True, start_new_session=True)
            self._holders.append(holder)
            assert holder.stdout is not None
            if holder.stdout.readline() != "ready\n":
                raise SlowHostsError("a network namespace could not be made")
        switch = self.hosts
        self._shell(switch, "ip link set lo up; ip link add bridge type bridge; ip link set bridge up")
        for host in range(self.hosts):
            own, other = self._holders[host].pid, self._holders[switch].pid
            _call("ip", "link", "add", INTERFACE, "netns", str(own), "type", "veth", "peer", "name", f"port{host}", "netns", str(other))
            self._shell(switch, f"ip link set port{host} master bridge up")
            address = ADDRESS.format(host + 1)
            self._shell(host, "echo reno >/proc/sys/net/ipv4/tcp_congestion_control; ip link set lo up")
            self._shell(host, f"ip address add {address}/24 dev {INTERFACE}; ip link set {INTERFACE} up")

    def _limit(self, host: int, interface: str, delay_s: float) -> None:
        subprocess.run([*self._inside(host), "tc", "qdisc", "del", "dev", interface, "root"], capture_output=True, check=False)
        place = ["root"]
        if delay_s:
            try:
                self._tc(host, interface, *place, "handle", "1:", "netem", "delay", f"{delay_s * 1e6:.0f}us", "limit", "100000")
            except SlowHostsError as error:
                raise SlowHostsError(f"delay_s is {delay_s}, but this kernel may have no netem; 0 works without: {error}") from error
            place = ["parent", "1:1"]
        if self.bits_per_s is not None:
            burst = max(_LEAST_BURST_BYTES, round(self.bits_per_s / 8 * _BURST_S))
            rate, queue = f"{self.bits_per_s:.0f}bit", f"{_QUEUE_S * 1e3:.0f}ms"
            self._tc(host, interface, *place, "tbf", "rate", rate, "burst", f"{burst}b", "latency", queue)

    def _tc(self, host: int, interface: str, *arguments: str) -> None:
        _call(*self._inside(host), "tc", "qdisc", "add", "dev", interface, *arguments)

    def _shell(self, host: int, script: str) -> None:
        _call(*self._inside(host), "sh", "-ec", script)

    def _inside(self, host: int) -> list[str]:
        """Returns the beginning of a command that runs on ``host``; the one after the last is the switch."""
        return ["nsenter", f"--net=/proc/{self._holders[host].pid}/ns/net"]

    def _remove(self) -> None:
        self.end(self._processes)
        while self._holders:
            holder = self._holders.pop()
            holder.communicate()  # closes its input


def _checked(bits_per_s: float | None) -> float | None:
    if bits_per_s is not None and bits_per_s <= 0:
        raise ValueError(f"bits_per_s is {bits_per_s}, allowed is a number above 0, or None for no limit")
    return bits_per_s


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr, end="")
        raise SlowHostsError(f"`{' '.join(command)}` has failed: {done.stderr.strip()}")

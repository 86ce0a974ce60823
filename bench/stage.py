"""What the benches share: programs that are started and ended by their own id, and a plain client.

Traffic goes to loopback only; whatever is started here is stopped on the way out.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30
TICKS = os.sysconf("SC_CLK_TCK")


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, **kwargs):
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if done.returncode:
        sys.exit(f"bench: {' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def other_user():
    """subprocess arguments: neither PostgreSQL nor PgBouncer runs as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    sys.exit("bench: there is neither a user postgres nor nobody")


def environment():
    """Ours without what would steer the programs elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "TENANTRY__"))}
    return kept | {"LC_ALL": "C", "PGSSLMODE": "disable", "PGGSSENCMODE": "disable"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def find_pgbouncer(wanted):
    if wanted:
        return wanted
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    if not shutil.which("pgbouncer", path=places):
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            sys.exit("bench: no pgbouncer here; install it, or name it with --pgbouncer")
        say("installing pgbouncer")
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        run(["apt-get", "update", "-qq"], env=quiet)
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends",
             "-o", "DPkg::Lock::Timeout=120", "pgbouncer"], env=quiet)
    return shutil.which("pgbouncer", path=places)


def find_tenantry(wanted):
    if wanted:
        # It starts in a directory of its own.
        return Path(wanted).absolute()
    say("building tenantry (release)")
    run(["cargo", "build", "--release", "--package", "tenantry"], cwd=ROOT)
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "tenantry"


class Program:
    """A started process; ended by its own id."""

    def __init__(self, name, command, work, **kwargs):
        self.name = name
        self.log = work / f"{name}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=subprocess.STDOUT,
                                            env=environment(), start_new_session=True, **kwargs)
        self.pid = self.process.pid

    def cpu_seconds(self):
        """User and system time of all threads, those that ended included."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_bytes(self):
        """(resident, proportional)"""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return tuple(int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1]) * 1024
                     for key in ("Rss", "Pss"))

    def stop(self):
        if self.process.poll() is not None:
            return
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            self.process.send_signal(sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                return


def first_client(program, port, database, role="bench"):
    """Logged in as soon as the program takes clients."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, EOFError):
            return Client(port, database, role)
        if program.process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"bench: {program.name} did not start:\n{program.log.read_text()[-3000:]}")
        time.sleep(0.05)


def start_program(stack, name, command, port, work, database, role="bench", **kwargs):
    """Started, and takes clients."""
    program = Program(name, command, work, **kwargs)
    stack.callback(program.stop)
    first_client(program, port, database, role).close()
    return program


# ---------------------------------------------------------------- a client that only logs in

class Client:
    """Logged in, idle, plain TCP."""

    def __init__(self, port, database="bench", user="bench"):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        words = ("user", user, "database", database)
        body = struct.pack("!I", 196608) + b"".join(w.encode() + b"\0" for w in words) + b"\0"
        self.socket.sendall(struct.pack("!I", len(body) + 4) + body)
        while True:
            tag, length = struct.unpack("!cI", self.read(5))
            body = self.read(length - 4)
            if tag == b"E":
                raise OSError(body.decode(errors="replace"))
            if tag == b"Z":
                return

    def read(self, n):
        data = b""
        while len(data) < n:
            piece = self.socket.recv(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def query(self, text):
        """One row of a simple query, as text; an error is raised."""
        body = text.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", len(body) + 4) + body)
        values = []
        while True:
            tag, length = struct.unpack("!cI", self.read(5))
            body = self.read(length - 4)
            if tag == b"E":
                raise OSError(body.decode(errors="replace"))
            if tag == b"D" and not values:
                at = 2
                for _ in range(int.from_bytes(body[:2], "big")):
                    size = int.from_bytes(body[at:at + 4], "big", signed=True)
                    values.append(body[at + 4:at + 4 + max(size, 0)].decode())
                    at += 4 + max(size, 0)
            if tag == b"Z":
                return values

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.sendall(b"X\0\0\0\4")
        self.socket.close()

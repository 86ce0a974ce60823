"""One PostgreSQL, and a pooler in front of it: what the suites here have in common.

Whatever is started is stopped with the ExitStack it was started on.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from stage import environment, find_pgbouncer, find_tenantry, free_port, other_user, run, say, start_program  # noqa: E402

ROLE = "suite"


class Scene:
    """A private PostgreSQL with one superuser, and its poolers."""

    def __init__(self, stack, work, postgres="16", bin_directory=None, settings=()):
        self.stack, self.work, self.user, self.port = stack, Path(work), other_user(), free_port()
        os.chmod(work, 0o711)
        self.bin = bin_directory or Path(subprocess.run(
            [sys.executable, ROOT / "tests" / "support" / "get-postgres", postgres],
            check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
        data = self.directory("postgres") / "data"
        run([self.bin / "initdb", "--no-sync", "--auth=trust", f"--username={ROLE}", "--encoding=UTF8", "--locale=C",
             "-D", data], cwd=work, env=environment(), **self.user)
        given = {"port": self.port, "listen_addresses": "127.0.0.1", "max_connections": 200, "fsync": "off",
                 "synchronous_commit": "off", "unix_socket_directories": data.parent} | dict(settings)
        command = [self.bin / "postgres", "-D", data]
        for key, value in given.items():
            command += ["-c", f"{key}={value}"]
        start_program(stack, "postgres", command, self.port, self.work, "postgres", ROLE, cwd=work, **self.user)
        self.version = run([self.bin / "postgres", "--version"], **self.user).strip()

    def directory(self, name):
        path = self.work / name
        path.mkdir(exist_ok=True)
        if self.user:
            os.chown(path, self.user["user"], self.user["group"])
        return path

    def sql(self, database, *statements):
        command = [self.bin / "psql", "-h", "127.0.0.1", "-p", self.port, "-U", ROLE, "-X", "-q", "-A", "-t",
                   "-v", "ON_ERROR_STOP=1"]
        for one in statements:
            command += ["-c", one]
        return run([*command, database], env=environment())

    def tenantry(self, program, databases, pool, **settings):
        """Its port. `settings` are keys of [pool]."""
        port, directory = free_port(), self.directory("tenantry")
        lines = [f'[listen]\naddresses = ["127.0.0.1:{port}"]\ntls = {{ mode = "disable" }}',
                 '[auth]\nauth_type = "trust"', f"[pool]\npool_size = {pool}",
                 *[f"{key} = {toml(value)}" for key, value in settings.items()],
                 '[admin]\naddress = ""', '[log]\nfilter = "warn"',
                 f'[servers.main]\nhost = "127.0.0.1"\nport = {self.port}\ncap = 150',
                 *[f"[tenants.{database}]" for database in databases], f'[[roles]]\nname = "{ROLE}"', ""]
        file = directory / "tenantry.toml"
        file.write_text("\n".join(lines))
        program = find_tenantry(program)
        start_program(self.stack, "tenantry", [program, "serve", "--config", file], port, self.work, databases[0], ROLE,
                      cwd=directory)
        return port

    def pgbouncer(self, program, databases, pool, **settings):
        """Its port, and its version."""
        port, directory, program = free_port(), self.directory("pgbouncer"), find_pgbouncer(program)
        (directory / "users").write_text(f'"{ROLE}" ""\n')
        given = {"listen_addr": "127.0.0.1", "listen_port": port, "unix_socket_dir": "", "auth_type": "trust",
                 "auth_file": directory / "users", "pool_mode": "transaction", "default_pool_size": pool,
                 "max_client_conn": 500, "ignore_startup_parameters": "extra_float_digits,options"} | settings
        version = tuple(map(int, run([program, "--version"]).split()[1].split(".")[:2]))
        if version >= (1, 21):
            given["max_prepared_statements"] = 200
        ini = directory / "pgbouncer.ini"
        ini.write_text("[databases]\n" + "".join(f"{d} = host=127.0.0.1 port={self.port}\n" for d in databases)
                       + "[pgbouncer]\n" + "".join(f"{k} = {v}\n" for k, v in given.items()))
        start_program(self.stack, "pgbouncer", [program, ini], port, self.work, databases[0], ROLE, cwd=directory,
                      **self.user)
        return port, ".".join(map(str, version))


def venv(cache, requirements):
    """A Python with just these; made once."""
    told = hashlib.sha256("\n".join([platform.python_version(), *requirements]).encode()).hexdigest()[:12]
    place = cache / f"venv-{told}"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        say(f"installing {' '.join(requirements[:2])} and what its tests need")
        shutil.rmtree(place, ignore_errors=True)
        run([sys.executable, "-m", "venv", place])
        run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements])
        (place / "complete").touch()
    return python


def toml(value):
    return str(value).lower() if isinstance(value, bool) else value if isinstance(value, int) else f'"{value}"'


@contextlib.contextmanager
def ended_on_signal():
    """What was started is stopped on the way out also when we are told to end."""
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)

"""A client of the same role that changes all that a session holds, ten times a second, and looks after itself badly.

    drivers_noise.py DSN REPORT

Runs until SIGTERM; REPORT gets what it did, what failed, and how often it did not find its own state again.
"""

import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter

import psycopg

A_SECOND = 10
# Of the advisory locks; no test takes such.
LOCKS = 7_300_000
SETTINGS = (("timezone", "Asia/Tokyo"), ("search_path", "noise"), ("bytea_output", "escape"),
            ("datestyle", "SQL, DMY"), ("intervalstyle", "sql_standard"), ("extra_float_digits", "-3"),
            ("default_transaction_isolation", "serializable"), ("statement_timeout", "7s"),
            ("application_name", "noise"), ("lock_timeout", "6s"), ("noise.mark", "noise"),
            ("default_transaction_read_only", "on"), ("standard_conforming_strings", "on"),
            ("xmloption", "document"), ("enable_seqscan", "off"))

counts = Counter()


class Noise:
    def __init__(self, dsn):
        self.dsn, self.connection, self.n = dsn, None, 0

    def connect(self):
        self.connection = psycopg.connect(self.dsn, autocommit=True, connect_timeout=20)
        self.held, self.settings, self.last = [], {}, None

    def do(self, text):
        return self.connection.execute(text, prepare=False)

    def one(self, text):
        return self.do(text).fetchone()[0]

    def set(self):
        name, value = random.choice(SETTINGS)
        self.do(f"SET {name} = '{value}'")
        self.settings[name] = self.one(f"SHOW {name}")

    def temporary(self):
        self.do("SET default_transaction_read_only = off")
        self.settings.pop("default_transaction_read_only", None)
        # Also names that a test might use for its own.
        name = random.choice((f"noise_{self.n}", "test", "tmptable"))
        self.do(f"CREATE TEMP TABLE IF NOT EXISTS {name} (noise int)")
        self.held.append(f"SELECT count(*) FROM pg_temp.{name}")

    def lock(self):
        # Another client of ours that went without a word may still be held to be there for a moment.
        self.do(f"SELECT pg_try_advisory_lock({LOCKS + self.n % 50})")

    def listen(self):
        self.do(f"LISTEN noise_{self.n % 5}")
        self.do(f"NOTIFY noise_{self.n % 5}, 'noise'")

    def prepare(self):
        self.do(f"PREPARE noise_{self.n} AS SELECT {self.n}")
        self.held.append(f"EXECUTE noise_{self.n}")

    def protocol_prepare(self):
        self.connection.execute("SELECT %s::int + 1", (self.n,), prepare=True)

    def cursor(self):
        self.do(f"DECLARE noise_{self.n} CURSOR WITH HOLD FOR SELECT generate_series(1, 100)")
        self.held.append(f"FETCH 1 FROM noise_{self.n}")

    def sequence(self):
        self.do("SET default_transaction_read_only = off")
        self.settings.pop("default_transaction_read_only", None)
        self.last = self.one("SELECT nextval('public.noise_sequence')")

    def role(self):
        self.do("SET ROLE pg_read_all_data")
        self.do("RESET ROLE")

    def look(self):
        """Is all that we left still there, and as it was?"""
        for name, value in self.settings.items():
            if self.one(f"SHOW {name}") != value:
                counts["lost: setting"] += 1
        for text in self.held[-3:]:
            self.do(text)
        if self.last is not None and self.one("SELECT currval('public.noise_sequence')") != self.last:
            counts["lost: currval"] += 1

    def leave(self):
        """Mostly without a word; sometimes in a transaction."""
        if random.random() < 0.3:
            self.do("BEGIN")
            self.do("SET LOCAL search_path = noise")
        if random.random() < 0.5:
            with socket.socket(fileno=os.dup(self.connection.fileno())) as raw:
                raw.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.connection = None

    def step(self):
        self.n += 1
        if self.connection is None:
            self.connect()
        actions = (self.set, self.set, self.set, self.temporary, self.lock, self.listen, self.prepare,
                   self.protocol_prepare, self.cursor, self.sequence, self.role, self.look, self.look)
        action = self.leave if random.random() < 0.06 else random.choice(actions)
        action()
        counts[action.__name__] += 1


def main(dsn, report):
    noise, running = Noise(dsn), True

    def stop(*_):
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    random.seed(1)
    following = time.monotonic()
    while running:
        try:
            noise.step()
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            counts[re.sub(r"\d+", "N", f"error: {type(error).__name__}: {first}")[:160]] += 1
            noise.connection = None
        following = max(following + 1 / A_SECOND, time.monotonic() - 1)
        time.sleep(max(0, following - time.monotonic()))
    with open(report, "w") as file:
        json.dump(counts, file)


main(*sys.argv[1:])

"""PostgreSQL's frontend protocol, as bytes that a test wants to send and messages that come back.

Nothing is hidden: what is sent is what the caller built, and every message is given as (tag, body).
Every read has a deadline.
"""

import socket
import struct
import time

SECONDS = 10


class Silent(Exception):
    """Nothing came within the deadline."""


def message(tag, body=b""):
    return tag + struct.pack("!I", len(body) + 4) + body


def text(word):
    return word.encode() + b"\0"


def query(sql):
    return message(b"Q", text(sql))


def parse(name, sql, types=()):
    return message(b"P", text(name) + text(sql) + struct.pack("!H", len(types))
                   + b"".join(struct.pack("!I", oid) for oid in types))


def bind(portal, statement, values=(), results=()):
    body = text(portal) + text(statement) + struct.pack("!HH", 0, len(values))
    for value in values:
        body += struct.pack("!i", -1) if value is None else struct.pack("!i", len(value.encode())) + value.encode()
    return message(b"B", body + struct.pack("!H", len(results)) + b"".join(struct.pack("!H", f) for f in results))


def describe(kind, name):
    return message(b"D", kind.encode() + text(name))


def execute(portal="", rows=0):
    return message(b"E", text(portal) + struct.pack("!I", rows))


def close(kind, name):
    return message(b"C", kind.encode() + text(name))


SYNC, FLUSH, TERMINATE = message(b"S"), message(b"H"), message(b"X")


def fields(body):
    """Of an ErrorResponse or NoticeResponse."""
    return {part[:1].decode(): part[1:].decode(errors="replace") for part in body.split(b"\0") if part}


def columns(body):
    """Of a DataRow: None, or text."""
    values, at = [], 2
    for _ in range(int.from_bytes(body[:2], "big")):
        size = int.from_bytes(body[at:at + 4], "big", signed=True)
        at += 4
        values.append(None if size < 0 else body[at:at + size].decode(errors="replace"))
        at += max(size, 0)
    return values


class Connection:
    """Logged in, plain TCP, trust."""

    def __init__(self, port, database, user, **parameters):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port, self.input, self.key, self.parameters = port, bytearray(), None, {}
        words = {"user": user, "database": database} | parameters
        body = struct.pack("!I", 196608) + b"".join(text(k) + text(v) for k, v in words.items()) + b"\0"
        self.socket.sendall(struct.pack("!I", len(body) + 4) + body)
        for tag, body in self.until_ready():
            if tag == "E":
                raise OSError(fields(body).get("M"))
            if tag == "K":
                self.key = body

    def send(self, data):
        self.socket.sendall(data)

    def next(self, seconds=SECONDS):
        """The next message; None at the end of the connection."""
        deadline = time.monotonic() + seconds
        while True:
            if len(self.input) >= 5:
                length = int.from_bytes(self.input[1:5], "big") + 1
                if len(self.input) >= length:
                    tag, body = chr(self.input[0]), bytes(self.input[5:length])
                    del self.input[:length]
                    if tag == "S":
                        name, value, _ = body.split(b"\0", 2)
                        self.parameters[name.decode()] = value.decode()
                    return tag, body
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                raise Silent from None
            except ConnectionError:
                return None
            if not data:
                return None
            self.input += data

    def until_ready(self, count=1, seconds=SECONDS):
        """Messages up to so many ReadyForQuery, or to the end."""
        messages = []
        while count and (one := self.next(seconds)):
            messages.append(one)
            count -= one[0] == "Z"
        return messages

    def ask(self, data, count=1, seconds=SECONDS):
        self.send(data)
        return self.until_ready(count, seconds)

    def cancel(self):
        """As libpq does it: on a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as other:
            other.sendall(struct.pack("!II", 8 + len(self.key), 80877102) + self.key)
            other.settimeout(SECONDS)
            other.recv(1)

    def leave(self):
        try:
            self.socket.sendall(TERMINATE)
        except OSError:
            pass
        self.socket.close()

    def vanish(self):
        """Without a word, and with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def outcome(messages):
    """What a caller sees: the values of the first row of the last result, or the SQLSTATE."""
    found = "nothing"
    for tag, body in messages:
        if tag == "D":
            found = "|".join("NULL" if v is None else v for v in columns(body))
        elif tag == "E":
            return "error " + fields(body)["C"]
    return found

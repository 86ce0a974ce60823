"""What several test modules need.

The tests hold for PostgreSQL itself and for whatever stands in front of it and
promises to behave the same.  So none assumes that two transactions run on one
server process (pg_backend_pid() may change), and none looks at what other
connections of the server there are.
"""

import contextlib
import threading
import time
from decimal import Decimal

from django.db import connection, connections

from shop.models import Member, Product


def member(number=1, **fields):
    fields.setdefault("email", f"member{number}@example.test")
    fields.setdefault("name", f"Member {number}")
    return Member.objects.create(**fields)


def product(number=1, **fields):
    fields.setdefault("sku", f"SKU-{number:05}")
    fields.setdefault("name", f"Product {number}")
    fields.setdefault("price", Decimal("9.99"))
    return Product.objects.create(**fields)


def query(sql, params=None, using=connection):
    """All rows of a raw query."""
    with using.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def value(sql, params=None, using=connection):
    """The one value of a raw query."""
    ((only,),) = query(sql, params, using)
    return only


def execute(sql, params=None, using=connection):
    with using.cursor() as cursor:
        cursor.execute(sql, params)


@contextlib.contextmanager
def second_connection():
    """Another connection to the same database, beside this thread's own."""
    other = connections["default"].copy()
    try:
        yield other
    finally:
        other.close()


class Worker(threading.Thread):
    """Runs a function in a thread, so with its own connection, and hands on what it raises."""

    def __init__(self, work, *args):
        super().__init__(daemon=True)
        self.work, self.args = work, args
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.work(*self.args)
        except BaseException as error:
            self.error = error
        finally:
            connection.close()

    def get(self, timeout=30):
        self.join(timeout)
        if self.is_alive():
            raise AssertionError(f"{self.work} not finished after {timeout} s")
        if self.error is not None:
            raise self.error
        return self.result


def eventually(condition, timeout=5):
    """Whether it comes true, soon: the server learns of a closed connection a little later."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False

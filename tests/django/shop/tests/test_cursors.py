"""Server-side cursors: .iterator(), and cursors declared by hand."""

import contextlib

from django.db import DatabaseError, ProgrammingError, connection, transaction
from django.test import TransactionTestCase

from shop.models import Member, Order, PageView

from .base import execute, member, query, second_connection, value

OPEN = "SELECT is_holdable FROM pg_cursors WHERE name LIKE %s"
DJANGOS = "%django_curs%"


class IteratorTests(TransactionTestCase):
    ROWS = 3000

    def setUp(self):
        PageView.objects.bulk_create(
            [PageView(path=f"/{n}", data={"n": n}) for n in range(self.ROWS)], batch_size=1000
        )

    def test_in_autocommit_the_cursor_is_held(self):
        rows = PageView.objects.iterator(chunk_size=100)
        seen = [next(rows).path]
        self.assertEqual(query(OPEN, [DJANGOS]), [(True,)])
        seen += [row.path for row in rows]
        self.assertEqual(seen, [f"/{n}" for n in range(self.ROWS)])
        self.assertEqual(query(OPEN, [DJANGOS]), [])

    def test_in_a_transaction_it_is_not(self):
        with transaction.atomic():
            rows = PageView.objects.iterator(chunk_size=100)
            seen = [next(rows).path]
            self.assertEqual(query(OPEN, [DJANGOS]), [(False,)])
            seen += [row.path for row in rows]
        self.assertEqual(seen, [f"/{n}" for n in range(self.ROWS)])

    def test_held_cursor_with_writes_between(self):
        """Every write is a transaction of its own while the cursor stays open."""
        seen = 0
        for row in PageView.objects.iterator(chunk_size=500):
            if row.data["n"] % 200 == 0:
                member(row.data["n"])
            if row.data["n"] == 700:
                with transaction.atomic():
                    PageView.objects.filter(data__n__gt=2000).delete()
            seen += 1
        self.assertEqual(seen, self.ROWS)
        self.assertEqual(Member.objects.count(), self.ROWS // 200)
        self.assertEqual(PageView.objects.count(), 2001)

    def test_held_cursor_survives_an_error_between(self):
        rows = PageView.objects.values_list("path", flat=True).iterator(chunk_size=100)
        seen = [next(rows)]
        with self.assertRaises(ProgrammingError):
            execute("SELECT * FROM no_such_table")
        with self.assertRaises(RuntimeError), transaction.atomic():
            member()
            raise RuntimeError
        seen += rows
        self.assertEqual(len(seen), self.ROWS)

    def test_two_iterators_at_once(self):
        up = PageView.objects.order_by("id").iterator(chunk_size=150)
        down = PageView.objects.order_by("-id").iterator(chunk_size=70)
        pairs = [(a.data["n"], b.data["n"]) for a, b in zip(up, down)]
        self.assertEqual(pairs, [(n, self.ROWS - 1 - n) for n in range(self.ROWS)])

    def test_abandoned_iterator_closes_its_cursor(self):
        rows = PageView.objects.iterator(chunk_size=10)
        next(rows)
        rows.close()
        self.assertEqual(query(OPEN, [DJANGOS]), [])
        self.assertEqual(PageView.objects.count(), self.ROWS)

    def test_iterators_on_two_connections(self):
        with second_connection() as other:
            mine = PageView.objects.iterator(chunk_size=100)
            first = next(mine)
            execute("DECLARE theirs CURSOR WITH HOLD FOR SELECT 1", using=other)
            self.assertEqual(query("SELECT name FROM pg_cursors", using=other), [("theirs",)])
            self.assertEqual(query(OPEN, ["theirs"]), [])
            self.assertEqual(first.path, "/0")
            self.assertEqual(sum(1 for _ in mine), self.ROWS - 1)

    def test_iterator_with_prefetch(self):
        someone = member()
        Order.objects.bulk_create([Order(number=str(n), member=someone) for n in range(60)])
        with self.assertNumQueries(4):
            numbers = [
                (order.number, order.member.name)
                for order in Order.objects.prefetch_related("member").iterator(chunk_size=20)
            ]
        self.assertEqual(len(numbers), 60)


class DeclaredCursorTests(TransactionTestCase):
    @contextlib.contextmanager
    def assertNoSuchCursor(self):
        # The drivers file this error under different classes.
        with self.assertRaises(DatabaseError) as caught:
            yield
        self.assertEqual(caught.exception.__cause__.diag.sqlstate, "34000")

    def test_with_hold_over_transactions(self):
        with transaction.atomic():
            execute("DECLARE held CURSOR WITH HOLD FOR SELECT n FROM generate_series(1, 100) n")
            self.assertEqual(query("FETCH 2 FROM held"), [(1,), (2,)])
        member()
        self.assertEqual(query("FETCH 2 FROM held"), [(3,), (4,)])
        with transaction.atomic():
            self.assertEqual(query("FETCH 2 FROM held"), [(5,), (6,)])
        execute("MOVE FORWARD 90 FROM held")
        self.assertEqual(len(query("FETCH ALL FROM held")), 4)
        execute("CLOSE held")
        with self.assertNoSuchCursor():
            execute("CLOSE held")

    def test_without_hold_it_ends_with_the_transaction(self):
        with transaction.atomic():
            execute("DECLARE brief SCROLL CURSOR FOR SELECT n FROM generate_series(1, 9) n")
            self.assertEqual(query("FETCH LAST FROM brief"), [(9,)])
            self.assertEqual(query("FETCH FIRST FROM brief"), [(1,)])
        with self.assertNoSuchCursor():
            query("FETCH 1 FROM brief")

    def test_rolled_back_with_hold_is_gone(self):
        with self.assertRaises(RuntimeError), transaction.atomic():
            execute("DECLARE held CURSOR WITH HOLD FOR SELECT 1")
            raise RuntimeError
        self.assertEqual(query(OPEN, ["held"]), [])

    def test_drivers_named_cursor(self):
        with transaction.atomic():
            with connection.chunked_cursor() as cursor:
                cursor.execute("SELECT n FROM generate_series(1, 1000) n")
                self.assertEqual(cursor.fetchmany(3), [(1,), (2,), (3,)])
                self.assertEqual(value("SELECT count(*) FROM pg_cursors"), 1)
                self.assertEqual(len(cursor.fetchall()), 997)

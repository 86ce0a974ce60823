"""Row locks and advisory locks between connections."""

import threading
import time

from django.db import OperationalError, connection, transaction
from django.db.models import F
from django.test import TransactionTestCase

from shop.models import Member, Product

from .base import Worker, eventually, execute, member, product, query, second_connection, value

SQLSTATE_NO_LOCK = "55P03"
SQLSTATE_DEADLOCK = "40P01"


class RowLockTests(TransactionTestCase):
    def setUp(self):
        self.first, self.second, self.third = (product(n).pk for n in (1, 2, 3))

    def hold(self, keys, held, release):
        """In a thread: lock these rows until told otherwise."""
        with transaction.atomic():
            list(Product.objects.select_for_update().filter(pk__in=keys))
            held.set()
            release.wait(20)

    def holding(self, *keys):
        held, release = threading.Event(), threading.Event()
        worker = Worker(self.hold, keys, held, release)

        def let_go():
            release.set()
            worker.get()

        self.addCleanup(release.set)
        self.assertTrue(held.wait(20))
        return let_go

    def test_outside_a_transaction_it_is_refused(self):
        with self.assertRaises(transaction.TransactionManagementError):
            Product.objects.select_for_update().get(pk=self.first)

    def test_nowait(self):
        let_go = self.holding(self.first)
        with self.assertRaises(OperationalError) as caught, transaction.atomic():
            Product.objects.select_for_update(nowait=True).get(pk=self.first)
        self.assertEqual(caught.exception.__cause__.diag.sqlstate, SQLSTATE_NO_LOCK)
        with transaction.atomic():
            Product.objects.select_for_update(nowait=True).get(pk=self.second)
        let_go()
        with transaction.atomic():
            Product.objects.select_for_update(nowait=True).get(pk=self.first)

    def test_skip_locked(self):
        let_go = self.holding(self.first, self.third)
        with transaction.atomic():
            free = Product.objects.select_for_update(skip_locked=True)
            self.assertEqual([thing.pk for thing in free], [self.second])
        let_go()
        with transaction.atomic():
            self.assertEqual(Product.objects.select_for_update(skip_locked=True).count(), 3)

    def test_waiting_for_a_lock_sees_what_was_committed(self):
        held, release = threading.Event(), threading.Event()

        def change():
            with transaction.atomic():
                thing = Product.objects.select_for_update().get(pk=self.first)
                thing.stock = 77
                thing.save()
                held.set()
                release.wait(20)

        def wait_for_it():
            with transaction.atomic():
                return Product.objects.select_for_update().get(pk=self.first).stock

        changing = Worker(change)
        self.assertTrue(held.wait(20))
        waiting = Worker(wait_for_it)
        time.sleep(0.2)
        self.assertTrue(waiting.is_alive())
        release.set()
        changing.get()
        self.assertEqual(waiting.get(), 77)

    def test_lock_timeout(self):
        let_go = self.holding(self.first)
        with self.assertRaises(OperationalError) as caught, transaction.atomic():
            execute("SET LOCAL lock_timeout = '100ms'")
            Product.objects.filter(pk=self.first).update(stock=1)
        self.assertEqual(caught.exception.__cause__.diag.sqlstate, SQLSTATE_NO_LOCK)
        let_go()
        Product.objects.filter(pk=self.first).update(stock=1)

    def test_no_update_is_lost(self):
        def count_up():
            for _ in range(20):
                with transaction.atomic():
                    thing = Product.objects.select_for_update().get(pk=self.first)
                    thing.stock += 1
                    thing.save()
                Product.objects.filter(pk=self.second).update(stock=F("stock") + 1)

        for worker in [Worker(count_up) for _ in range(4)]:
            worker.get()
        self.assertEqual(
            list(Product.objects.values_list("stock", flat=True)), [80, 80, 0]
        )

    def test_deadlock_ends_one_of_two(self):
        both = threading.Barrier(2)

        def cross(one, other):
            try:
                with transaction.atomic():
                    Product.objects.select_for_update().get(pk=one)
                    both.wait(20)
                    Product.objects.select_for_update().get(pk=other)
                return None
            except OperationalError as error:
                return error.__cause__.diag.sqlstate

        workers = [Worker(cross, self.first, self.second), Worker(cross, self.second, self.first)]
        self.assertEqual(
            sorted((worker.get() for worker in workers), key=str), [SQLSTATE_DEADLOCK, None]
        )

    def test_work_queue(self):
        for n in range(40):
            member(n)
        taken, guard = [], threading.Lock()

        def take():
            while True:
                with transaction.atomic():
                    one = Member.objects.select_for_update(skip_locked=True).filter(
                        nickname=None
                    ).first()
                    if one is None:
                        # The rest is in others' hands.
                        return
                    one.nickname = "done"
                    one.save()
                with guard:
                    taken.append(one.pk)

        for worker in [Worker(take) for _ in range(4)]:
            worker.get()
        self.assertEqual((len(taken), len(set(taken))), (40, 40))

    def test_select_for_update_of_and_no_key(self):
        with transaction.atomic():
            list(Product.objects.select_for_update(no_key=True, of=("self",)))
            with second_connection() as other:
                # A key-share lock, as a foreign key takes it, goes along with no_key.
                with transaction.atomic():
                    self.assertEqual(
                        len(query("SELECT id FROM shop_product FOR KEY SHARE NOWAIT", using=other)),
                        3,
                    )


class AdvisoryLockTests(TransactionTestCase):
    NAME = "nightly report"
    TAKE = "SELECT pg_advisory_lock(hashtext(%s))"
    TRY = "SELECT pg_try_advisory_lock(hashtext(%s))"
    FREE = "SELECT pg_advisory_unlock(hashtext(%s))"

    def test_held_over_many_transactions(self):
        with second_connection() as other:
            execute(self.TAKE, [self.NAME])
            for n in range(5):
                member(n)
                self.assertIs(value(self.TRY, [self.NAME], using=other), False)
            self.assertIs(value(self.TRY, ["another name"], using=other), True)
            self.assertIs(value(self.FREE, ["another name"], using=other), True)
            self.assertIs(value(self.FREE, [self.NAME]), True)
            self.assertIs(value(self.TRY, [self.NAME], using=other), True)
            self.assertIs(value(self.FREE, [self.NAME], using=other), True)

    def test_counts_how_often_it_was_taken(self):
        with second_connection() as other:
            execute(self.TAKE, [self.NAME])
            execute(self.TAKE, [self.NAME])
            self.assertIs(value(self.FREE, [self.NAME]), True)
            self.assertIs(value(self.TRY, [self.NAME], using=other), False)
            self.assertIs(value(self.FREE, [self.NAME]), True)
            self.assertIs(value(self.FREE, [self.NAME]), False)

    def test_survives_rollback(self):
        with second_connection() as other:
            with self.assertRaises(RuntimeError), transaction.atomic():
                execute(self.TAKE, [self.NAME])
                raise RuntimeError
            self.assertIs(value(self.TRY, [self.NAME], using=other), False)
            self.assertIs(value(self.FREE, [self.NAME]), True)

    def test_freed_when_its_connection_closes(self):
        with second_connection() as other:
            execute(self.TAKE, [self.NAME], using=other)
            self.assertIs(value(self.TRY, [self.NAME]), False)
        self.assertTrue(eventually(lambda: value(self.TRY, [self.NAME])))
        self.assertIs(value(self.FREE, [self.NAME]), True)

    def test_of_one_transaction(self):
        take = "SELECT pg_advisory_xact_lock(hashtext(%s))"
        with second_connection() as other:
            with transaction.atomic():
                execute(take, [self.NAME])
                self.assertIs(value(self.TRY, [self.NAME], using=other), False)
            self.assertIs(value(self.TRY, [self.NAME], using=other), True)
            self.assertIs(value(self.FREE, [self.NAME], using=other), True)

    def test_serializes_threads(self):
        inside, most = 0, 0
        guard = threading.Lock()

        def work():
            nonlocal inside, most
            for _ in range(5):
                execute(self.TAKE, [self.NAME])
                try:
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.01)
                    with guard:
                        inside -= 1
                finally:
                    self.assertIs(value(self.FREE, [self.NAME]), True)

        for worker in [Worker(work) for _ in range(4)]:
            worker.get()
        self.assertEqual(most, 1)

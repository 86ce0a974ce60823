"""Transactions, savepoints, errors and recovery from them."""

import threading

from django.db import (
    DataError, IntegrityError, InternalError, OperationalError, ProgrammingError, connection,
    transaction,
)
from django.db.models import F
from django.test import TestCase, TransactionTestCase

from shop import services
from shop.models import Cart, Member, Order, Product

from .base import Worker, execute, member, product, second_connection, value


class SavepointTests(TestCase):
    def test_inner_rollback_keeps_outer(self):
        with transaction.atomic():
            member(1)
            with self.assertRaises(RuntimeError), transaction.atomic():
                member(2)
                with transaction.atomic():
                    member(3)
                raise RuntimeError
            member(4)
        self.assertEqual(list(Member.objects.values_list("name", flat=True)),
                         ["Member 1", "Member 4"])

    def test_deep_nesting(self):
        def nest(level):
            if level > 20:
                return
            try:
                with transaction.atomic():
                    member(level)
                    nest(level + 1)
                    if level % 10 == 5:
                        raise RuntimeError
            except RuntimeError:
                pass

        nest(1)
        self.assertEqual(Member.objects.count(), 4)

    def test_explicit_savepoints(self):
        with transaction.atomic():
            member(1)
            mark = transaction.savepoint()
            member(2)
            transaction.savepoint_rollback(mark)
            mark = transaction.savepoint()
            member(3)
            transaction.savepoint_commit(mark)
        self.assertEqual(Member.objects.count(), 2)

    def test_error_in_inner_block_only(self):
        for _ in range(10):
            with self.assertRaises(DataError), transaction.atomic():
                execute("SELECT 1/0")
            self.assertEqual(value("SELECT 42"), 42)


class TransactionTests(TransactionTestCase):
    def test_commit_is_seen_by_another_connection_and_rollback_is_not(self):
        with second_connection() as other:
            def count():
                return value("SELECT count(*) FROM shop_member", using=other)

            with transaction.atomic():
                member(1)
                self.assertEqual(count(), 0)
            self.assertEqual(count(), 1)
            with self.assertRaises(RuntimeError), transaction.atomic():
                member(2)
                raise RuntimeError
            self.assertEqual(count(), 1)

    def test_nested_rollback_then_commit(self):
        with transaction.atomic():
            member(1)
            with self.assertRaises(IntegrityError), transaction.atomic():
                member(1)
            member(2)
        self.assertEqual(Member.objects.count(), 2)

    def test_durable(self):
        with transaction.atomic(durable=True):
            member()
            with self.assertRaises(RuntimeError), transaction.atomic(durable=True):
                pass
        self.assertEqual(Member.objects.count(), 1)

    def test_one_transaction_is_one_server_process(self):
        with transaction.atomic():
            pids = {value("SELECT pg_backend_pid()") for _ in range(50)}
            moments = {value("SELECT now()") for _ in range(10)}
            ids = {value("SELECT pg_current_xact_id()::text") for _ in range(10)}
        self.assertEqual((len(pids), len(moments), len(ids)), (1, 1, 1))

    def test_autocommit_is_many_transactions(self):
        ids = {value("SELECT pg_current_xact_id()::text") for _ in range(10)}
        self.assertEqual(len(ids), 10)

    def test_division_by_zero_in_autocommit(self):
        for _ in range(10):
            with self.assertRaises(DataError):
                execute("SELECT 1/0")
            self.assertEqual(value("SELECT 1"), 1)

    def test_division_by_zero_aborts_the_transaction(self):
        with self.assertRaises(InternalError):
            with transaction.atomic():
                member()
                # Past Django's own bookkeeping, so that the server has to refuse.
                with connection.cursor() as cursor:
                    with self.assertRaises(DataError):
                        cursor.execute("SELECT 1/0")
                    cursor.execute("SELECT 1")
        self.assertEqual(Member.objects.count(), 0)

    def test_errors_of_many_kinds(self):
        for sql, error in (
            ("SELEKT", ProgrammingError),
            ("SELECT * FROM no_such_table", ProgrammingError),
            ("SELECT no_such_column FROM shop_member", ProgrammingError),
            ("SELECT 'x'::int", DataError),
            ("SELECT * FROM pg_authid", ProgrammingError),
            ("INSERT INTO shop_member DEFAULT VALUES", IntegrityError),
            ("DO $$ BEGIN RAISE EXCEPTION 'mine' USING ERRCODE = '23505'; END $$", IntegrityError),
        ):
            with self.subTest(sql):
                with self.assertRaises(error):
                    execute(sql)
                self.assertEqual(value("SELECT 1"), 1)
                with self.assertRaises(error), transaction.atomic():
                    execute(sql)
                self.assertEqual(value("SELECT 1"), 1)

    def test_error_carries_the_servers_code(self):
        member()
        with self.assertRaises(IntegrityError) as caught:
            member()
        cause = caught.exception.__cause__
        self.assertEqual(cause.diag.sqlstate, "23505")
        self.assertEqual(cause.diag.constraint_name, "shop_member_email_key")
        self.assertEqual(cause.diag.table_name, "shop_member")

    def test_on_commit(self):
        seen = []
        with transaction.atomic():
            member()
            transaction.on_commit(lambda: seen.append(Member.objects.count()))
            with self.assertRaises(RuntimeError), transaction.atomic():
                transaction.on_commit(lambda: seen.append("rolled back"))
                raise RuntimeError
            self.assertEqual(seen, [])
        self.assertEqual(seen, [1])
        with self.assertRaises(RuntimeError), transaction.atomic():
            transaction.on_commit(lambda: seen.append("never"))
            raise RuntimeError
        self.assertEqual(seen, [1])

    def test_set_autocommit_off(self):
        transaction.set_autocommit(False)
        try:
            member(1)
            transaction.rollback()
            member(2)
            transaction.commit()
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)
        self.assertEqual(Member.objects.get().name, "Member 2")

    def test_several_statements_in_one_query(self):
        execute(
            "INSERT INTO shop_cart (token, is_open, created_at, updated_at)"
            " VALUES (gen_random_uuid(), true, now(), now());"
            "UPDATE shop_cart SET is_open = false"
        )
        self.assertFalse(Cart.objects.get().is_open)
        with self.assertRaises(DataError):
            execute("DELETE FROM shop_cart; SELECT 1/0")
        self.assertEqual(Cart.objects.count(), 1)

    def test_isolation_level_of_one_transaction(self):
        member(1)
        with transaction.atomic():
            execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            self.assertEqual(Member.objects.count(), 1)
            with second_connection() as other:
                execute("UPDATE shop_member SET name = 'changed'", using=other)
            self.assertEqual(Member.objects.get().name, "Member 1")
        self.assertEqual(Member.objects.get().name, "changed")
        self.assertEqual(value("SHOW transaction_isolation"), "read committed")

    def test_serialization_failure(self):
        product(1, stock=1)
        with self.assertRaises(OperationalError) as caught, transaction.atomic():
            execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            Product.objects.get()
            with second_connection() as other:
                execute("UPDATE shop_product SET stock = 5", using=other)
            Product.objects.update(stock=F("stock") + 1)
        self.assertEqual(caught.exception.__cause__.diag.sqlstate, "40001")
        self.assertEqual(Product.objects.get().stock, 5)

    def test_read_only_transaction(self):
        with self.assertRaises(InternalError), transaction.atomic():
            execute("SET TRANSACTION READ ONLY")
            member()
        member()
        self.assertEqual(Member.objects.count(), 1)

    def test_statement_timeout_of_one_transaction(self):
        with self.assertRaises(OperationalError), transaction.atomic():
            execute("SET LOCAL statement_timeout = '50ms'")
            execute("SELECT pg_sleep(10)")
        self.assertEqual(value("SELECT 1 FROM pg_sleep(0.1)"), 1)

    def test_checkout(self):
        cart = Cart.objects.create(member=member())
        cart.items.create(product=product(1, stock=5), quantity=2)
        cart.items.create(product=product(2, stock=1), quantity=1)
        order = services.checkout(cart.token)
        self.assertEqual(order.lines.count(), 2)
        self.assertEqual(list(Product.objects.values_list("stock", flat=True)), [3, 0])
        with self.assertRaises(Cart.DoesNotExist):
            services.checkout(cart.token)

    def test_failed_checkout_changes_nothing(self):
        cart = Cart.objects.create(member=member())
        cart.items.create(product=product(1, stock=5), quantity=2)
        cart.items.create(product=product(2, stock=0), quantity=1)
        with self.assertRaises(services.OutOfStock):
            services.checkout(cart.token)
        self.assertEqual(list(Product.objects.values_list("stock", flat=True)), [5, 0])
        self.assertFalse(Order.objects.exists())
        self.assertTrue(Cart.objects.get().is_open)

    def test_rush_for_the_last_pieces(self):
        product(1, stock=5)
        tokens = []
        for n in range(8):
            cart = Cart.objects.create(member=member(n))
            cart.items.create(product=Product.objects.get(), quantity=1)
            tokens.append(cart.token)
        together = threading.Barrier(8)

        def buy(token):
            together.wait(20)
            try:
                return services.checkout(token).number
            except services.OutOfStock:
                return None

        numbers = [worker.get() for worker in [Worker(buy, token) for token in tokens]]
        self.assertEqual(sum(number is not None for number in numbers), 5)
        self.assertEqual(Product.objects.get().stock, 0)
        self.assertEqual(Order.objects.count(), 5)

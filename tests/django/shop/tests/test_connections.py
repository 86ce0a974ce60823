"""Connections: kept or closed between requests, closed and opened again."""

import threading

from django.core.signals import request_finished, request_started
from django.db import (
    InterfaceError, OperationalError, ProgrammingError, close_old_connections, connection,
    transaction,
)
from django.test import TransactionTestCase

from shop.models import Member

from .base import Worker, execute, member, second_connection, value


class ConnectionTests(TransactionTestCase):
    def tearDown(self):
        connection.close()

    def test_close_and_reopen(self):
        for n in range(20):
            member(n)
            connection.close()
            self.assertIsNone(connection.connection)
            self.assertEqual(Member.objects.count(), n + 1)
            self.assertTrue(connection.is_usable())

    def test_close_within_a_transaction_rolls_it_back(self):
        with second_connection() as other:
            other.set_autocommit(False)
            execute(
                "INSERT INTO shop_cart (token, is_open, created_at, updated_at)"
                " VALUES (gen_random_uuid(), true, now(), now())",
                using=other,
            )
            self.assertEqual(value("SELECT count(*) FROM shop_cart", using=other), 1)
        for _ in range(20):
            self.assertEqual(value("SELECT count(*) FROM shop_cart"), 0)

    def test_between_requests_as_conn_max_age_says(self):
        connection.close()
        kept = connection.settings_dict["CONN_MAX_AGE"] > 0
        seen = []
        for n in range(10):
            close_old_connections()
            member(n)
            self.assertEqual(Member.objects.count(), n + 1)
            seen.append(connection.connection)
            close_old_connections()
            self.assertEqual(connection.connection is not None, kept)
        self.assertEqual(len({id(one) for one in seen}), 1 if kept else 10)

    def test_request_signals(self):
        # The test client keeps these from closing connections; a server does not.
        for n in range(10):
            request_started.send(self.__class__)
            member(n)
            request_finished.send(self.__class__)
        self.assertEqual(Member.objects.count(), 10)

    def test_after_an_error_the_connection_is_checked(self):
        with self.assertRaises(ProgrammingError):
            execute("SELECT * FROM no_such_table")
        self.assertTrue(connection.errors_occurred)
        raw = connection.connection
        close_old_connections()
        if connection.settings_dict["CONN_MAX_AGE"] > 0:
            self.assertIs(connection.connection, raw)
        self.assertEqual(value("SELECT 1"), 1)

    def test_health_checks(self):
        with second_connection() as other:
            other.settings_dict = {**other.settings_dict, "CONN_HEALTH_CHECKS": True}
            other.connect()
            for _ in range(5):
                other.close_if_unusable_or_obsolete()
                self.assertEqual(value("SELECT 1", using=other), 1)

    def test_broken_connection_is_replaced(self):
        """The client's end is cut; the next request gets a new connection."""
        self.assertEqual(value("SELECT 1"), 1)
        connection.connection.close()
        with self.assertRaises((InterfaceError, OperationalError)):
            execute("SELECT 1")
        close_old_connections()
        self.assertEqual(value("SELECT 1"), 1)

    def test_many_connections_at_once(self):
        together = threading.Barrier(12)

        def use(number):
            for _ in range(3):
                together.wait(30)
                with transaction.atomic():
                    self.assertEqual(value("SELECT %s::int", [number]), number)
                connection.close()
            return number

        workers = [Worker(use, n) for n in range(12)]
        self.assertEqual([worker.get() for worker in workers], list(range(12)))

    def test_idle_connections_beside(self):
        idle = []
        try:
            for _ in range(15):
                context = second_connection()
                idle.append((context, context.__enter__()))
                self.assertEqual(value("SELECT 1", using=idle[-1][1]), 1)
            member()
            for _, other in idle:
                self.assertEqual(value("SELECT count(*) FROM shop_member", using=other), 1)
        finally:
            for context, _ in idle:
                context.__exit__(None, None, None)

    def test_server_version_and_parameters(self):
        self.assertGreaterEqual(connection.pg_version, 130000)
        with connection.cursor():
            raw = connection.connection
            parameter = (
                raw.info.parameter_status if hasattr(raw, "pgconn") else raw.get_parameter_status
            )
            self.assertEqual(parameter("server_encoding"), value("SHOW server_encoding"))
            self.assertEqual(parameter("client_encoding"), "UTF8")
            self.assertEqual(parameter("standard_conforming_strings"), "on")
            self.assertEqual(parameter("integer_datetimes"), "on")
            execute("SET application_name = 'renamed'")
            self.assertEqual(parameter("application_name"), "renamed")

    def test_cancel(self):
        """A query cancelled from another thread ends; the connection lives on."""
        execute("SELECT 1")
        timer = threading.Timer(0.3, connection.connection.cancel)
        timer.start()
        with self.assertRaises(OperationalError) as caught:
            execute("SELECT pg_sleep(20)")
        timer.join()
        self.assertEqual(caught.exception.__cause__.diag.sqlstate, "57014")
        self.assertEqual(value("SELECT 1"), 1)

    def test_introspection(self):
        with connection.cursor() as cursor:
            names = {table.name for table in connection.introspection.get_table_list(cursor)}
            self.assertLessEqual({"shop_member", "shop_order", "django_migrations"}, names)
            constraints = connection.introspection.get_constraints(cursor, "shop_cartitem")
        self.assertTrue(constraints["cart_item_once_per_product"]["unique"])

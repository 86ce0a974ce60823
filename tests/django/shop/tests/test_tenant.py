"""Whatever is between: always this tenant's database, user and rows."""

import threading

from django.db import OperationalError, connection, connections, transaction
from django.test import TransactionTestCase

from shop.models import Member, PageView

from .base import Worker, execute, member, query, value

WHO = "SELECT current_database(), current_user, session_user"


def configured():
    settings = connection.settings_dict
    return [(settings["NAME"], settings["USER"], settings["USER"])]


class IdentityTests(TransactionTestCase):
    def test_many_queries_in_autocommit(self):
        for _ in range(300):
            self.assertEqual(query(WHO), configured())

    def test_many_transactions(self):
        for _ in range(200):
            with transaction.atomic():
                self.assertEqual(query(WHO), configured())
                self.assertEqual(query(WHO), configured())

    def test_many_rolled_back_transactions(self):
        for _ in range(100):
            with self.assertRaises(RuntimeError), transaction.atomic():
                self.assertEqual(query(WHO), configured())
                raise RuntimeError

    def test_many_connections(self):
        for _ in range(20):
            connection.close()
            self.assertEqual(query(WHO), configured())

    def test_many_threads(self):
        start = threading.Barrier(8)

        def ask():
            start.wait(20)
            return {row for _ in range(50) for row in query(WHO)}

        found = set().union(*[worker.get() for worker in [Worker(ask) for _ in range(8)]])
        self.assertEqual(found, set(configured()))

    def test_rows_are_this_tenants_alone(self):
        """Other tenants do the same at the same time, with the same keys."""
        name = connection.settings_dict["NAME"]
        for n in range(50):
            PageView.objects.create(pk=n + 1, path=f"/{n}", tenant=name)
            self.assertEqual(
                query("SELECT tenant, count(*) FROM shop_pageview GROUP BY tenant"), [(name, n + 1)]
            )

    def test_tables_belong_to_the_user(self):
        owners = query(
            r"SELECT DISTINCT tableowner FROM pg_tables WHERE tablename LIKE 'shop\_%'"
        )
        self.assertEqual(owners, [(connection.settings_dict["USER"],)])

    def test_wrong_password_is_refused_and_the_right_one_not(self):
        member()
        for _ in range(3):
            wrong = connections["default"].copy()
            wrong.settings_dict = {**wrong.settings_dict, "PASSWORD": "not the password"}
            with self.assertRaises(OperationalError):
                wrong.ensure_connection()
            self.assertEqual(Member.objects.count(), 1)

    def test_another_database_is_refused(self):
        wrong = connections["default"].copy()
        wrong.settings_dict = {**wrong.settings_dict, "NAME": "no_such_tenant"}
        with self.assertRaises(OperationalError):
            wrong.ensure_connection()

    def test_may_not_create_databases(self):
        with self.assertRaises(Exception) as caught:
            execute("CREATE DATABASE should_not_be")
        self.assertIn("permission denied", str(caught.exception))
        self.assertEqual(value("SELECT 1"), 1)

    def test_connection_is_encrypted_if_asked(self):
        # To whom it speaks, be it the server or something before it.
        connection.ensure_connection()
        mode = connection.settings_dict["OPTIONS"]["sslmode"]
        raw = connection.connection
        if hasattr(raw, "pgconn"):
            encrypted = bool(raw.pgconn.ssl_in_use)
        else:
            encrypted = bool(raw.info.ssl_in_use)
        if mode in ("require", "verify-ca", "verify-full"):
            self.assertTrue(encrypted)
        elif mode == "disable":
            self.assertFalse(encrypted)

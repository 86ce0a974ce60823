"""What belongs to a session: settings, temporary tables, prepared statements, sequences' last value."""

import threading

from django.db import IntegrityError, ProgrammingError, connection, transaction
from django.test import TransactionTestCase

from shop.models import Member

from .base import Worker, execute, member, query, second_connection, value


class SessionTestCase(TransactionTestCase):
    def setUp(self):
        # Each test on a fresh session, and none left for what follows.
        connection.close()
        self.addCleanup(connection.close)


class SettingTests(SessionTestCase):
    def test_set_is_seen_by_the_next_query(self):
        for number in range(1, 30):
            execute(f"SET statement_timeout = '{number}min'")
            self.assertEqual(
                value("SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"),
                str(number * 60_000),
            )

    def test_set_lasts(self):
        execute("SET work_mem = '7MB'")
        for n in range(20):
            member(n)
            self.assertEqual(value("SHOW work_mem"), "7MB")
            with transaction.atomic():
                self.assertEqual(value("SHOW work_mem"), "7MB")

    def test_settings_of_many_kinds(self):
        for name, text in (
            ("application_name", "the shop's job"),
            ("search_path", "pg_catalog, public"),
            ("TimeZone", "Asia/Tokyo"),
            ("DateStyle", "German, DMY"),
            ("IntervalStyle", "iso_8601"),
            ("extra_float_digits", "0"),
            ("enable_seqscan", "off"),
            ("lock_timeout", "12s"),
            ("default_transaction_isolation", "repeatable read"),
            ("bytea_output", "escape"),
            ("standard_conforming_strings", "on"),
        ):
            with self.subTest(name):
                literal = text if "," in text else "'" + text.replace("'", "''") + "'"
                execute(f"SET {name} TO {literal}")
                self.assertEqual(value(f"SHOW {name}"), text)
                execute(f"RESET {name}")

    def test_setting_has_its_effect(self):
        execute("SET default_transaction_read_only = on")
        with self.assertRaises(Exception) as caught:
            member()
        self.assertIn("read-only", str(caught.exception))
        execute("SET default_transaction_read_only = off")
        member()

    def test_time_zone_has_its_effect(self):
        execute("SET TIME ZONE 'America/New_York'")
        self.assertEqual(
            value("SELECT ('2024-07-01 12:00+00'::timestamptz)::text"), "2024-07-01 08:00:00-04"
        )

    def test_search_path_has_its_effect(self):
        execute("DROP SCHEMA IF EXISTS archive CASCADE")
        execute("CREATE SCHEMA archive")
        self.addCleanup(execute, "DROP SCHEMA archive CASCADE")
        execute("SET search_path = archive, public")
        execute("CREATE TABLE shop_member (name text)")
        execute("INSERT INTO shop_member VALUES ('archived')")
        self.assertEqual(value("SELECT name FROM shop_member"), "archived")
        self.assertEqual(value("SELECT count(*) FROM public.shop_member"), 0)
        execute("SET search_path = public")
        self.assertEqual(Member.objects.count(), 0)

    def test_own_settings(self):
        execute("SET shop.request = 'abc'")
        self.assertEqual(value("SELECT current_setting('shop.request')"), "abc")
        member()
        self.assertEqual(value("SHOW shop.request"), "abc")

    def test_set_config(self):
        self.assertEqual(value("SELECT set_config('shop.user_id', '4711', false)"), "4711")
        for _ in range(10):
            self.assertEqual(value("SELECT current_setting('shop.user_id', true)"), "4711")

    def test_set_local_ends_with_the_transaction(self):
        execute("SET work_mem = '5MB'")
        with transaction.atomic():
            execute("SET LOCAL work_mem = '6MB'")
            self.assertEqual(value("SHOW work_mem"), "6MB")
        self.assertEqual(value("SHOW work_mem"), "5MB")

    def test_set_in_a_transaction_follows_its_outcome(self):
        execute("SET work_mem = '5MB'")
        with self.assertRaises(RuntimeError), transaction.atomic():
            execute("SET work_mem = '6MB'")
            self.assertEqual(value("SHOW work_mem"), "6MB")
            raise RuntimeError
        self.assertEqual(value("SHOW work_mem"), "5MB")
        with transaction.atomic():
            execute("SET work_mem = '8MB'")
        self.assertEqual(value("SHOW work_mem"), "8MB")

    def test_set_in_a_rolled_back_savepoint(self):
        with transaction.atomic():
            execute("SET work_mem = '5MB'")
            with self.assertRaises(RuntimeError), transaction.atomic():
                execute("SET work_mem = '6MB'")
                raise RuntimeError
            self.assertEqual(value("SHOW work_mem"), "5MB")
        self.assertEqual(value("SHOW work_mem"), "5MB")

    def test_reset(self):
        before = value("SHOW work_mem")
        execute("SET work_mem = '5MB'")
        execute("RESET work_mem")
        self.assertEqual(value("SHOW work_mem"), before)
        execute("SET work_mem = '5MB'")
        execute("RESET ALL")
        self.assertEqual(value("SHOW work_mem"), before)

    def test_refused_set_changes_nothing(self):
        execute("SET work_mem = '5MB'")
        with self.assertRaises(Exception):
            execute("SET work_mem = 'much'")
        self.assertEqual(value("SHOW work_mem"), "5MB")

    def test_connections_do_not_share_settings(self):
        with second_connection() as other:
            before = value("SHOW work_mem", using=other)
            for round_ in range(10):
                execute(f"SET work_mem = '{round_ + 5}MB'")
                self.assertEqual(value("SHOW work_mem", using=other), before)
                execute(f"SET application_name = 'other {round_}'", using=other)
                self.assertEqual(value("SHOW application_name"), "shop")
                self.assertEqual(value("SHOW application_name", using=other), f"other {round_}")
                self.assertEqual(value("SHOW work_mem"), f"{round_ + 5}MB")

    def test_many_threads_keep_their_settings(self):
        start = threading.Barrier(4)

        def keep(number):
            execute(f"SET work_mem = '{number + 10}MB'")
            execute(f"SET shop.worker = '{number}'")
            start.wait(20)
            for _ in range(30):
                if query("SELECT current_setting('work_mem'), current_setting('shop.worker')") != [
                    (f"{number + 10}MB", str(number))
                ]:
                    return False
            return True

        self.assertTrue(all([worker.get() for worker in [Worker(keep, n) for n in range(4)]]))

    def test_a_new_connection_starts_afresh(self):
        before = value("SHOW work_mem")
        execute("SET work_mem = '5MB'")
        execute("SET shop.request = 'abc'")
        connection.close()
        for _ in range(5):
            self.assertEqual(value("SHOW work_mem"), before)
            self.assertIn(value("SELECT current_setting('shop.request', true)"), (None, ""))
            connection.close()

    def test_application_name_of_the_connection(self):
        for _ in range(10):
            self.assertEqual(value("SHOW application_name"), "shop")

    def test_role(self):
        user = connection.settings_dict["USER"]
        execute(f'SET ROLE "{user}"')
        self.assertEqual(query("SELECT current_user, session_user"), [(user, user)])
        with self.assertRaises(Exception):
            execute("SET ROLE postgres")
        self.assertEqual(query("SELECT current_user, session_user"), [(user, user)])


class TemporaryTableTests(SessionTestCase):
    def test_over_many_queries(self):
        execute("CREATE TEMPORARY TABLE basket (sku text PRIMARY KEY, n int)")
        for n in range(20):
            execute("INSERT INTO basket VALUES (%s, %s)", [f"S{n}", n])
            self.assertEqual(value("SELECT count(*) FROM basket"), n + 1)
        with self.assertRaises(IntegrityError):
            execute("INSERT INTO basket VALUES ('S1', 1)")
        with transaction.atomic():
            execute("DELETE FROM basket WHERE n >= 10")
            member()
        self.assertEqual(value("SELECT sum(n) FROM basket"), 45)
        execute("DROP TABLE basket")
        with self.assertRaises(ProgrammingError):
            execute("SELECT * FROM basket")

    def test_unseen_by_others(self):
        execute("CREATE TEMP TABLE basket AS SELECT 1 AS n")
        with second_connection() as other:
            with self.assertRaises(ProgrammingError):
                execute("SELECT * FROM basket", using=other)
            execute("CREATE TEMP TABLE basket AS SELECT 2 AS n", using=other)
            for _ in range(10):
                self.assertEqual(value("SELECT n FROM basket"), 1)
                self.assertEqual(value("SELECT n FROM basket", using=other), 2)

    def test_hides_a_table_of_that_name(self):
        member()
        execute("CREATE TEMP TABLE shop_member (LIKE shop_member)")
        self.assertEqual(Member.objects.count(), 0)
        execute("DROP TABLE shop_member")
        self.assertEqual(Member.objects.count(), 1)

    def test_select_into_temp(self):
        member()
        execute("SELECT id, name INTO TEMP TABLE names FROM shop_member")
        self.assertEqual(value("SELECT name FROM names"), "Member 1")

    def test_on_commit_drop(self):
        with transaction.atomic():
            execute("CREATE TEMP TABLE basket ON COMMIT DROP AS SELECT 1 AS n")
            self.assertEqual(value("SELECT n FROM basket"), 1)
        with self.assertRaises(ProgrammingError):
            execute("SELECT * FROM basket")

    def test_on_commit_delete_rows(self):
        execute("CREATE TEMP TABLE basket (n int) ON COMMIT DELETE ROWS")
        with transaction.atomic():
            execute("INSERT INTO basket VALUES (1)")
            self.assertEqual(value("SELECT count(*) FROM basket"), 1)
        self.assertEqual(value("SELECT count(*) FROM basket"), 0)

    def test_gone_with_the_connection(self):
        execute("CREATE TEMP TABLE basket (n int)")
        connection.close()
        for _ in range(5):
            with self.assertRaises(ProgrammingError):
                execute("SELECT * FROM basket")
            connection.close()


class OtherStateTests(SessionTestCase):
    def test_prepared_by_hand(self):
        execute("PREPARE plus (int, int) AS SELECT $1 + $2")
        for n in range(10):
            self.assertEqual(value(f"EXECUTE plus({n}, 1)"), n + 1)
        execute("DEALLOCATE plus")
        with self.assertRaises(Exception):
            execute("EXECUTE plus(1, 1)")
        connection.close()

    def test_prepared_statement_is_its_connections(self):
        execute("PREPARE mine AS SELECT 1")
        with second_connection() as other:
            execute("PREPARE mine AS SELECT 2", using=other)
            for _ in range(5):
                self.assertEqual(value("EXECUTE mine"), 1)
                self.assertEqual(value("EXECUTE mine", using=other), 2)

    def test_currval_within_a_transaction(self):
        with transaction.atomic():
            made = member()
            self.assertEqual(
                value("SELECT currval(pg_get_serial_sequence('shop_member', 'id'))"), made.pk
            )

    def test_discard_all(self):
        execute("SET work_mem = '5MB'")
        execute("CREATE TEMP TABLE basket (n int)")
        execute("DISCARD ALL")
        self.assertNotEqual(value("SHOW work_mem"), "5MB")
        with self.assertRaises(ProgrammingError):
            execute("SELECT * FROM basket")

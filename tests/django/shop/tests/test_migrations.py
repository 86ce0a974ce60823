"""The schema, and changing it."""

import io

from django.core.management import call_command
from django.db import connection, models
from django.db.migrations.executor import MigrationExecutor
from django.test import TestCase, TransactionTestCase

from shop.models import PageView

from .base import query, value


class SchemaTests(TestCase):
    def test_models_and_migrations_agree(self):
        out = io.StringIO()
        call_command("makemigrations", check=True, dry_run=True, stdout=out)
        self.assertIn("No changes detected", out.getvalue())

    def test_everything_is_migrated(self):
        out = io.StringIO()
        call_command("migrate", plan=True, stdout=out)
        self.assertIn("No planned migration operations", out.getvalue())

    def test_system_checks(self):
        call_command("check", databases=["default"], fail_level="WARNING", stdout=io.StringIO())


class MigrationTests(TransactionTestCase):
    def migrate(self, *targets):
        executor = MigrationExecutor(connection)
        executor.migrate(list(targets))

    def setUp(self):
        self.latest = MigrationExecutor(connection).loader.graph.leaf_nodes("shop")
        self.addCleanup(self.migrate, *self.latest)

    def test_back_and_forth_with_data(self):
        def index():
            return value(
                "SELECT count(*) FROM pg_indexes WHERE indexname = 'page_view_visited_at_idx'"
            )

        self.assertEqual(index(), 1)
        self.migrate(("shop", "0001_initial"))
        self.assertEqual(index(), 0)
        old = MigrationExecutor(connection).loader.project_state(("shop", "0001_initial"))
        old.apps.get_model("shop", "PageView").objects.create(path="/old")
        self.migrate(*self.latest)
        self.assertEqual(index(), 1)
        self.assertEqual(PageView.objects.get().tenant, connection.settings_dict["NAME"])

    def test_from_nothing(self):
        self.migrate(("shop", None))
        self.assertEqual(query("SELECT tablename FROM pg_tables WHERE tablename LIKE 'shop%'"), [])
        self.migrate(*self.latest)
        self.assertEqual(PageView.objects.count(), 0)

    def test_schema_editor_rolls_back(self):
        class Passing(models.Model):
            class Meta:
                app_label = "passing"

        with self.assertRaises(RuntimeError):
            with connection.schema_editor() as editor:
                editor.create_model(Passing)
                raise RuntimeError
        self.assertNotIn("passing_passing", connection.introspection.table_names())

"""Runs the tests in the tenant's own database.

A tenant may neither create nor drop databases, so the database it already has is
the test database: migrated and emptied before the tests, emptied after them.
Never point it at a database whose contents matter.
"""

import json
import os
import time

from django.core.management import call_command
from django.db import connections
from django.test.runner import DiscoverRunner


class TenantRunner(DiscoverRunner):
    def setup_databases(self, **kwargs):
        call_command("migrate", interactive=False, verbosity=0)
        call_command("flush", interactive=False, verbosity=0)
        return []

    def teardown_databases(self, old_config, **kwargs):
        call_command("flush", interactive=False, verbosity=0)
        connections.close_all()

    def run_tests(self, *args, **kwargs):
        self.started = time.monotonic()
        return super().run_tests(*args, **kwargs)

    def suite_result(self, suite, result, **kwargs):
        place = os.environ.get("SHOP_TEST_RESULT")
        if place:
            bad = result.failures + result.errors
            bad += [(test, "unexpected success") for test in result.unexpectedSuccesses]
            with open(place, "w") as out:
                json.dump(
                    {
                        "run": result.testsRun,
                        "failed": [[str(test), text] for test, text in bad],
                        "skipped": [[str(test), why] for test, why in result.skipped],
                        "seconds": time.monotonic() - self.started,
                    },
                    out,
                )
        return super().suite_result(suite, result, **kwargs)

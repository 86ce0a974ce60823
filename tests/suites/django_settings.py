"""Settings for Django's own test suite, and a runner that writes down what became of each test, as JSON lines.

$SUITE_PORT is where the tests connect, $SUITE_RESULTS the file that gets the lines.
"""

import json
import os
import unittest
import warnings

from django.test.runner import DiscoverRunner

LAST_LINE_CHARS = 240


def database(name):
    return {"ENGINE": "django.db.backends.postgresql", "HOST": "127.0.0.1", "PORT": os.environ["SUITE_PORT"],
            "USER": "suite", "NAME": f"{name}_outer", "TEST": {"NAME": name}}


DATABASES = {"default": database("main"), "other": database("other")}
SECRET_KEY = "of the tests"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
TEST_RUNNER = "django_settings.Runner"


class Result(unittest.TextTestResult):
    def write(self, test, outcome, error=None):
        text = self._exc_info_to_string(error, test) if error else ""
        lines = [line for line in text.splitlines() if line.strip()]
        # The exception itself stands behind the last line of the traceback that is no "  File".
        names = [line for line in lines if not line.startswith(" ")]
        with open(os.environ["SUITE_RESULTS"], "a") as file:
            file.write(json.dumps({"test": test.id(), "outcome": outcome, "last": (names or [""])[-1][:LAST_LINE_CHARS],
                                   "text": text[-4000:]}) + "\n")

    def addSuccess(self, test):
        super().addSuccess(test)
        self.write(test, "passed")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.write(test, "failed", err)

    def addError(self, test, err):
        super().addError(test, err)
        self.write(test, "error", err)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.write(test, "skipped")

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self.write(test, "xfailed")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.write(test, "xpassed")

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err:
            self.write(test, "failed", err)


class Runner(DiscoverRunner):
    def get_resultclass(self):
        return Result

    def setup_databases(self, **kwargs):
        # The name `postgres` is reserved in Tenantry; Django then takes another database and says so, and its own suite
        # makes an error of each warning.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Normally Django will use a connection to the 'postgres' database")
            return super().setup_databases(**kwargs)

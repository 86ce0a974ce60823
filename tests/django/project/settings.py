"""The shop's settings: which database, and how, comes from the environment."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "only-for-tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "project.urls"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "static/"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.postgres",
    "django.contrib.staticfiles",
    "shop",
]
MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]

_options = {
    "sslmode": os.environ.get("DATABASE_SSLMODE", "require"),
    "connect_timeout": 10,
    "application_name": "shop",
}
if os.environ.get("DATABASE_SERVER_SIDE_BINDING"):  # psycopg 3 only
    _options["server_side_binding"] = True
if os.environ.get("DATABASE_PREPARE_THRESHOLD"):  # psycopg 3 only
    _options["prepare_threshold"] = int(os.environ["DATABASE_PREPARE_THRESHOLD"])

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ.get("DATABASE_HOST", "127.0.0.1"),
        "PORT": os.environ.get("DATABASE_PORT", "5432"),
        "NAME": os.environ["DATABASE_NAME"],
        "USER": os.environ["DATABASE_USER"],
        "PASSWORD": os.environ.get("DATABASE_PASSWORD", ""),
        "CONN_MAX_AGE": int(os.environ.get("CONN_MAX_AGE", "600")),
        "OPTIONS": _options,
        # The tenant's one database is the test database too; see testrunner.py.
        "TEST": {"NAME": os.environ["DATABASE_NAME"]},
    }
}

TEST_RUNNER = "project.testrunner.TenantRunner"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
CACHES = {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}

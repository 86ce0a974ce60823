"""The shop's settings with a second database: the SQLite file SHOP_SQLITE, as the shop keeps it there before it moves."""

import os

from .settings import *  # noqa: F403
from .settings import DATABASES

DATABASES["sqlite"] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": os.environ["SHOP_SQLITE"],
    "OPTIONS": {"timeout": 60},
}

if os.environ.get("SHOP_ONLY_SQLITE"):  # a migration of the shop's writes to the default database
    DATABASES["default"] = DATABASES["sqlite"]

"""The shop in an SQLite file: made and filled, made dirty, compared with the tenant it was imported into.

    sqlite.py make ROWS     migrate SHOP_SQLITE and fill it with so many rows, of every model and every kind of value
    sqlite.py spoil         break things in it: one of every kind
    sqlite.py compare       row by row, value by value, as Django reads both; DATABASE_* say where the tenant is
"""

import datetime
import decimal
import itertools
import json
import os
import random
import sqlite3
import sys
import uuid

os.environ["DJANGO_SETTINGS_MODULE"] = "project.both"
if sys.argv[1:2] == ["make"]:
    os.environ["SHOP_ONLY_SQLITE"] = "1"

import django

django.setup()

from django.apps import apps
from django.contrib.contenttypes.models import ContentType
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.operations import AddIndexConcurrently
from django.contrib.auth.models import Group, Permission, User
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.db import connections
from django.db.migrations import AddIndex
from django.db.migrations.recorder import MigrationRecorder

from shop.models import Cart, CartItem, Member, Order, OrderLine, PageView, Product

LITE = "default" if "SHOP_ONLY_SQLITE" in os.environ else "sqlite"


def on_sqlite():
    """Lists are JSON text there, which is how a project without PostgreSQL keeps them."""
    db_type, prepare, placeholder = ArrayField.db_type, ArrayField.get_db_prep_value, ArrayField.get_placeholder

    def get_db_prep_value(self, value, connection, prepared=False):
        if connection.vendor == "sqlite":
            return None if value is None else json.dumps(value)
        return prepare(self, value, connection, prepared)

    def from_db_value(self, value, expression, connection):
        return json.loads(value) if connection.vendor == "sqlite" and value is not None else value

    ArrayField.db_type = lambda self, c: "text" if c.vendor == "sqlite" else db_type(self, c)
    ArrayField.get_placeholder = lambda self, value, compiler, c: (
        "%s" if c.vendor == "sqlite" else placeholder(self, value, compiler, c))
    ArrayField.get_db_prep_value, ArrayField.from_db_value = get_db_prep_value, from_db_value
    AddIndexConcurrently.database_forwards = AddIndex.database_forwards


def made(model, count, one):
    """So many rows, a thousand at once."""
    rows = (one(number) for number in range(1, count + 1))
    while batch := list(itertools.islice(rows, 1000)):
        model.objects.using(LITE).bulk_create(batch)
    return count


def make(total):
    dice = random.Random(7)
    call_command("migrate", database=LITE, interactive=False, verbosity=0)
    utc, start = datetime.timezone.utc, datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    words = ["", "plain", "with 'quotes' and \"more\"", "tab\tnew\nline\\back", "ünïcödé 😀", "x" * 180, "null", "\\N", "{a,b}"]

    tags = [word for word in words if len(word) <= 40]

    def moment():
        return start + datetime.timedelta(microseconds=dice.randrange(200_000_000_000_000))

    def cents(most):
        return decimal.Decimal(dice.randrange(most)) / 100

    def document():
        return {"b": dice.random(), "a": [1, None, True, {"ü": dice.choice(words)}], "big": 12345678901234567890, "n": dice.randrange(9)}

    def maybe(value):
        return value if dice.random() < 0.7 else None

    parts = {name: total * share // 100 for name, share in
             {"members": 10, "products": 8, "carts": 6, "items": 12, "orders": 18, "lines": 30, "views": 14}.items()}
    members, products, orders = parts["members"], parts["products"], parts["orders"]
    count = made(Member, members, lambda n: Member(
        id=n, email=f"member{n}@example.org", name=dice.choice(words), nickname=maybe("nick"),
        born_on=maybe(datetime.date(1900, 1, 1) + datetime.timedelta(days=dice.randrange(40_000))), joined_at=moment(),
        credit=cents(10**11), preferences=document(), referred_by_id=maybe(dice.randrange(1, n + 1))))
    count += made(Product, products, lambda n: Product(
        id=n, sku=f"sku-{n}", name=dice.choice(words), description="\n".join(words), price=cents(10**9), stock=dice.randrange(2**31),
        weight=maybe(dice.choice([dice.random(), 1e300, 5e-324, 0.1, -0.0, 1 / 3])), barcode=uuid.UUID(int=dice.getrandbits(128)),
        image=maybe(dice.randbytes(dice.randrange(300))), tags=dice.sample(tags, dice.randrange(4)) if n % 3 else [],
        attributes=maybe(document()), active=dice.random() < 0.5))
    count += made(Cart, parts["carts"], lambda n: Cart(
        id=n, token=uuid.UUID(int=dice.getrandbits(128)), member_id=n if n % 2 else None, is_open=n % 3 == 0))
    count += made(CartItem, parts["items"], lambda n: CartItem(
        id=n, cart_id=(n - 1) % parts["carts"] + 1, product_id=(n - 1) // parts["carts"] + 1, quantity=dice.randrange(9),
        note=maybe(dice.choice(words))))
    count += made(Order, orders, lambda n: Order(
        id=n, number=f"N{n:08}", member_id=dice.randrange(1, members + 1), status=dice.choice(Order.Status.values),
        placed_at=moment(), paid_at=maybe(moment()), shipped_on=maybe(moment().date()), total=cents(10**12), address=document(),
        note=maybe(dice.choice(words))))
    count += made(OrderLine, parts["lines"], lambda n: OrderLine(
        id=n, order_id=(n - 1) % orders + 1, product_id=dice.randrange(1, products + 1), position=(n - 1) // orders + 1,
        quantity=dice.randrange(1, 100), unit_price=cents(10**6), discount=maybe(decimal.Decimal(dice.randrange(10_000)) / 10_000)))
    addresses = ["192.0.2.7", "2001:db8::1", "::ffff:192.0.2.1", "255.255.255.255"]
    count += made(PageView, parts["views"], lambda n: PageView(
        id=n, member_id=maybe(dice.randrange(1, members + 1)), path="/" + "x" * dice.randrange(499),
        referrer=maybe("https://example.org/?q=ü"), address=maybe(dice.choice(addresses)), visited_at=moment(),
        duration=maybe(datetime.timedelta(microseconds=dice.randrange(-10**12, 10**13))), data=document(), tenant="lite"))
    # What Django's own applications keep, and what refers to content types and permissions by number.
    count += made(User, 200, lambda n: User(
        id=n, username=f"user{n}", password="!", last_login=maybe(moment()), is_staff=n % 2 == 0, date_joined=moment()))
    group = Group.objects.using(LITE).create(name="staff")
    group.permissions.set(Permission.objects.using(LITE).filter(codename__startswith="change_"))
    for user in User.objects.using(LITE).filter(id__lte=50):
        user.groups.add(group)
    count += made(Session, 100, lambda n: Session(session_key=f"{n:032}", session_data="e30:x", expire_date=moment()))
    # The content types have other numbers than a fresh migrate gives them; permissions go with them.
    with connections[LITE].cursor() as cursor:
        cursor.execute("PRAGMA foreign_keys = OFF")
        for table, column in (("django_content_type", "id"), ("auth_permission", "content_type_id")):
            cursor.execute(f"UPDATE {table} SET {column} = {column} + 1000")
    ContentType.objects.clear_cache()
    left = total - count
    count += made(PageView, left, lambda n: PageView(id=10**6 + n, path="/", visited_at=moment())) if left > 0 else 0
    print(f"{count} rows of the shop's")


def spoil():
    """Broken behind Django's back, as scripts, old versions and other programs do it."""
    with sqlite3.connect(os.environ["SHOP_SQLITE"]) as file:
        file.execute("PRAGMA foreign_keys = OFF")
        file.execute("PRAGMA ignore_check_constraints = ON")
        for statement in (
            "UPDATE shop_member SET born_on = 'long ago' WHERE id = 3",
            "UPDATE shop_member SET name = 'a' || char(0) || 'b' WHERE id = 4",
            "UPDATE shop_member SET name = CAST(x'636166e9' AS text) WHERE id = 5",
            "UPDATE shop_member SET joined_at = 1764230400 WHERE id = 6",
            "UPDATE shop_member SET preferences = '{\"a\": \"\\u0000\"}' WHERE id = 7",
            "UPDATE shop_product SET stock = 4294967296 WHERE id = 3",
            "UPDATE shop_product SET barcode = 'no barcode' WHERE id = 4",
            "UPDATE shop_product SET price = -1 WHERE id = 5",
            "UPDATE shop_product SET tags = 'red, wool' WHERE id = 6",
            "UPDATE shop_product SET active = 'maybe' WHERE id = 7",
            "UPDATE shop_order SET total = '99999999999.99' WHERE id = 3",
            "UPDATE shop_order SET member_id = 99999999 WHERE id = 4",
            "UPDATE shop_order SET status = 'far too long for it' WHERE id = 5",
            "UPDATE shop_pageview SET address = '300.1.1.1' WHERE id = 3",
            "UPDATE shop_pageview SET duration = '1 hour' WHERE id = 4",
            "CREATE TABLE shop_forgotten (id integer PRIMARY KEY); ",
            "INSERT INTO shop_forgotten VALUES (1)",
        ):
            file.execute(statement)


def told(value):
    """Of the same type, too: -0.0 == 0.0, and 1 == True. jsonb does not keep the order of keys."""
    return type(value), json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else repr(value)


def compare():
    rows = tables = 0
    models = [*apps.get_models(include_auto_created=True), MigrationRecorder.Migration]
    for model in models:
        fields = [field.attname for field in model._meta.concrete_fields]
        here, there = (model.objects.using(name).order_by("pk").values_list(*fields).iterator(chunk_size=2000)
                       for name in (LITE, "default"))
        for one, other in itertools.zip_longest(here, there):
            one, other = ([bytes(v) if isinstance(v, memoryview) else v for v in row or ()] for row in (one, other))
            if [told(value) for value in one] != [told(value) for value in other]:
                sys.exit(f"{model._meta.db_table} differs:\n  {dict(zip(fields, one))}\n  {dict(zip(fields, other))}")
            rows += 1
        tables += 1
    print(f"{rows} rows of {tables} tables are the same, value by value")
    # New rows get numbers of their own.
    member = Member.objects.create(email="new@example.org", name="new")
    assert member.pk > Member.objects.using(LITE).order_by("-pk")[0].pk
    member.delete()


if __name__ == "__main__":
    on_sqlite()
    if sys.argv[1:2] == ["make"]:
        make(int(sys.argv[2]))
    else:
        {"spoil": spoil, "compare": compare}[sys.argv[1]]()

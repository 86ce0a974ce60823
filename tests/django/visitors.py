"""Visitors of the shop, without end: each fills a cart and checks out, and finds its order again.

    visitors.py SECONDS RESULT     (DATABASE_* in the environment)

Writes what came of it as JSON: transactions, errors, the longest that one took.
"""

import json
import os
import sys
import time
from decimal import Decimal

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django  # noqa: E402

django.setup()

from django.db import close_old_connections, connection, reset_queries, transaction  # noqa: E402

from shop.models import Cart, CartItem, Member, Order, Product  # noqa: E402
from shop.services import checkout  # noqa: E402


def visit(member, product):
    with transaction.atomic():
        cart = Cart.objects.create(member=member)
        CartItem.objects.create(cart=cart, product=product, quantity=1)
    order = checkout(cart.token)
    assert Order.objects.get(number=order.number).lines.count() == 1


def main():
    seconds, result = float(sys.argv[1]), sys.argv[2]
    me = f"visitor-{os.getpid()}"
    member = Member.objects.create(email=f"{me}@example.org", name=me)
    product = Product.objects.create(sku=me, name=me, price=Decimal("1.50"), stock=10_000_000)
    visits, errors, longest = 0, [], 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        # As a request begins and ends.
        reset_queries()
        close_old_connections()
        try:
            visit(member, product)
            visits += 1
        except Exception as error:  # noqa: BLE001: whatever a client would see
            errors.append(f"{type(error).__name__}: {error}")
        longest = max(longest, time.monotonic() - begun)
    orders = Order.objects.filter(member=member).count()
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        (database,) = cursor.fetchone()
    with open(result, "w") as out:
        json.dump({"visits": visits, "orders": orders, "errors": errors, "longest": longest, "database": database}, out)


main()

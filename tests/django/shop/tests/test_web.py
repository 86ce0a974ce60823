"""Requests: through Django's test client, and to a real threaded server."""

import http.client
import json
import threading
from urllib.parse import urlsplit

from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.db import connection
from django.test import LiveServerTestCase, TestCase

from shop.models import Cart, PageView, Product

from .base import Worker, member, product


class ClientTests(TestCase):
    def test_products(self):
        product(1, name="Hat")
        product(2, active=False)
        self.assertEqual(
            self.client.get("/products/").json(),
            {"products": [{"sku": "SKU-00001", "name": "Hat", "price": "9.99", "stock": 0}]},
        )

    def test_checkout_and_sold_out(self):
        carts = [Cart.objects.create(member=member(n)) for n in range(2)]
        hat = product(stock=3)
        for cart in carts:
            cart.items.create(product=hat, quantity=2)
        first, second = [self.client.post(f"/carts/{cart.token}/checkout/") for cart in carts]
        self.assertEqual((first.status_code, first.json()["total"]), (200, "19.98"))
        self.assertEqual((second.status_code, second.json()), (409, {"out_of_stock": hat.sku}))

    def test_sessions_in_the_database(self):
        for visit in range(1, 6):
            self.assertEqual(self.client.get("/visits/").json(), {"visits": visit})
        self.assertEqual(Session.objects.count(), 1)

    def test_users(self):
        User.objects.create_user("ada", password="secret")
        self.assertTrue(self.client.login(username="ada", password="secret"))
        self.assertFalse(self.client.login(username="ada", password="wrong"))

    def test_broken_view_keeps_nothing(self):
        with self.assertRaises(RuntimeError):
            self.client.get("/broken/")
        self.assertFalse(Product.objects.exists())


class ServerTests(LiveServerTestCase):
    def get(self, path):
        client = http.client.HTTPConnection(urlsplit(self.live_server_url).netloc, timeout=30)
        try:
            client.request("GET", path)
            answer = client.getresponse()
            return answer.status, answer.read()
        finally:
            client.close()

    def test_concurrent_requests(self):
        start = threading.Barrier(6)

        def visit(number):
            start.wait(20)
            for n in range(10):
                status, _ = self.get(f"/view/?path=/{number}/{n}")
                if status != 200:
                    return status
            return 200

        statuses = [worker.get(60) for worker in [Worker(visit, n) for n in range(6)]]
        self.assertEqual(statuses, [200] * 6)
        self.assertEqual(PageView.objects.count(), 60)
        self.assertEqual(
            set(PageView.objects.values_list("tenant", flat=True)),
            {connection.settings_dict["NAME"]},
        )

    def test_every_request_is_the_tenants(self):
        settings = connection.settings_dict
        for _ in range(30):
            status, body = self.get("/whoami/")
            self.assertEqual(
                json.loads(body), {"database": settings["NAME"], "user": settings["USER"]}
            )

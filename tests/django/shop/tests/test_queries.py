"""Queries as a shop makes them: bulk work, sums, JSON, expressions, raw SQL, much data."""

import hashlib
import io
from decimal import Decimal

from django.db import DatabaseError, connection, transaction
from django.db.models import (
    Avg, Case, Count, Exists, F, Max, Min, OuterRef, Prefetch, Q, Subquery, Sum, Value, When,
    Window,
)
from django.db.models.functions import Coalesce, Lower, Rank, RowNumber
from django.test import TestCase, TransactionTestCase

from shop.models import Cart, Member, Order, OrderLine, PageView, Product

from .base import execute, member, product, query, value


class BulkTests(TestCase):
    def test_bulk_create_gives_keys(self):
        made = Product.objects.bulk_create(
            [Product(sku=f"S{n}", name=f"N{n}", price=n) for n in range(500)], batch_size=120
        )
        self.assertEqual(len({thing.pk for thing in made}), 500)
        self.assertEqual(Product.objects.aggregate(Sum("price"))["price__sum"], 124750)

    def test_bulk_create_ignoring_and_updating_conflicts(self):
        product(1, name="old", sku="A")
        again = [Product(sku="A", name="new", price=1), Product(sku="B", name="b", price=1)]
        Product.objects.bulk_create(again, ignore_conflicts=True)
        self.assertEqual(Product.objects.get(sku="A").name, "old")
        Product.objects.bulk_create(
            [Product(sku="A", name="new", price=1)],
            update_conflicts=True, unique_fields=["sku"], update_fields=["name"],
        )
        self.assertEqual(Product.objects.get(sku="A").name, "new")
        self.assertEqual(Product.objects.count(), 2)

    def test_bulk_update(self):
        things = [product(n) for n in range(50)]
        for n, thing in enumerate(things):
            thing.stock, thing.name = n, f"renamed {n}"
        self.assertEqual(Product.objects.bulk_update(things, ["stock", "name"], batch_size=20), 50)
        self.assertEqual(
            list(Product.objects.values_list("stock", "name")),
            [(n, f"renamed {n}") for n in range(50)],
        )

    def test_get_or_create(self):
        first, made = Member.objects.get_or_create(email="a@example.test", defaults={"name": "A"})
        again, made_again = Member.objects.get_or_create(
            email="a@example.test", defaults={"name": "B"}
        )
        self.assertEqual((made, made_again, again.pk, again.name), (True, False, first.pk, "A"))

    def test_update_or_create(self):
        for round_, expected in ((1, True), (2, False)):
            thing, made = Product.objects.update_or_create(
                sku="A", defaults={"name": f"round {round_}", "price": round_}
            )
            self.assertIs(made, expected)
        self.assertEqual(Product.objects.get().name, "round 2")

    def test_update_and_delete_tell_how_many(self):
        for n in range(10):
            product(n, stock=n)
        self.assertEqual(Product.objects.filter(stock__gte=5).update(active=False), 5)
        self.assertEqual(Product.objects.filter(active=False).delete()[0], 5)
        self.assertEqual(Product.objects.update(active=True), 5)

    def test_in_bulk_with_many_keys(self):
        keys = [product(n).pk for n in range(100)]
        self.assertEqual(set(Product.objects.in_bulk(keys)), set(keys))


class ExpressionTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.members = [member(n, credit=Decimal(n)) for n in range(4)]
        cls.products = [product(n, price=Decimal("0.10") * (n + 1), stock=n) for n in range(5)]
        for m, someone in enumerate(cls.members[:3]):
            order = Order.objects.create(number=f"O{m}", member=someone)
            for position, thing in enumerate(cls.products[: m + 2], start=1):
                OrderLine.objects.create(
                    order=order, product=thing, position=position, quantity=position,
                    unit_price=thing.price, discount=Decimal("0.0333") if m else None,
                )

    def test_aggregates(self):
        self.assertEqual(
            Product.objects.aggregate(
                n=Count("id"), lowest=Min("price"), highest=Max("price"), mean=Avg("price")
            ),
            {"n": 5, "lowest": Decimal("0.10"), "highest": Decimal("0.50"),
             "mean": Decimal("0.30")},
        )

    def test_aggregate_of_nothing(self):
        self.assertEqual(
            Product.objects.filter(sku="none").aggregate(
                n=Count("id"), total=Sum("price"), zero=Coalesce(Sum("price"), Decimal("0"))
            ),
            {"n": 0, "total": None, "zero": Decimal("0")},
        )

    def test_decimal_sums_are_exact(self):
        totals = Order.objects.annotate(sum=Sum("lines__amount")).order_by("number")
        self.assertEqual(
            [order.sum for order in totals], [Decimal("0.50"), Decimal("1.40"), Decimal("3.00")]
        )

    def test_decimal_arithmetic_in_the_database(self):
        lines = OrderLine.objects.annotate(
            net=F("amount") * (1 - Coalesce(F("discount"), Decimal("0")))
        )
        self.assertEqual(
            lines.get(order__number="O2", position=4).net, Decimal("1.60") * Decimal("0.9667")
        )
        self.assertEqual(lines.get(order__number="O0", position=2).net, Decimal("0.40"))

    def test_count_with_filter_and_group(self):
        counts = Member.objects.annotate(
            lines=Count("orders__lines"),
            dear=Count("orders__lines", filter=Q(orders__lines__unit_price__gt=Decimal("0.20"))),
        ).order_by("id").values_list("lines", "dear")
        self.assertEqual(list(counts), [(2, 0), (3, 1), (4, 2), (0, 0)])

    def test_f_expressions(self):
        Product.objects.update(stock=F("stock") + 10, price=F("price") * 2)
        self.assertEqual(
            list(Product.objects.values_list("stock", "price")),
            [(n + 10, Decimal("0.20") * (n + 1)) for n in range(5)],
        )
        one = self.products[0]
        one.stock = F("stock") + 1
        one.save()
        one.refresh_from_db()
        self.assertEqual(one.stock, 11)

    def test_case_exists_and_subquery(self):
        ordered = Order.objects.filter(member=OuterRef("pk"))
        rows = Member.objects.annotate(
            buys=Exists(ordered),
            last=Subquery(ordered.order_by("-number").values("number")[:1]),
            rank=Case(When(credit__gte=2, then=Value("gold")), default=Value("tin")),
        ).values_list("buys", "last", "rank")
        self.assertEqual(
            list(rows),
            [(True, "O0", "tin"), (True, "O1", "tin"), (True, "O2", "gold"), (False, None, "gold")],
        )

    def test_window_functions(self):
        rows = OrderLine.objects.annotate(
            n=Window(RowNumber(), partition_by="order", order_by="position"),
            rank=Window(Rank(), order_by=F("quantity").desc()),
        ).filter(n=1)
        self.assertEqual([row.rank for row in rows], [7, 7, 7])

    def test_joins_select_related_and_prefetch(self):
        with self.assertNumQueries(1):
            names = [line.order.member.name for line in
                     OrderLine.objects.select_related("order__member")]
        self.assertEqual(len(names), 9)
        with self.assertNumQueries(3):
            members = list(Member.objects.prefetch_related(
                Prefetch("orders", Order.objects.prefetch_related("lines"))
            ).filter(orders__isnull=False))
            self.assertEqual([len(m.orders.all()[0].lines.all()) for m in members], [2, 3, 4])

    def test_union_distinct_and_slices(self):
        low = Product.objects.filter(stock__lt=3).values_list("stock", flat=True)
        high = Product.objects.filter(stock__gt=1).values_list("stock", flat=True)
        self.assertEqual(sorted(low.union(high)), [0, 1, 2, 3, 4])
        self.assertEqual(sorted(low.intersection(high)), [2])
        self.assertEqual(
            OrderLine.objects.order_by("product").values("product").distinct().count(), 4
        )
        self.assertEqual([p.stock for p in Product.objects.order_by("-stock")[1:3]], [3, 2])

    def test_explain(self):
        self.assertIn("shop_product", Product.objects.filter(stock=1).explain(analyze=True))


class DataTests(TestCase):
    def test_json_lookups(self):
        member(1, preferences={"mail": True, "sizes": [38, 40], "address": {"city": "Köln"}})
        member(2, preferences={"mail": False, "note": None})
        find = Member.objects.filter
        self.assertEqual(find(preferences__mail=True).count(), 1)
        self.assertEqual(find(preferences__address__city="Köln").count(), 1)
        self.assertEqual(find(preferences__sizes__0=38).count(), 1)
        self.assertEqual(find(preferences__has_key="note").count(), 1)
        self.assertEqual(find(preferences__contains={"mail": False}).count(), 1)
        self.assertEqual(find(preferences__note=None).count(), 1)

    def test_array_lookups(self):
        product(1, tags=["red", "wool"])
        product(2, tags=["blue"])
        self.assertEqual(Product.objects.filter(tags__contains=["red"]).count(), 1)
        self.assertEqual(Product.objects.filter(tags__overlap=["blue", "wool"]).count(), 2)
        self.assertEqual(Product.objects.get(tags__len=1).tags, ["blue"])

    def test_unicode(self):
        names = ["Zoë", "Ωμέγα", "日本語", "🛒👩‍👩‍👧", "עברית", "e\u0301", "%s %% ' \" \\ $1 ;--", "\u2028\t\n"]
        for number, name in enumerate(names):
            member(number, name=name)
        self.assertEqual(list(Member.objects.values_list("name", flat=True)), names)
        for name in names:
            self.assertEqual(Member.objects.get(name=name).name, name)
        self.assertEqual(
            value("SELECT length(name) FROM shop_member WHERE name = %s", ["日本語"]), 3
        )

    def test_case_insensitive_and_patterns(self):
        product(1, name="100% Wool_A")
        product(2, name="100 Wool-B")
        find = Product.objects.filter
        self.assertEqual(find(name__contains="%").count(), 1)
        self.assertEqual(find(name__icontains="wool_").count(), 1)
        self.assertEqual(find(name__istartswith="100").count(), 2)
        self.assertEqual(find(name__regex=r"^\d+ ").count(), 1)
        self.assertEqual(Product.objects.annotate(l=Lower("name")).filter(l__endswith="-b").count(), 1)

    def test_one_megabyte_of_text(self):
        text = "".join(hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()
                       for n in range(16384))
        self.assertEqual(len(text), 1 << 20)
        thing = product(description=text)
        self.assertTrue(Product.objects.get(pk=thing.pk).description == text)
        self.assertEqual(
            value("SELECT md5(description) FROM shop_product"),
            hashlib.md5(text.encode()).hexdigest(),
        )

    def test_megabytes_of_bytes(self):
        blob = bytes(range(256)) * 12288  # 3 MB
        product(image=blob)
        self.assertTrue(bytes(Product.objects.get().image) == blob)

    def test_a_row_of_many_parameters(self):
        numbers = list(range(5000))
        self.assertEqual(
            value(f"SELECT sum(n) FROM unnest(ARRAY[{','.join(['%s'] * 5000)}]) n", numbers),
            sum(numbers),
        )


class ManyRowsTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        PageView.objects.bulk_create(
            [PageView(path=f"/p/{n}", data={"n": n}, tenant=connection.settings_dict["NAME"])
             for n in range(10_000)],
            batch_size=2000,
        )

    def test_reading_ten_thousand(self):
        rows = list(PageView.objects.all())
        self.assertEqual([row.data["n"] for row in rows], list(range(10_000)))

    def test_values_of_ten_thousand(self):
        paths = PageView.objects.values_list("path", flat=True)
        self.assertEqual(list(paths), [f"/p/{n}" for n in range(10_000)])

    def test_all_are_this_tenants(self):
        self.assertEqual(
            query("SELECT tenant, count(*) FROM shop_pageview GROUP BY tenant"),
            [(connection.settings_dict["NAME"], 10_000)],
        )

    def test_many_rows_without_a_table(self):
        rows = query("SELECT n, repeat('x', 100) FROM generate_series(1, 50000) n")
        self.assertEqual((len(rows), rows[-1]), (50_000, (50_000, "x" * 100)))


class RawTests(TestCase):
    def test_raw_queryset(self):
        product(1, stock=5)
        (one,) = Product.objects.raw("SELECT * FROM shop_product WHERE stock = %s", [5])
        self.assertEqual(one.sku, "SKU-00001")

    def test_cursor(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT n, n * n AS square FROM generate_series(1, %s) n", [5])
            self.assertEqual([column[0] for column in cursor.description], ["n", "square"])
            self.assertEqual(cursor.fetchone(), (1, 1))
            self.assertEqual(cursor.fetchmany(2), [(2, 4), (3, 9)])
            self.assertEqual(cursor.fetchall(), [(4, 16), (5, 25)])

    def test_executemany_and_rowcount(self):
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO shop_cart (token, is_open, created_at, updated_at)"
                " VALUES (gen_random_uuid(), %s, now(), now())",
                [(True,), (False,), (True,)],
            )
            cursor.execute("UPDATE shop_cart SET is_open = NOT is_open")
            self.assertEqual(cursor.rowcount, 3)
        self.assertEqual(Cart.objects.filter(is_open=True).count(), 1)

    def test_insert_returning_and_with(self):
        rows = query(
            "WITH made AS (INSERT INTO shop_cart (token, is_open, created_at, updated_at)"
            " SELECT gen_random_uuid(), true, now(), now() FROM generate_series(1, 3)"
            " RETURNING id) SELECT count(*) FROM made"
        )
        self.assertEqual(rows, [(3,)])

    def test_types_of_values(self):
        self.assertEqual(
            query("SELECT 1, 2.50::numeric, true, NULL, 'x', ARRAY[1,2], 1e300::float8, ''::text"),
            [(1, Decimal("2.50"), True, None, "x", [1, 2], 1e300, "")],
        )

    def test_empty_query_result(self):
        self.assertEqual(query("SELECT 1 WHERE false"), [])

    def test_functions_with_notices(self):
        execute("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
        self.assertEqual(value("SELECT 1"), 1)


class CopyTests(TransactionTestCase):
    def copy_in(self, sql, data):
        with connection.cursor() as cursor:
            if hasattr(cursor.cursor, "copy_expert"):  # psycopg2
                cursor.copy_expert(sql, io.StringIO(data))
            else:
                with cursor.copy(sql) as copy:
                    copy.write(data)

    def copy_out(self, sql):
        with connection.cursor() as cursor:
            if hasattr(cursor.cursor, "copy_expert"):
                out = io.StringIO()
                cursor.copy_expert(sql, out)
                return out.getvalue()
            with cursor.copy(sql) as copy:
                return b"".join(bytes(block) for block in copy).decode()

    def test_copy_in_and_out(self):
        lines = "".join(f"/c/{n},2024-01-01T00:00:00Z,{{}},\n" for n in range(5000))
        self.copy_in(
            "COPY shop_pageview (path, visited_at, data, tenant)"
            " FROM STDIN (FORMAT csv, FORCE_NOT_NULL (tenant))", lines
        )
        self.assertEqual(PageView.objects.count(), 5000)
        out = self.copy_out("COPY (SELECT path FROM shop_pageview ORDER BY id) TO STDOUT")
        self.assertEqual(out, "".join(f"/c/{n}\n" for n in range(5000)))

    def test_failing_copy_leaves_the_connection_usable(self):
        with self.assertRaises(DatabaseError), transaction.atomic():
            with connection.wrap_database_errors:
                self.copy_in("COPY shop_pageview (path, visited_at) FROM STDIN", "x\tno date\n")
        self.assertEqual(value("SELECT 1"), 1)
        self.assertEqual(PageView.objects.count(), 0)

"""Storing and reading the shop's things; what the database forbids."""

import datetime
import uuid
from decimal import Decimal

from django.core.exceptions import ValidationError
from django.db import DataError, IntegrityError, models, transaction
from django.test import TestCase, TransactionTestCase
from django.utils import timezone

from shop.models import Cart, CartItem, Member, Order, OrderLine, PageView, Product

from .base import member, product, query


class CrudTests(TestCase):
    def test_create_read_update_delete(self):
        made = member(nickname="Mo")
        self.assertIsNotNone(made.pk)
        read = Member.objects.get(email=made.email)
        self.assertEqual((read.pk, read.nickname), (made.pk, "Mo"))
        read.name = "Changed"
        read.save()
        made.refresh_from_db()
        self.assertEqual(made.name, "Changed")
        self.assertEqual(made.delete(), (1, {"shop.Member": 1}))
        with self.assertRaises(Member.DoesNotExist):
            Member.objects.get(pk=read.pk)

    def test_nullable_columns_hold_null(self):
        made = member()
        self.assertEqual(
            Member.objects.filter(
                nickname__isnull=True, born_on__isnull=True, referred_by__isnull=True
            ).get(),
            made,
        )
        self.assertEqual(
            query("SELECT nickname, born_on FROM shop_member WHERE id = %s", [made.pk]),
            [(None, None)],
        )

    def test_empty_string_is_not_null(self):
        member(1, nickname="")
        member(2, nickname=None)
        self.assertEqual(Member.objects.filter(nickname="").count(), 1)
        self.assertEqual(Member.objects.filter(nickname=None).count(), 1)

    def test_every_column_type_round_trips(self):
        barcode = uuid.uuid4()
        product(
            price=Decimal("12345678.90"),
            stock=2147483647,
            weight=0.1,
            barcode=barcode,
            image=bytes(range(256)),
            tags=["a", 'quote"d', "comma,d", ""],
            attributes={"deep": [1, 2.5, None, {"ok": True}]},
            active=False,
        )
        read = Product.objects.get()
        self.assertEqual(read.price, Decimal("12345678.90"))
        self.assertEqual(read.stock, 2147483647)
        self.assertEqual(read.weight, 0.1)
        self.assertEqual(read.barcode, barcode)
        self.assertEqual(bytes(read.image), bytes(range(256)))
        self.assertEqual(read.tags, ["a", 'quote"d', "comma,d", ""])
        self.assertEqual(read.attributes, {"deep": [1, 2.5, None, {"ok": True}]})
        self.assertIs(read.active, False)

    def test_duration_and_addresses_round_trip(self):
        span = datetime.timedelta(days=400, seconds=7, microseconds=123456)
        for address in ("192.0.2.7", "2001:db8::1"):
            PageView.objects.create(path="/", duration=span, address=address)
        self.assertEqual(
            list(PageView.objects.values_list("address", "duration")),
            [("192.0.2.7", span), ("2001:db8::1", span)],
        )

    def test_generated_column(self):
        order = Order.objects.create(number="1", member=member())
        line = OrderLine.objects.create(
            order=order, product=product(), position=1, quantity=3, unit_price=Decimal("2.35")
        )
        self.assertEqual(OrderLine.objects.get(pk=line.pk).amount, Decimal("7.05"))

    def test_related_objects_and_cascade(self):
        cart = Cart.objects.create(member=member())
        for number in range(3):
            cart.items.create(product=product(number), quantity=number + 1)
        self.assertEqual(sum(cart.items.values_list("quantity", flat=True)), 6)
        cart.delete()
        self.assertEqual(CartItem.objects.count(), 0)
        self.assertEqual(Product.objects.count(), 3)

    def test_protected_and_nulled_references(self):
        first = member(1)
        second = member(2, referred_by=first)
        order = Order.objects.create(number="1", member=second)
        with self.assertRaises(models.ProtectedError):
            second.delete()
        first.delete()
        second.refresh_from_db()
        self.assertIsNone(second.referred_by)
        order.delete()
        second.delete()
        self.assertFalse(Member.objects.exists())

    def test_full_clean_looks_for_duplicates(self):
        member()
        with self.assertRaises(ValidationError) as caught:
            Member(email="member1@example.test", name="x").full_clean()
        self.assertEqual(set(caught.exception.error_dict), {"email"})


class ConstraintTests(TestCase):
    def test_unique_violation_and_recovery(self):
        member()
        with self.assertRaises(IntegrityError):
            with transaction.atomic():
                member()
        self.assertEqual(member(2).pk, Member.objects.latest("id").pk)
        self.assertEqual(Member.objects.count(), 2)

    def test_unique_together(self):
        cart, thing = Cart.objects.create(), product()
        cart.items.create(product=thing)
        with self.assertRaises(IntegrityError) as caught, transaction.atomic():
            cart.items.create(product=thing)
        self.assertIn("cart_item_once_per_product", str(caught.exception))
        self.assertEqual(cart.items.count(), 1)

    def test_partial_unique(self):
        someone = member()
        first = Cart.objects.create(member=someone)
        with self.assertRaises(IntegrityError), transaction.atomic():
            Cart.objects.create(member=someone)
        first.is_open = False
        first.save()
        Cart.objects.create(member=someone)
        self.assertEqual(someone.carts.count(), 2)

    def test_check_constraint(self):
        with self.assertRaises(IntegrityError) as caught, transaction.atomic():
            product(price=Decimal("-0.01"))
        self.assertIn("product_price_not_negative", str(caught.exception))

    def test_not_null(self):
        with self.assertRaises(IntegrityError), transaction.atomic():
            member(name=None)

    def test_too_long_and_too_large(self):
        with self.assertRaises(DataError), transaction.atomic():
            member(nickname="n" * 51)
        with self.assertRaises(DataError), transaction.atomic():
            product(price=Decimal("123456789.00"))
        self.assertFalse(Member.objects.exists() or Product.objects.exists())


class ConstraintsWithoutTransactionTests(TransactionTestCase):
    def test_unique_violation_in_autocommit(self):
        member()
        for _ in range(5):
            with self.assertRaises(IntegrityError):
                member()
            self.assertEqual(Member.objects.count(), 1)

    def test_deferred_foreign_key_fails_at_commit(self):
        late = None
        with self.assertRaises(IntegrityError):
            with transaction.atomic():
                Order.objects.create(number="1", member_id=987654321)
                # Deferred: so far it stands.
                late = Order.objects.count()
        self.assertEqual(late, 1)
        self.assertEqual(Order.objects.count(), 0)

    def test_deferred_foreign_key_met_before_commit(self):
        with transaction.atomic():
            Order.objects.create(number="1", member_id=4711)
            member(pk=4711)
        self.assertEqual(Order.objects.get().member.name, "Member 1")


class TimeTests(TestCase):
    def test_aware_datetimes_are_instants(self):
        tokyo = datetime.timezone(datetime.timedelta(hours=9))
        placed = datetime.datetime(2024, 3, 1, 1, 2, 3, 456789, tzinfo=tokyo)
        order = Order.objects.create(number="1", member=member(), placed_at=placed)
        order.refresh_from_db()
        self.assertEqual(order.placed_at, placed)
        self.assertEqual(order.placed_at.utcoffset(), datetime.timedelta(0))
        # In UTC it was still February.
        self.assertEqual(Order.objects.filter(placed_at__month=2).count(), 1)
        with timezone.override("Asia/Tokyo"):
            self.assertEqual(Order.objects.filter(placed_at__month=3).count(), 1)
            self.assertEqual(Order.objects.filter(placed_at__date="2024-03-01").count(), 1)

    def test_days_with_summer_time(self):
        with timezone.override("Europe/Berlin"):
            zone = timezone.get_current_timezone()
            for hour in (0, 1, 3, 23):  # 2 o'clock did not exist on that day
                PageView.objects.create(
                    path="/", visited_at=datetime.datetime(2024, 3, 31, hour, 30, tzinfo=zone)
                )
            days = PageView.objects.annotate(
                day=models.functions.TruncDay("visited_at")
            ).values_list("day", flat=True)
            self.assertEqual({day.date() for day in days}, {datetime.date(2024, 3, 31)})
            self.assertEqual(
                list(PageView.objects.values_list("visited_at__hour", flat=True)), [0, 1, 3, 23]
            )

    def test_the_session_is_in_utc(self):
        self.assertEqual(query("SHOW TIME ZONE"), [("UTC",)])

    def test_dates(self):
        member(1, born_on=datetime.date(1900, 1, 1))
        member(2, born_on=datetime.date(2000, 2, 29))
        self.assertEqual(Member.objects.get(born_on__day=29).born_on, datetime.date(2000, 2, 29))
        self.assertEqual(Member.objects.filter(born_on__lt="2000-01-01").count(), 1)

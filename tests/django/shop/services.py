import uuid

from django.db import transaction

from .models import Cart, Order, OrderLine, Product


class OutOfStock(Exception):
    pass


@transaction.atomic
def checkout(token):
    """Turn an open cart into an order, taking the goods from stock."""
    cart = Cart.objects.select_for_update().get(token=token, is_open=True)
    items = list(cart.items.order_by("product_id"))
    products = {
        product.pk: product
        for product in Product.objects.select_for_update()
        .filter(pk__in=[item.product_id for item in items])
        .order_by("pk")
    }
    order = Order.objects.create(number=uuid.uuid4().hex[:12], member=cart.member)
    for position, item in enumerate(items, start=1):
        product = products[item.product_id]
        if product.stock < item.quantity:
            raise OutOfStock(product.sku)
        product.stock -= item.quantity
        product.save(update_fields=["stock"])
        line = OrderLine.objects.create(
            order=order,
            product=product,
            position=position,
            quantity=item.quantity,
            unit_price=product.price,
        )
        order.total += line.quantity * line.unit_price
    order.save(update_fields=["total"])
    cart.is_open = False
    cart.save()
    return order

from django.db import connection, transaction
from django.http import JsonResponse

from . import services
from .models import PageView, Product


def products(request):
    rows = Product.objects.filter(active=True).values("sku", "name", "price", "stock")
    return JsonResponse({"products": list(rows)})


def page_view(request):
    view = PageView.objects.create(
        path=request.GET.get("path", "/"),
        address=request.META.get("REMOTE_ADDR"),
        data=dict(request.GET.items()),
        tenant=connection.settings_dict["NAME"],
    )
    return JsonResponse({"id": view.pk})


def visits(request):
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JsonResponse({"visits": request.session["visits"]})


def whoami(request):
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database(), current_user")
        database, user = cursor.fetchone()
    return JsonResponse({"database": database, "user": user})


@transaction.atomic
def broken(request):
    Product.objects.create(sku="never-kept", name="", price=1)
    raise RuntimeError("broken on purpose")


def checkout(request, token):
    try:
        order = services.checkout(token)
    except services.OutOfStock as error:
        return JsonResponse({"out_of_stock": str(error)}, status=409)
    return JsonResponse({"number": order.number, "total": order.total})

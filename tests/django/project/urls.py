from django.urls import path

from shop import views

urlpatterns = [
    path("products/", views.products),
    path("view/", views.page_view),
    path("visits/", views.visits),
    path("whoami/", views.whoami),
    path("broken/", views.broken),
    path("carts/<uuid:token>/checkout/", views.checkout),
]

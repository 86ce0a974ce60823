from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    # CREATE INDEX CONCURRENTLY runs outside any transaction.
    atomic = False

    dependencies = [("shop", "0002_page_view_tenant")]

    operations = [
        AddIndexConcurrently(
            model_name="pageview",
            index=models.Index(fields=["visited_at"], name="page_view_visited_at_idx"),
        ),
    ]

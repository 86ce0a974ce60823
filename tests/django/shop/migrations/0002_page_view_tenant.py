from django.db import migrations, models


def fill(apps, schema_editor):
    PageView = apps.get_model("shop", "PageView")
    PageView.objects.update(tenant=schema_editor.connection.settings_dict["NAME"])


class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]

    operations = [
        migrations.AddField(
            model_name="pageview",
            name="tenant",
            field=models.CharField(default="", max_length=63),
        ),
        migrations.RunPython(fill, migrations.RunPython.noop),
    ]

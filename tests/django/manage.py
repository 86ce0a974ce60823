#!/usr/bin/env python3
import faulthandler
import os
import signal
import sys

if __name__ == "__main__":
    # A run that hangs is asked by its runner where it hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)

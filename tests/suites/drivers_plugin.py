"""A pytest plugin: what became of each test, as JSON lines that also survive a crash.

$DRIVERS_RESULTS is the file that gets the lines, $DRIVERS_SKIP one with the tests that are left out (one a line).
"""

import json
import os
import time
from pathlib import Path

RANK = ("passed", "skipped", "xfailed", "xpassed", "failed", "error")
LAST_LINE_CHARS = 240

texts = {}
outcomes = {}
begun_at = {}
with_results = Path(os.environ["DRIVERS_RESULTS"])


def write(**line):
    with open(with_results, "a") as file:
        file.write(json.dumps(line) + "\n")


def last_line(report):
    """The exception itself, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = str(crash.message)
        lines = [line for line in text.splitlines() if line.strip()]
        line = lines[0] if lines else text
    elif isinstance(report.longrepr, tuple):
        line = str(report.longrepr[-1])
    else:
        lines = [line for line in report.longreprtext.splitlines() if line.strip()]
        line = lines[-1] if lines else ""
    return line.strip()[:LAST_LINE_CHARS]


def outcome(report):
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    if report.failed:
        return "failed" if report.when == "call" else "error"
    return report.outcome


def pytest_collection_modifyitems(config, items):
    skip = os.environ.get("DRIVERS_SKIP")
    if not skip:
        return
    known = set(Path(skip).read_text().splitlines())
    left = [item for item in items if item.nodeid in known]
    items[:] = [item for item in items if item.nodeid not in known]
    config.hook.pytest_deselected(items=left)


def pytest_collectreport(report):
    if report.failed:
        write(uncollected=report.nodeid, last=last_line(report), text=report.longreprtext)


def pytest_runtest_logstart(nodeid):
    outcomes.pop(nodeid, None)
    texts.pop(nodeid, None)
    begun_at[nodeid] = time.monotonic()
    write(begun=nodeid)


def pytest_runtest_logreport(report):
    now = outcome(report)
    before = outcomes.get(report.nodeid, "passed")
    if RANK.index(now) > RANK.index(before):
        outcomes[report.nodeid] = now
        texts[report.nodeid] = (last_line(report), report.longreprtext)
    if report.when == "teardown":
        last, text = texts.pop(report.nodeid, ("", ""))
        write(test=report.nodeid, outcome=outcomes.pop(report.nodeid, "passed"), last=last, text=text,
              seconds=round(time.monotonic() - begun_at.pop(report.nodeid), 1))


def pytest_sessionfinish(exitstatus):
    write(finished=int(exitstatus))

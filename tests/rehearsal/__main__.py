"""Print what each callback launches in a step on a GPU that is not there, and how often that waits for the device.

Run: python -m tests.rehearsal [layers]    (75 by default, with four tensors each; and four times as many)
"""

import logging
import sys

from tests.rehearsal.steps import observe
from tests.rehearsal.table import ROWS

layers = int(sys.argv[1]) if len(sys.argv) > 1 else 75
logging.disable(logging.WARNING)
print(f"launches and waits of a step, with {4 * layers} and {16 * layers} tensors; and of a step that is logged")
for row in ROWS:
    few, many = (observe(row.make, count, **row.options) for count in (layers, 4 * layers))
    logged = observe(row.make, layers, logs=True, **row.options)
    counts = f"{few.launched.total():6d} {many.launched.total():6d} (bound {row.launches:3d}) {few.waited.total():4d}"
    bound = "" if row.logged_launches is None else f"(bound {row.logged_launches})"
    print(f"{row.name:31s} {counts}    {logged.launched.total():6d} {logged.waited.total():4d} {bound}", flush=True)

"""How tests are called, the same in every process that collects them."""

import re


def printed(value):
    """As ``repr`` shows it, without the addresses of functions and objects, which pytest-xdist would stumble over."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

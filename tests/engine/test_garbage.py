from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import gc
from nybble.engine.garbage import settle

class Node:
    pass

kept, lost = [Node() for _ in range(1000)], Node()
lost.itself = lost
settle()
assert gc.get_freeze_count() > 1000
assert not any(isinstance(item, Node) for item in gc.get_objects())  # it no longer looks at them
del lost
assert gc.collect() == 0  # not even at what is lost since
again = Node()
again.itself = again
del again
assert gc.collect() > 0  # but at all that is new
"""


def test_only_what_is_new_is_collected() -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True)  # it is for ever: not in this process

"""The store of a process group: parts of it are opened with a client of their own, at once also where the store has gone."""

from tests.processes import run_python

PREPARED = """
import os, threading, time
from datetime import timedelta
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from dct_compile.groups import store_of_life
server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=15))
dist.init_process_group("gloo", store=client, rank=0, world_size=1)
_, first = store_of_life(dist.group.WORLD, "test")
"""
BUSY = f"""{PREPARED}
waiting = threading.Thread(target=client.wait, args=(["never"], timedelta(seconds=60)), daemon=True)
waiting.start()
time.sleep(0.2)
_, second = store_of_life(dist.group.WORLD, "test")
print(first, second, waiting.is_alive(), flush=True)
os._exit(0)  # a thread that waits in a store would abort the end of the interpreter
"""
GONE = f"""{PREPARED}
del server
started = time.monotonic()
try:
    store_of_life(dist.group.WORLD, "test")
except RuntimeError as error:
    print(time.monotonic() - started < 10, error)
"""


def test_a_thread_that_waits_in_the_store_does_not_hold_up_others() -> None:
    assert run_python(BUSY).stdout == "1 2 True\n"


def test_a_store_that_has_gone_is_an_error_at_once() -> None:
    assert run_python(GONE).stdout.startswith("True the store in which ranks meet has gone: the process that holds it has ended")

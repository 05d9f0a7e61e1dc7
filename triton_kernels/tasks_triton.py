"""Order between the programs of one launch: they take numbered tasks and wait for none but tasks with lower numbers.

A task with a lower number is held by a program that runs already, and what that one waits for is lower still: all of them end, in
whatever order the device starts programs and however few of them it runs at a time.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl


@jit
def take_task(ticket_ptr):  # type: ignore[no-untyped-def]
    """Returns the number of this program's next task; ``ticket_ptr``: an integer, zero before the launch."""
    return tl.atomic_add(ticket_ptr, 1, sem="relaxed")


@jit
def finish_task(finished_ptr):  # type: ignore[no-untyped-def]
    """Shows all that this program wrote to those that see its arrival; returns how many arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(finished_ptr, 1, sem="acq_rel")


@jit
def wait_for(finished_ptr, tasks):  # type: ignore[no-untyped-def]
    """Returns when so many tasks have arrived: what they wrote can be read."""
    while tl.atomic_add(finished_ptr, 0, sem="acquire") < tasks:
        pass

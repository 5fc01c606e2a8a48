# ruff: noqa: PT012  (a block that is left in the middle is the point)
"""Threads that write: errors come out, and nobody works for those who have left."""

import threading

import pytest

from gigavim.store.crew import Crew


def fail():
    raise OSError(28, "No space left on device")


def test_errors_come_out_at_the_next_look_or_at_the_end():
    with pytest.raises(OSError, match="space"), Crew(1) as crew:
        crew.later(fail)
    with Crew(1) as crew:
        crew.later(fail)
        with pytest.raises(OSError, match="space"):
            crew.wait()
        crew.later(int)
        crew.check()


def test_who_leaves_by_an_error_abandons_what_was_not_begun():
    done, begun, left = [], threading.Event(), threading.Event()

    def lead(outer):
        with Crew(1, within=outer) as inner:
            inner.later(begun.set)
            inner.later(left.wait, 10)
            for number in range(100):
                inner.later(done.append, number)
            inner.wait()

    with pytest.raises(KeyboardInterrupt), Crew(1) as outer:
        outer.later(lead, outer)
        assert begun.wait(10)
        threading.Timer(0.2, left.set).start()  # after the block has ended
        raise KeyboardInterrupt
    assert not done

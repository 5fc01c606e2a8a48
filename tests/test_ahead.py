"""Results come in order, few ahead of who takes them, and nothing goes on after an error."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from gigavim.ahead import in_order


def test_results_come_in_order_and_few_ahead():
    begun = []

    def task(number):
        begun.append(number)
        return number

    with ThreadPoolExecutor(2) as pool:
        found = in_order(pool, (partial(task, n) for n in range(50)), depth=3)
        first = [next(found) for _ in range(5)]
        assert max(begun) < 5 + 3
        assert first + list(found) == list(range(50))


def test_an_error_comes_out_at_its_place():
    def task(number):
        if number == 3:
            raise ValueError("the fourth")
        return number

    with ThreadPoolExecutor(2) as pool:
        found = in_order(pool, (partial(task, n) for n in range(9)), depth=4)
        assert [next(found) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the fourth"):
            next(found)

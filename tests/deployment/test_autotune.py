"""What was fastest for how many rows of x, without a device: the clock there is a stand-in."""

from itertools import islice

import pytest
import torch

from secateur.deployment import autotune
from secateur.deployment.autotune import choice_for, fastest_by_rows
from secateur.system.clock import best_seconds, spread, turns


def test_rows_use_the_next_larger_class_or_the_last():
    chosen = [choice_for("abc", (1, 4, 16), rows) for rows in (1, 2, 4, 5, 16, 99)]
    assert chosen == ["a", "b", "b", "c", "c", "c"]


def test_each_class_gets_its_own_rows_and_choice(monkeypatch):
    seen = []
    monkeypatch.setattr(autotune, "fastest", lambda works, device: min(works, key=lambda name: works[name]()))

    def products(x):
        seen.append(tuple(x.shape))
        return {"dense": lambda: 4, "packed": lambda: len(x)}

    assert fastest_by_rows((1, 4, 8), torch.ones(3, 5).bfloat16(), products) == ("packed", "dense", "dense")
    assert seen == [(1, 5), (4, 5), (8, 5)]


def test_every_work_takes_its_turn_in_every_round():
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    rounds = list(islice(turns(works), 3))
    assert calls == ["a", "b"] * 3
    assert all(seconds["a"] >= 0 and seconds.keys() == {"a", "b"} for seconds in rounds)


def test_the_best_of_at_least_two_and_the_spread():
    calls: list[int] = []
    assert best_seconds(lambda: calls.append(1), seconds=0.0) >= 0
    assert len(calls) == 2
    assert spread([float(i) for i in range(101)]) == pytest.approx((10, 50, 90))

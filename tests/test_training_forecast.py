"""The levers that `gpt2lite plan --train --fit` names: the cheapest that fit, found whenever any do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import chain, combinations

from gpt2lite import GPTConfig, GPTModel, Recipe, TrainingForecast, forecast_training
from gpt2lite.finetuning.forecast import LEVERS, WORKSPACE, find_levers

CONFIG = GPTConfig(500, 32, 64, 4, 2, tied_head=True)
ASKED = Recipe(batch_size=8, accumulate=2, chunked_loss=False)


@cache
def predict(recipe: Recipe) -> TrainingForecast:
    return forecast_training(lambda: GPTModel(CONFIG), recipe)


def changed_by(places: tuple[int, ...]) -> Recipe:
    return replace(ASKED, **{key: value for place in places for key, value in LEVERS[place][0].items()})


def test_the_cheapest_levers_that_fit_are_named_whenever_any_do():
    every = range(len(LEVERS))
    subsets = chain.from_iterable(combinations(every, count) for count in range(len(LEVERS) + 1))
    dearest_first = sorted(subsets, key=lambda places: places[::-1])
    peaks = {places: predict(changed_by(places)).peak for places in dearest_first}
    for limit in sorted(set(peaks.values())):
        wanted = next(places for places in dearest_first if peaks[places] <= limit)
        levers, found = find_levers(ASKED, limit, predict)
        assert [cost for _, cost in levers] == [LEVERS[place][1] for place in wanted]
        assert found.peak == peaks[wanted] <= limit
    _, lowest = find_levers(ASKED, min(peaks.values()) - 1, predict)
    assert lowest.peak == min(peaks.values())


def test_a_tied_tables_two_gradients_are_added_in_place_as_autograd_adds_them():
    config = GPTConfig(20000, 8, 64, 2, 1, tied_head=True)
    recipe = Recipe(batch_size=1, autocast=True, chunked_loss=False)
    found = forecast_training(lambda: GPTModel(config), recipe)
    table = 20000 * 64 * 4
    step = found.peak - found.weights - found.optimizer - WORKSPACE
    assert 2 * table < step < 2.25 * table  # a sum of its own would be a third

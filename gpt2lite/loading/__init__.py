"""Checkpoint + module = loaded module: what is planned, chosen, filled and proven."""

from gpt2lite.loading.choice import Verdict, choose, forecasts, helps, judge, load
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.options import LoadOptions, OpenOptions, Options, Progress
from gpt2lite.loading.plan import LoadPlan, make_plan
from gpt2lite.loading.schedule import Tuning
from gpt2lite.loading.strategies import STRATEGIES

__all__ = [
    "STRATEGIES",
    "Forecast",
    "LoadOptions",
    "LoadPlan",
    "OpenOptions",
    "Options",
    "Progress",
    "Tuning",
    "Verdict",
    "choose",
    "forecasts",
    "helps",
    "judge",
    "load",
    "make_plan",
]

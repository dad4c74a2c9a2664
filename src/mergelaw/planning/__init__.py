"""Forecasts and plans from fitted laws: losses, experts, budgets and measurements.

Each question has a module and is asked of a ``Curve``; ``forecast`` extends a few points.
"""

from mergelaw.planning.answer import Answer as Answer
from mergelaw.planning.budget import Costs as Costs
from mergelaw.planning.budget import budget as budget
from mergelaw.planning.curve import Curve as Curve
from mergelaw.planning.experts import experts as experts
from mergelaw.planning.experts import loss as loss
from mergelaw.planning.experts import stop as stop
from mergelaw.planning.forecast import forecast as forecast
from mergelaw.planning.measure import measure as measure
from mergelaw.planning.points import choose as choose
from mergelaw.planning.points import read as read
from mergelaw.planning.rule import rule as rule

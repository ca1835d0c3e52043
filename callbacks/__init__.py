"""Callbacks: where prompts and weights meet. Alternate, and those that record, log and export what it does."""

from cotune.callbacks.alternate import Alternate
from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.callbacks.schedule import parse_schedule

__all__ = ["Alternate", "Boundary", "BoundaryListener", "parse_schedule"]

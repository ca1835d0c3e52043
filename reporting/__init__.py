"""Reporting: a run's records as pages, tables, charts and a model card."""

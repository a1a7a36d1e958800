"""Figures, tables, comparison of runs, HTML."""

"""Faults that are put into jobs on purpose."""

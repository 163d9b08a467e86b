"""Solvers that gates use and that are usable alone: projections, optimal transport, assignment. Pure functions."""

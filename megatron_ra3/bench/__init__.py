"""Benchmarks behind `ra3 bench`: what a part of the system costs, against the plain way of doing the same."""

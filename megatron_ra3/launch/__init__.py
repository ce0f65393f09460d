"""Launching: how a run is laid out on a cluster, whether it fits there, what it will take, and how it is submitted."""

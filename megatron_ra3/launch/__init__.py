"""Where a run goes on a cluster, whether it fits there, and what it will take."""

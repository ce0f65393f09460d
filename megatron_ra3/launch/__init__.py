"""Launching: plan, submit."""

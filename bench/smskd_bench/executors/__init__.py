"""Executors run a plan: what is missing, in dependency order."""

"""The file that runs on devices, and where it lies on this machine."""

from pathlib import Path

RUNNER = Path(__file__).with_name("run.py")
"""Copied into every bundle."""

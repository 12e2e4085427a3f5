"""Berth: GPU placement for Ray Serve, planned, enforced and proved."""

__version__ = "0.1.0"

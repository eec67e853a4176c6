"""Luffy: Mixture-of-Experts training across links slower than they should be."""

from luffy.version import __version__

__all__ = ["__version__"]

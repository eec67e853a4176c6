"""Seats: which rank, and which micro-batch, computes a sequence of an optimizer step, decided before the first layer.

* `topics`      what sequences are about, fitted and assigned
"""

"""Ropeway: an HTTP inference server for language models whose batch never stops.

The three floors are `ropeway.server` (HTTP and text, no torch), `ropeway.scheduler` (requests and policy, no HTTP)
and `ropeway.kernels` (tensors, no text). Imports only go down.
"""

__version__ = "0.1.0"

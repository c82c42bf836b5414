"""Whole datasets through a running server: read in shards, run and written as a Ray Data job that can be killed at any time.

`job.py` is the only module here that imports Ray."""

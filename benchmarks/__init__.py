"""Benchmarks: each a command that measures, writes its figures as JSON, and a page made from them."""

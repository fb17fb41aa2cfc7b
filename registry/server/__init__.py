"""The registry over HTTP: a JSON API, read-only but for aliases and tags, and a page to look at.

Apart from `registry` itself, so that whoever only looks things up in Python does not import FastAPI.
"""

from registry.server.app import create_app
from registry.server.links import Links

__all__ = ["Links", "create_app"]

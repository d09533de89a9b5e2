"""The HTTP server: an ASGI application that serves what a scheduler holds; needs the extra `server`.

The application decides nothing: each request becomes an `acquire`, and its client sees what the scheduler says.
"""

from scheduler.http.app import create_app

__all__ = ["create_app"]

"""The HTTP server: an ASGI application that serves what a scheduler holds; needs the extra `server`.

The application decides nothing: each request becomes an `acquire`, and its client sees what the scheduler says.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.http.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> object:
    """Import what is public when it is used: the settings beside it need no server."""
    if name in __all__:
        from scheduler.http import app

        return getattr(app, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

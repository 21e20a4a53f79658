"""The dashboard at `/`: pages for people, rendered here, without a request to anywhere else.

session     who looks: an API key in a cookie
log_in      where it is asked for
answer      a page's way: viewer → one snapshot of the database → template; what an error looks like
pages       jobs, workers, models, usage
job         one job: where it stands, its chunks, its rejects
actions     what a viewer may do to a job
key_pages   keys, for admins
drawing     bars, strips and curves as numbers
words       numbers and times as people say them, and what to do about a code
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from starlette.staticfiles import StaticFiles

from pipeline.api.dashboard import actions, job, key_pages, log_in, pages
from pipeline.api.dashboard.answer import is_for_people, no_page

__all__ = ["add_dashboard", "is_for_people", "no_page"]

_FOLDER = Path(__file__).resolve().parent


class _Static(StaticFiles):
    """Style and scripts; a browser asks each time whether its copy is still good, so that no page meets old ones."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """As Starlette calls it."""
        response = super().file_response(*args, **kwargs)
        response.headers.update({"cache-control": "no-cache", "x-content-type-options": "nosniff"})
        return response


def add_dashboard(app: FastAPI) -> None:
    """Add the dashboard's routes to an application."""
    for part in (log_in, pages, job, actions, key_pages):
        app.include_router(part.router)
    app.mount("/static", _Static(directory=_FOLDER / "static"))

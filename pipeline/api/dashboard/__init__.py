"""Dashboard at `/`: HTML pages for people, rendered on the server, without a request to anywhere else.

session     authentication of viewers: an API key in a cookie
log_in      log-in page and log-out
answer      rendering: viewer → one snapshot of the database → template; error pages
overview    first page: health, throughput, queue, failures, freshness
troubles    what isn't well, each with its remedy
job_list    page of jobs, with its filters
job         pages of one job: status, chunks, rejects
pages       pages of workers, models, usage
collections pages of collections, with their syncs and a search
playground  page that searches a collection, compares two texts, and embeds one
submit_page page that submits a file
actions     actions on a job
key_pages   key management, for admins
drawing     geometry of bars, strips and charts
words       formatting of numbers and times, and advice on reject codes and reasons
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from starlette.staticfiles import StaticFiles

from pipeline.api.dashboard import (
    actions,
    collections,
    job,
    job_list,
    key_pages,
    log_in,
    overview,
    pages,
    playground,
    submit_page,
)
from pipeline.api.dashboard.answer import error_page, is_for_people, no_page

__all__ = ["add_dashboard", "error_page", "is_for_people", "no_page"]

_FOLDER = Path(__file__).resolve().parent


class _Static(StaticFiles):
    """Style sheets and scripts. Browsers revalidate their cached copies each time, so that no page meets old ones."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Return a file's response, with headers for caching and against MIME sniffing."""
        response = super().file_response(*args, **kwargs)
        response.headers.update({"cache-control": "no-cache", "x-content-type-options": "nosniff"})
        return response


def add_dashboard(app: FastAPI) -> None:
    """Add the dashboard's routes to an application."""
    for part in (log_in, overview, job_list, job, pages, collections, playground, submit_page, actions, key_pages):
        app.include_router(part.router)
    app.state.tokens_by_hour = overview.TokensByHour()
    app.mount("/static", _Static(directory=_FOLDER / "static"))

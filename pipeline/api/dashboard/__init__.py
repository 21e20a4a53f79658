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

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from pipeline.api.dashboard import actions, job, key_pages, log_in, pages

_FOLDER = Path(__file__).resolve().parent


def add_dashboard(app: FastAPI) -> None:
    """Add the dashboard's routes to an application."""
    for part in (log_in, pages, job, actions, key_pages):
        app.include_router(part.router)
    app.mount("/static", StaticFiles(directory=_FOLDER / "static"))

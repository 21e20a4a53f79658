"""Database errors as the command line reports them."""

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from pipeline.core.errors import ServiceUnreachable, UserError
from pipeline.db.database import reporting_unreachable


@pytest.mark.parametrize(
    ("cause", "kind", "sentence"),
    [
        (
            psycopg.errors.DiskFull("in /data/base/1"),
            ServiceUnreachable,
            "the database is out of disk, memory or connections (DiskFull)",
        ),
        (psycopg.errors.AdminShutdown("bye"), ServiceUnreachable, "can't reach the database"),
        (psycopg.errors.UndefinedTable("jobs"), UserError, "run: vectormill migrate"),
    ],
)
def test_errors_that_a_person_can_mend(cause: psycopg.Error, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as told, reporting_unreachable():
        raise DBAPIError.instance("statement", None, cause, psycopg.Error)
    assert sentence in str(told.value)
    assert "/data" not in str(told.value)


def test_other_errors_go_on() -> None:
    with pytest.raises(DBAPIError), reporting_unreachable():
        raise DBAPIError.instance("statement", None, psycopg.errors.CheckViolation("no"), psycopg.Error)

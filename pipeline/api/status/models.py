"""Catalogue of models at `/api/models`."""

from datetime import date, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from pipeline.api.dependencies import SECURITY, Workspace, ask, caller_of, problems, scope_of
from pipeline.db import models

router = APIRouter(prefix="/api", responses=problems(400, 404), tags=["Fleet"])


class ModelRate(BaseModel):
    """Measured rate of a model on one slot."""

    device: str = Field(description="Kind of the device: cpu, mps, or a GPU's name.")
    precision: str
    tokens_per_second: float
    measured_at: datetime


class CatalogueModel(BaseModel):
    """Model of the catalogue that your workspace may use; with an admin's key, any model."""

    name: str
    kind: str = Field(description="local or gateway.")
    aliases: list[str]
    dimensions: int
    matryoshka: list[int] = Field(description="Sizes to which its vectors may be shortened.")
    max_item_tokens: int | None
    tokens_per_second: float = Field(description="Of one slot, as measured when it was added; an upstream's, lately.")
    rates: list[ModelRate] = Field(description="Rates of a local model, measured while it worked; the fastest first.")
    price_per_million: float | None
    added_at: datetime
    deprecated_at: date | None = Field(description="When to have left it; null: it isn't deprecated.")
    replaced_by: str | None = Field(description="The model to use instead.")


class Catalogue(BaseModel):
    """Models by name."""

    data: list[CatalogueModel]


@router.get("/models", openapi_extra=SECURITY)
async def list_catalogue(request: Request, workspace: Workspace = None) -> Catalogue:
    """List the models that your workspace may use; an admin's key sees the whole catalogue."""
    caller = await caller_of(request)

    def act(connection: Connection) -> list[Any]:
        scope = scope_of(connection, caller, workspace)
        return models.listed(connection, scope)

    return Catalogue(data=[CatalogueModel(**row) for row in await ask(request, act)])

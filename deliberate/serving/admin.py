"""`/admin`: versions are proposed, promoted and rolled back, by this machine or with a key."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from deliberate.lifecycle.version import Version
from deliberate.serving.errors import ApiError
from deliberate.serving.life_cycle import LifeCycle
from deliberate.utils.errors import DeliberateError

Reason = Annotated[str, Field(min_length=1, max_length=500)]


class Why(BaseModel):
    """Why something is done; recorded."""

    model_config = ConfigDict(extra="forbid")
    reason: Reason = "by hand"


class CanaryShare(Why):
    """Of requests that the candidate gets; the control gets as many."""

    share: Annotated[float, Field(gt=0, le=0.5)] = 0.1


class Proposal(Why):
    """What of the live version is to change; fields as of `deliberate.lifecycle.version.Source`."""

    model: str | None = None
    calibration: str | None = None
    fidelity: str | None = None
    thresholds: list[float | None] | None = None
    weights: str | None = None


def add_admin(app: FastAPI, life_cycle: LifeCycle | None) -> None:
    """Adds the routes; without a registry they are answered with how to get one."""

    def needed() -> LifeCycle:
        if life_cycle is None:
            raise ApiError(400, "this server has one version: start it with --registry FOLDER")
        return life_cycle

    @app.get("/admin/versions", include_in_schema=False)
    async def versions() -> dict[str, Any]:
        """What there is, and what happened to it."""
        return await needed().describe()

    @app.post("/admin/versions", include_in_schema=False)
    async def propose(body: Proposal, request: Request) -> dict[str, Any]:
        """Records a version."""
        changes = body.model_dump(exclude={"reason"}, exclude_unset=True)
        return await _done(needed().propose(changes, reason=body.reason, who=_who(request)))

    @app.post("/admin/versions/{number}/promote", include_in_schema=False)
    async def promote(number: int, body: Why, request: Request) -> dict[str, Any]:
        """Makes a version the live one."""
        return await _done(needed().promote(number, reason=body.reason, who=_who(request)))

    @app.post("/admin/versions/{number}/canary", include_in_schema=False)
    async def canary(number: int, body: CanaryShare, request: Request) -> dict[str, Any]:
        """Gives a version a share of the traffic."""
        who = _who(request)
        return await _done(needed().start_canary(number, body.share, reason=body.reason, who=who))

    @app.post("/admin/roll-back", include_in_schema=False)
    async def roll_back(body: Why, request: Request) -> dict[str, Any]:
        """Returns to the version before."""
        return await _done(needed().roll_back(reason=body.reason, who=_who(request)))


def _who(request: Request) -> str:
    return f"admin at {request.client.host if request.client else 'unknown'}"


async def _done(work: Awaitable[Version]) -> dict[str, Any]:
    try:
        return (await work).to_dict()
    except DeliberateError as error:
        raise ApiError(400, str(error)) from None

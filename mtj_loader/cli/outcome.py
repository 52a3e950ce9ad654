"""What came of a load, as JSON types."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtj_loader.loading.load_report import LoadReport
    from mtj_loader.planning.load_plan import LoadPlan


def to_dict(plan: LoadPlan, report: LoadReport, verified_bytes: int | None) -> dict[str, object]:
    """A finished load; docs/json.md describes every key."""
    return {
        "location": plan.checkpoint.location,
        "model_type": plan.model_type,
        "mesh": {"dp": plan.topology.dp, "mp": plan.topology.mp},
        "report": report.to_dict(),
        "verified_bytes": verified_bytes,
    }

"""Full depth or exact mode in the place of a certificate's exits, where these would be slower.

Both meet every guarantee. Judged by the machine's cost model where it was measured; the drafts of a
draft layer by the prior that is saved with it, so that no measurement is waited for.
"""

from __future__ import annotations

import math

from deliberate.calibration.certificate import Certificate
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.config import Fidelity
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.policies.member_costs import MemberCosts


def faster_member(
    certificate: Certificate,
    table: PolicyTable,
    costs: MemberCosts | None,
    drafts: DraftPrior | None,
    *,
    margin: float,
) -> tuple[Fidelity | None, str]:
    """The mode that is expected to be faster, None for the certificate's exits; and why, in words.

    Args:
        costs: of the members here; None where the machine's cost model was not measured.
        drafts: of the draft layer of exact mode, where it would draft.
        margin: exact mode counts as so many times its expected time.
    """
    row = table.row(certificate.lambda_)
    if costs is None:
        if drafts is None:
            return None, ""
        # Ratios of the machine that calibrated: where both are of one model, they travel.
        every = table.costs()
        dense, certified, exact = 1.0, every[row] / every[-1], 1.0
    else:
        dense, certified, exact = costs.dense, costs.rows[row], costs.exact
    by_drafts = drafts is not None and dense * drafts.time_ratio < exact
    if drafts is not None:
        exact = min(exact, dense * drafts.time_ratio)
    if margin * exact < min(dense, certified):
        what = "drafts of the draft layer, verified, are" if by_drafts else "exact mode is"
        exits = (
            "its exits never pay"
            if all(math.isinf(one) for one in certificate.thresholds)
            else f"its exits {certified / dense:.2f}"
        )
        return Fidelity.EXACT, (
            f"certified: {what} expected to take {exact / dense:.2f} of full depth's time and "
            f"{exits}: exact mode decodes, which meets the guarantee"
        )
    if costs is not None and dense <= certified:
        return Fidelity.DENSE, "certified: its exits are expected to lose time: full depth decodes"
    return None, ""

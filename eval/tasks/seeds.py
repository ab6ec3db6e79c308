"""Seeds of the sets that are drawn from one grammar, far enough apart to share no range."""

from __future__ import annotations

# `deliberate calibrate` draws its problems from its seed plus this.
CALIBRATION = 2_000_003
DECODE_BENCHMARK = 1_000_003
BUDGET_BENCHMARK = 3_000_003
GATE_BENCHMARK = 4_000_003
LONG_TEXT_BENCHMARK = 5_000_003

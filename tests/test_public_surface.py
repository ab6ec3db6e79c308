"""What users import: a few names from `deliberate`, loaded when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deliberate


def test_the_public_names_are_those_of_their_modules():
    from deliberate import AdaptiveModel, DecodingSpec, Engine, LatencyBudget, Request
    from deliberate.api import model
    from deliberate.engine import engine, request, spec
    from deliberate.policies import budget

    assert AdaptiveModel is model.AdaptiveModel and LatencyBudget is budget.LatencyBudget
    assert DecodingSpec is spec.DecodingSpec
    assert Engine is engine.Engine and Request is request.Request
    assert set(deliberate.__all__) <= set(dir(deliberate))


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'AdaptivModel'"):
        _ = deliberate.AdaptivModel


def test_importing_the_package_does_not_import_torch():
    code = "import sys, deliberate; dir(deliberate); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The same numbers in other layouts, however a call is routed."""

import layouts
import pytest


@pytest.mark.parametrize("check", layouts.CHECKS)
def test_any_layout(check, route):
    check("cpu")

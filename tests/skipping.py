"""A test module that cannot even be imported here, as one skipped test with the reason."""

import pytest


class Skipped(pytest.Module):
    """``reason`` is set after the node is made."""

    def collect(self):
        pytest.skip(self.reason, allow_module_level=True)


def skipped(reason, module_path, parent):
    """For ``pytest_pycollect_makemodule``; without a reason None, which leaves the module to pytest."""
    if not reason:
        return None
    module = Skipped.from_parent(parent, path=module_path)
    module.reason = reason
    return module

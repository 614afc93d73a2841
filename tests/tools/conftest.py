"""What the tests of machine code need."""

from __future__ import annotations

import pytest
from tools.sass.code import SassError
from tools.sass.compiler import tool


@pytest.fixture(scope="session")
def tools():
    try:
        for name in ("nvcc", "nvdisasm", "cuobjdump", "c++filt"):
            tool(name)
    except SassError as error:
        pytest.skip(str(error))

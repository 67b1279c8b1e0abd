import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kit() -> Path:
    "The folder of real images that PCRL_DATA names; without it the test is skipped."
    if not os.environ.get("PCRL_DATA"): pytest.skip("PCRL_DATA is not set: this test reads the data kit")
    return Path(os.environ["PCRL_DATA"])

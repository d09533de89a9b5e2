"""For tests of programs that embed the scheduler: a machine of declared models on virtual time.

`scheduler.testing.fixtures` has the same as a fixture of pytest. `EngineConformance` and `check_engine` are for
packages that bring an engine.
"""

from scheduler.testing.engine_conformance import EngineConformance, check_engine
from scheduler.testing.fake_machine import FakeMachine

__all__ = ["EngineConformance", "FakeMachine", "check_engine"]

"""For tests of programs that embed the scheduler: a machine of declared models on virtual time.

`scheduler.testing.fixtures` has the same as a fixture of pytest.
"""

from scheduler.testing.fake_machine import FakeMachine

__all__ = ["FakeMachine"]

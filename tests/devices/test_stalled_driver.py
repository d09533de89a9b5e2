"""A driver whose calls do not return: what is known meanwhile and for how long, and that nothing waits for it."""

from __future__ import annotations

import time

from scheduler.devices import device_reader
from scheduler.devices.device_reader import ANSWER_S, TRUST_S, DeviceReader
from tests.support.nvml import Clock, Gpu, StandIn, beside_stand_in, free_of, gpus_of
from tests.support.waiting import assert_soon

ONE = Gpu("GPU-1", total=1000, free=800)
TWO = Gpu("GPU-2", total=2000, free=1900)


def stalls(nvml: StandIn, function: str, source: DeviceReader) -> float:
    """Read once, make a function stall, read again; return how many seconds that took."""
    device_reader.ANSWER_S = 0.6
    nvml.say(ONE, TWO)
    assert free_of(source) == {"GPU-1": 800, "GPU-2": 1900}
    nvml.say(ONE.but(free=1), stall=function)
    began = time.monotonic()
    gpus = gpus_of(source)
    took_s = time.monotonic() - began
    assert [(gpu.free_bytes, gpu.fresh) for gpu in gpus.values()] == [(800, False), (1900, False)]
    return took_s


@beside_stand_in()
def test_d15_a_call_that_stalls_is_waited_for_once(nvml: StandIn) -> None:
    """D15: a call that stalls is waited for once, and until it returns the last figures hold."""
    for function in ("nvmlDeviceGetCount_v2", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetComputeRunningProcesses_v3"):
        source = DeviceReader()
        assert 0.5 < stalls(nvml, function, source) < 6.0
        device_reader.ANSWER_S = 60.0
        began = time.monotonic()
        gpus_of(source)
        assert time.monotonic() - began < 6.0, "the driver was waited for again"
        assert source.gpu_processes() == {}, "old figures of processes were returned"
        nvml.say(ONE.but(free=5))
        assert_soon(lambda source=source: free_of(source) == {"GPU-1": 5})
        assert all(gpu.fresh for gpu in gpus_of(source).values())
        assert source.problems == ()
        source.close()


@beside_stand_in()
def test_a_stalled_driver_is_named_and_not_used_before_long(nvml: StandIn) -> None:
    """A stalled driver is reported, and its GPUs are used for a while only, because a program on them may never end."""
    clock = Clock()
    source = DeviceReader(clock=clock)
    stalls(nvml, "nvmlDeviceGetMemoryInfo_v2", source)
    clock.now += TRUST_S - 1
    assert list(gpus_of(source)) == ["GPU-1", "GPU-2"]
    assert source.problems == ("the GPUs' driver has not answered for 29 s: their figures are from before",)
    clock.now += 1
    assert list(gpus_of(source)) == []
    assert source.problems == ("the GPUs' driver has not answered for 30 s: they are not used until it does",)
    nvml.say(TWO)
    assert_soon(lambda: list(gpus_of(source)) == ["GPU-2"])
    assert source.problems == ()


@beside_stand_in()
def test_a_driver_that_stalls_from_the_start_leaves_the_host(nvml: StandIn) -> None:
    """A driver that stalls from the start leaves the host, and its GPUs are found when it returns."""
    device_reader.FIRST_ANSWER_S = 0.3
    nvml.say(ONE, stall="nvmlInitWithFlags")
    source = DeviceReader(clock=(clock := Clock()))
    assert gpus_of(source) == {}
    clock.now += ANSWER_S
    assert len(source.problems) == 1
    nvml.say(ONE)
    assert_soon(lambda: free_of(source) == {"GPU-1": 800})


@beside_stand_in()
def test_d17_closing_does_not_wait_for_a_stalled_driver(nvml: StandIn) -> None:
    """D17: a close does not wait for a stalled driver, whose thread ends when the driver returns."""
    for function in ("nvmlDeviceGetMemoryInfo_v2", "nvmlShutdown"):
        source = DeviceReader()
        if function == "nvmlShutdown":
            nvml.say(ONE)
            gpus_of(source)
            nvml.say(ONE, stall=function)
        else:
            stalls(nvml, function, source)
        began = time.monotonic()
        source.close()
        assert time.monotonic() - began < 10.0
        asking = source._asking
        assert asking is not None and asking.is_alive() and asking.daemon
        nvml.say(ONE)
        assert_soon(lambda asking=asking: not asking.is_alive())
        assert source._driver is not None and not source._driver._nvml._initialised

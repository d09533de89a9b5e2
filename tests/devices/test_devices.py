"""Devices: the host, and GPUs through the real binding and a stand-in for NVIDIA's library."""

from __future__ import annotations

import psutil
import pytest

from fsm.domain.devices import HOST, DeviceSample
from scheduler.devices.device_reader import DeviceReader
from scheduler.devices.nvml import RETRY_S, Board, has_card, visible_devices
from tests.support.nvml import (
    LOST,
    MISMATCH,
    NO_DRIVER,
    NO_PERMISSION,
    NOT_SUPPORTED,
    Clock,
    Gpu,
    StandIn,
    beside_stand_in,
    free_of,
    gpus_of,
)

ONE = Gpu("GPU-1", total=1000, reserved=50, free=800, processes={77: 150})
TWO = Gpu("GPU-2", total=2000, reserved=100)
DIVIDED = Gpu("GPU-3", instances=[Gpu("MIG-31", total=300, free=100, processes={88: 200}), Gpu("MIG-32", total=500)])


# -- the host ---------------------------------------------------------------------------------------------------------


def test_the_host_is_always_there() -> None:
    """Without GPUs the host is the only device, with no more than the machine's memory."""
    (host,) = DeviceReader(gpus=False).sample()
    assert (host.id, host.kind, host.integrated, host.fresh) == (HOST, "cpu", False, True)
    assert 0 < host.free_bytes <= host.capacity_bytes <= psutil.virtual_memory().total


def test_the_memory_limit_caps_the_hosts_capacity_only() -> None:
    """The memory limit caps the host's capacity, and the reported free memory is the machine's."""
    (host,) = DeviceReader(gpus=False, memory_limit_bytes=1 << 20).sample()
    assert (host.capacity_bytes, host.free_bytes > 1 << 20) == (1 << 20, True)


def test_a_memory_limit_above_the_machines_memory_changes_nothing() -> None:
    """A memory limit above the machine's memory changes nothing."""
    (host,) = DeviceReader(gpus=False, memory_limit_bytes=1 << 60).sample()
    assert host.capacity_bytes <= psutil.virtual_memory().total


def test_a_memory_limit_that_is_changed_shows_in_the_next_sample() -> None:
    """A changed memory limit is in the next sample, and None removes it."""
    source = DeviceReader(gpus=False)
    (unlimited,) = source.sample()
    source.set_memory_limit(1 << 20)
    assert source.sample()[0].capacity_bytes == 1 << 20
    source.set_memory_limit(None)
    assert source.sample()[0].capacity_bytes == unlimited.capacity_bytes


# -- which GPUs there are ---------------------------------------------------------------------------------------------

BOARDS = [Board("GPU-aa1"), Board("GPU-bb1"), Board("GPU-aa2"), Board("GPU-dd", "", ("MIG-x1", "MIG-x2"))]


@pytest.mark.parametrize(
    ("chosen", "visible"),
    [
        (None, ["GPU-aa1", "GPU-bb1", "GPU-aa2", "MIG-x1", "MIG-x2"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", ["GPU-aa2", "GPU-aa1"]),
        (" 1 , 2 ", ["GPU-bb1", "GPU-aa2"]),
        ("1,1", ["GPU-bb1"]),
        ("0,7,1", ["GPU-aa1"]),
        ("0,-1,1", ["GPU-aa1"]),
        ("0,,1", ["GPU-aa1"]),
        ("GPU-bb", ["GPU-bb1"]),
        ("GPU-aa2,GPU-aa1", ["GPU-aa2", "GPU-aa1"]),
        ("GPU-bb,1,GPU-bb1", ["GPU-bb1"]),
        ("GPU-aa", []),
        ("0,GPU-cc,1", ["GPU-aa1"]),
        ("3", ["MIG-x1"]),
        ("GPU-dd", ["MIG-x1"]),
        ("MIG-x2", ["MIG-x2"]),
        ("MIG-x2,MIG-x1,0", ["MIG-x2", "MIG-x1", "GPU-aa1"]),
        ("MIG-x", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(chosen: str | None, visible: list[str]) -> None:
    """CUDA_VISIBLE_DEVICES is read as CUDA does: indices or unique prefixes of ids, up to the first that is neither."""
    assert visible_devices(BOARDS, chosen) == visible


def test_a_gpu_that_was_lost_before_it_was_known_keeps_its_index() -> None:
    """A GPU that was lost before its id was read keeps its index."""
    assert visible_devices([Board(""), Board("GPU-b")], "0,1") == ["GPU-b"]
    assert visible_devices([Board(""), Board(""), Board("GPU-b")], None) == ["GPU-b"]


@beside_stand_in(CUDA_VISIBLE_DEVICES="GPU-2,0")
def test_gpus_come_in_the_order_of_cuda_visible_devices(nvml: StandIn) -> None:
    """GPUs come in the order of CUDA_VISIBLE_DEVICES, in which `main_gpu` counts."""
    nvml.say(ONE, TWO, DIVIDED)
    assert list(gpus_of(DeviceReader())) == ["GPU-2", "GPU-1"]


@beside_stand_in(CUDA_VISIBLE_DEVICES="GPU-2")
def test_a_hidden_gpu_is_not_asked_about(nvml: StandIn) -> None:
    """A hidden GPU is not read, whatever is wrong with it."""
    nvml.say(ONE.but(memory_code=LOST), TWO)
    source = DeviceReader()
    assert (list(gpus_of(source)), list(source.gpu_processes()), source.problems) == (["GPU-2"], ["GPU-2"], ())


@beside_stand_in(CUDA_VISIBLE_DEVICES="1")
def test_an_index_among_different_gpus_is_said_to_be_ambiguous(nvml: StandIn) -> None:
    """An index among different GPUs is reported as ambiguous, because CUDA counts the fastest first."""
    nvml.say(ONE, TWO.but(capability=(8, 0)))
    source = DeviceReader()
    assert list(gpus_of(source)) == ["GPU-2"]
    (problem,) = source.problems
    assert "CUDA_DEVICE_ORDER" in problem


@beside_stand_in(CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
def test_an_index_in_the_order_of_the_bus_is_not_ambiguous(nvml: StandIn) -> None:
    """An index is not ambiguous where CUDA counts in the order of the bus."""
    nvml.say(ONE, TWO.but(capability=(8, 0)))
    source = DeviceReader()
    assert (list(gpus_of(source)), source.problems) == (["GPU-2"], ())


# -- what they have ---------------------------------------------------------------------------------------------------


@beside_stand_in()
def test_gpus_have_their_memory_and_processes(nvml: StandIn) -> None:
    """A GPU's sample has its memory without the driver's reserve, and its processes by id."""
    nvml.say(ONE, TWO)
    source = DeviceReader()
    assert gpus_of(source) == {
        "GPU-1": DeviceSample("GPU-1", "gpu", "Stand-in 9.0", 950, 800),
        "GPU-2": DeviceSample("GPU-2", "gpu", "Stand-in 9.0", 1900, 1900),
    }
    assert (source.gpu_processes(), source.problems) == ({"GPU-1": {77: 150}, "GPU-2": {}}, ())


@beside_stand_in("-DOLD_DRIVER")
def test_an_old_driver_is_asked_in_its_own_way(nvml: StandIn) -> None:
    """An old driver is read with its own functions: the reserve counts as usable, and no GPU is divided."""
    nvml.say(ONE, DIVIDED)
    source = DeviceReader()
    assert gpus_of(source)["GPU-1"] == DeviceSample("GPU-1", "gpu", "Stand-in 9.0", 1000, 800)
    assert (source.gpu_processes()["GPU-1"], source.problems) == ({77: 150}, ())


@beside_stand_in()
def test_every_instance_of_a_divided_gpu_is_a_device(nvml: StandIn) -> None:
    """Every instance of a divided GPU is a device with its own memory and processes, and the GPU itself is none."""
    nvml.say(ONE, DIVIDED)
    source = DeviceReader()
    gpus = gpus_of(source)
    assert {id: (gpu.capacity_bytes, gpu.free_bytes, gpu.instance) for id, gpu in gpus.items()} == {
        "GPU-1": (950, 800, False), "MIG-31": (300, 100, True), "MIG-32": (500, 500, True),
    }  # fmt: skip
    assert source.gpu_processes() == {"GPU-1": {77: 150}, "MIG-31": {88: 200}, "MIG-32": {}}


@beside_stand_in()
def test_a_gpu_that_is_divided_into_nothing_is_left_out(nvml: StandIn) -> None:
    """A GPU in divided mode without instances is left out, because CUDA cannot use it."""
    nvml.say(DIVIDED.but(instances=[]))
    source = DeviceReader()
    assert gpus_of(source) == {}
    assert source.problems == ("GPU GPU-3 is left out: it is to be divided, but into nothing yet",)
    nvml.say(DIVIDED)
    assert list(gpus_of(source)) == ["MIG-31", "MIG-32"]


@beside_stand_in()
def test_memory_that_others_take_and_give_back_is_seen(nvml: StandIn) -> None:
    """Each sample has the memory of other programs at its own moment."""
    source = DeviceReader()
    seen = []
    for free in (800, 100, 750):
        nvml.say(ONE.but(free=free))
        seen.append(free_of(source))
    assert seen == [{"GPU-1": 800}, {"GPU-1": 100}, {"GPU-1": 750}]


@beside_stand_in()
def test_a_reserve_is_taken_off_every_gpu_with_memory_of_its_own(nvml: StandIn) -> None:
    """A reserve is subtracted from capacity and free memory of every GPU with memory of its own."""
    nvml.say(ONE.but(free=100), Gpu("GPU-i", memory_code=NOT_SUPPORTED))
    gpus = gpus_of(DeviceReader(gpu_reserve_bytes=(("", 200),)))
    assert (gpus["GPU-1"].capacity_bytes, gpus["GPU-1"].free_bytes) == (750, -100)
    assert gpus["GPU-i"].integrated


@beside_stand_in()
def test_u13_a_limit_holds_whatever_other_programs_take(nvml: StandIn) -> None:
    """U13: models may take as much under a limit while others use the rest of a GPU, and less with a reserve."""
    seen = []
    for free in (1000, 850):
        nvml.say(Gpu("GPU-1", total=1000, free=free), Gpu("GPU-2", total=1000, free=1000))
        limited = gpus_of(DeviceReader(gpu_limit_bytes=(("GPU-1", 850),)))
        reserved = gpus_of(DeviceReader(gpu_reserve_bytes=(("GPU-1", 150),)))
        seen.append([min(gpu.capacity_bytes, gpu.free_bytes) for gpu in (limited["GPU-1"], reserved["GPU-1"])])
        assert limited["GPU-2"].capacity_bytes == reserved["GPU-2"].capacity_bytes == 1000
    assert seen == [[850, 850], [850, 700]]


@beside_stand_in()
def test_processes_that_may_not_be_seen_are_missing_and_named(nvml: StandIn) -> None:
    """Without permission to see processes the memory is known, and the problem is reported."""
    nvml.say(ONE.but(processes_code=NO_PERMISSION), TWO.but(processes={5: 10, 6: -1}))
    source = DeviceReader()
    assert list(gpus_of(source)) == ["GPU-1", "GPU-2"]
    assert source.gpu_processes() == {"GPU-2": {5: 10}}
    assert source.problems == (
        "GPU GPU-1 does not report what each process holds, so the reserved bytes count: Insufficient Permissions",
    )


# -- integrated GPUs --------------------------------------------------------------------------------------------------


@beside_stand_in()
def test_s27_a_gpu_without_memory_of_its_own_is_integrated(nvml: StandIn) -> None:
    """S27, N03: a GPU whose driver refuses to tell its memory, tells none or tells the host's is integrated."""
    orin, gb10 = Gpu("GPU-o", memory_code=NOT_SUPPORTED, capability=(8, 7)), Gpu("GPU-g", 1 << 36, capability=(12, 1))
    nvml.say(orin, gb10, TWO)
    source = DeviceReader()
    host, *gpus = source.sample()
    assert [gpu.integrated for gpu in gpus] == [True, True, False]
    assert [gpu.memory for gpu in gpus] == [HOST, HOST, "GPU-2"]
    for gpu in gpus[:2]:
        assert (gpu.capacity_bytes, gpu.free_bytes) == (host.capacity_bytes, host.free_bytes)
    assert source.problems == ()


@beside_stand_in()
def test_a_gpu_that_does_not_tell_its_memory_shares_the_hosts(nvml: StandIn) -> None:
    """A GPU of unknown kind without memory figures shares the host's memory, which is reported as a guess."""
    nvml.say(ONE.but(memory_code=NOT_SUPPORTED), TWO.but(total=0, reserved=0))
    source = DeviceReader()
    assert [gpu.integrated for gpu in gpus_of(source).values()] == [True, True]
    assert source.problems == tuple(
        f"GPU {id} does not report its memory: it counts as sharing the host's" for id in ("GPU-1", "GPU-2")
    )


@beside_stand_in()
def test_n03_an_integrated_gpu_has_no_more_than_the_host_may_use(nvml: StandIn) -> None:
    """N03: an integrated GPU has no more than the host's limit."""
    nvml.say(Gpu("GPU-i", memory_code=NOT_SUPPORTED))
    host, gpu = DeviceReader(memory_limit_bytes=1 << 20).sample()
    assert (gpu.capacity_bytes, gpu.free_bytes) == (1 << 20, host.free_bytes)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@beside_stand_in()
def test_a_lost_gpu_is_left_out_and_named(nvml: StandIn) -> None:
    """A lost GPU is left out and reported, and the other devices are used."""
    source = DeviceReader()
    nvml.say(ONE, TWO)
    assert list(gpus_of(source)) == ["GPU-1", "GPU-2"]
    nvml.say(ONE.but(memory_code=LOST), TWO)
    assert (list(gpus_of(source)), list(source.gpu_processes())) == (["GPU-2"], ["GPU-2"])
    assert source.problems == ("GPU GPU-1 is left out: GPU is lost",)
    nvml.say(ONE, TWO)
    assert (list(gpus_of(source)), source.problems) == (["GPU-1", "GPU-2"], ())


@beside_stand_in(CUDA_VISIBLE_DEVICES="GPU-1,GPU-2")
def test_a_gpu_that_cannot_be_opened_hides_none_of_those_after_it(nvml: StandIn) -> None:
    """A GPU that cannot be opened hides no later GPU, and is reported by its id if that was read before."""
    source = DeviceReader()
    nvml.say(ONE, TWO)
    gpus_of(source)
    nvml.say(ONE.but(open_code=LOST), TWO)
    assert (list(gpus_of(source)), source.problems) == (["GPU-2"], ("GPU GPU-1 is left out: GPU is lost",))


@beside_stand_in()
def test_a_lost_gpu_that_comes_back_is_found_by_starting_the_driver_again(nvml: StandIn) -> None:
    """A lost GPU is found again by starting the driver's library again, which not every sample does."""
    clock = Clock()
    source = DeviceReader(clock=clock)
    nvml.say(ONE, TWO)
    gpus_of(source)
    nvml.say(ONE.but(open_code=LOST), TWO)
    gpus_of(source)
    nvml.say(ONE, TWO)
    assert list(gpus_of(source)) == ["GPU-2"]
    clock.now += RETRY_S
    assert (list(gpus_of(source)), source.problems) == (["GPU-1", "GPU-2"], ())


@beside_stand_in()
def test_a_driver_is_asked_again_after_a_minute(nvml: StandIn) -> None:
    """A driver is started again after a minute, and not at every sample; a close starts afresh."""
    clock = Clock()
    source = DeviceReader(clock=clock)
    counts = [len(gpus_of(source))]
    assert source.problems == ("no GPU is used: Driver Not Loaded",)
    nvml.say(ONE)
    for _ in range(2):
        clock.now += RETRY_S / 2
        counts.append(len(gpus_of(source)))
    source.close()
    counts.append(len(gpus_of(source)))
    assert counts == [0, 0, 1, 1]


@beside_stand_in()
def test_a_driver_that_does_not_start_leaves_the_host(nvml: StandIn) -> None:
    """A driver that does not start leaves the host, and the reason is reported."""
    for code, words in ((NO_DRIVER, "Driver Not Loaded"), (MISMATCH, "RM has detected an NVML/RM version mismatch.")):
        nvml.say(ONE, init=code)
        source = DeviceReader()
        assert gpus_of(source) == {}
        assert source.problems == (f"no GPU is used: {words}",)


@beside_stand_in("-DANCIENT_DRIVER")
def test_a_library_without_what_is_needed_leaves_the_host(nvml: StandIn) -> None:
    """A library without the functions that are needed leaves the host."""
    nvml.say(ONE)
    source = DeviceReader()
    assert (gpus_of(source), source.problems) == ({}, ("no GPU is used: Function Not Found",))


@beside_stand_in(library="nonsense")
def test_a_library_that_is_none_leaves_the_host(nvml: StandIn) -> None:
    """A file that cannot be loaded as the library leaves the host; it is a problem where there is a card."""
    source = DeviceReader()
    assert (gpus_of(source), len(source.problems)) == ({}, int(has_card()))


@beside_stand_in(library=None)
def test_a_machine_without_the_library_has_no_gpus(nvml: StandIn) -> None:
    """A machine without the library has no GPUs, and no problem unless it has a card."""
    source = DeviceReader()
    assert (gpus_of(source), source.gpu_processes(), len(source.problems)) == ({}, {}, int(has_card()))

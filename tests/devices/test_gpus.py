"""GPUs of several sources: each card counts once, by which name the engine has it, and which ones do not count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.domain.devices import HOST, MIB, DeviceId
from scheduler.devices.amdgpu import LOOK_S, AmdGpus
from scheduler.devices.device_reader import DeviceReader
from scheduler.devices.gpus import LIBRARIES, Gpu, Listed, joined, pci_id, without_list
from scheduler.engines.llama_device_list import entries_of, places_of, with_places
from tests.support.nvml import Clock, StandIn, beside_stand_in
from tests.support.nvml import Gpu as NvmlGpu
from tests.support.recorded_lists import LISTS, PLACES

GIB = 1 << 30
GEFORCE = Gpu(
    DeviceId("GPU-a"), "NVIDIA GeForce RTX 4090", 24 * GIB, 23 * GIB,
    pci="0000:01:00.0", vendor="NVIDIA", cuda_id=True,
)  # fmt: skip
RADEON = Gpu(
    DeviceId("PCI-0000:03:00.0"), "", 16 * GIB, 15 * GIB, pci="0000:03:00.0", vendor="AMD", library="ROCm"
)  # fmt: skip
RADEONS = Listed("Vulkan1", "AMD Radeon RX 7800 XT", 16 * GIB, 16 * GIB)
APU = replace(
    RADEON, id=DeviceId("PCI-0000:c4:00.0"), capacity_bytes=0, free_bytes=0, pci="0000:c4:00.0", integrated=True
)


def listed(name: str, known_places: bool = True) -> tuple[Listed, ...]:
    """Return the entries of a recorded list, with the PCI ids that its machine's engine tells."""
    entries = entries_of(LISTS[name])
    assert entries is not None
    return with_places(entries, places_of(PLACES.get(name, "")) if known_places else {})


def shown(gpus: Sequence[Gpu]) -> list[tuple[str, str, str]]:
    return [(gpu.id, gpu.library, gpu.listed) for gpu in gpus]


# -- lists as engines print them ---------------------------------------------------------------------------------------


def test_lists_of_all_libraries_are_read() -> None:
    """Names, descriptions with brackets, sizes, and which ones are integrated are read; other devices are none."""
    found = {name: [(e.name, e.capacity_bytes // MIB, e.integrated) for e in listed(name)] for name in LISTS}
    assert found == {
        "none": [],
        "cuda": [("CUDA0", 24080, False), ("CUDA1", 24080, False)],
        "cuda+vulkan": [("CUDA0", 24080, False), ("Vulkan0", 24564, False), ("Vulkan1", 31904, True)],
        "rocm": [("ROCm0", 16368, False)],
        "vulkan": [("Vulkan0", 16368, False), ("Vulkan1", 24564, False)],
        "apu": [("Vulkan0", 64000, True)],
        "sycl": [("SYCL0", 15473, False), ("SYCL1", 51166, True)],
        "metal": [("MTL0", 49152, True)],
    }
    assert listed("rocm")[0].description == "AMD Radeon RX 7800 XT (gfx1101)"
    assert entries_of("error while loading shared libraries") is None


def test_places_are_read_from_the_log_of_a_load() -> None:
    """The log of a load tells the PCI id of each device that has one."""
    assert places_of(PLACES["vulkan"]) == {"Vulkan0": "0000:03:00.0", "Vulkan1": "0000:01:00.0"}
    assert [pci_id(text) for text in ("00000000:01:00.0", "0000:0A:00.1", "0000:01:00.0-v1", "unknown id")] == [
        "0000:01:00.0", "0000:0a:00.1", "", "",
    ]  # fmt: skip


# -- which GPUs are one ------------------------------------------------------------------------------------------------


def test_n23_one_card_that_two_libraries_see_is_one_gpu() -> None:
    """N23: a card of NVIDIA's driver, of CUDA and of Vulkan is one, used through CUDA, with the driver's figures."""
    for known_places in (True, False):
        found = joined([GEFORCE], listed("cuda+vulkan", known_places)).gpus
        assert shown(found) == [("GPU-a", "CUDA", "")] and found[0].free_bytes == GEFORCE.free_bytes


def test_n23_a_card_of_two_drivers_and_one_library() -> None:
    """N23: Vulkan alone uses the cards of both drivers; each has its driver's id and live figures."""
    for known_places in (True, False):  # makers and sizes tell them apart as well
        found = joined([GEFORCE, RADEON], listed("vulkan", known_places)).gpus
        assert shown(found) == [("GPU-a", "Vulkan", "Vulkan1"), ("PCI-0000:03:00.0", "Vulkan", "Vulkan0")]
        assert [gpu.free_bytes for gpu in found] == [23 * GIB, 15 * GIB]
        assert found[1].name == "AMD Radeon RX 7800 XT (RADV NAVI32)"


def test_without_drivers_the_list_has_the_figures() -> None:
    """A GPU that only the engine shows has the list's sizes, and an id that stays as it is."""
    (card,) = joined([], listed("sycl")).gpus
    assert (card.id, card.library, card.listed) == ("SYCL0", "SYCL", "SYCL0")
    assert (card.capacity_bytes, card.free_bytes) == (15473 * MIB, 15000 * MIB)
    (stale,) = joined([], listed("rocm"), fresh=False).gpus
    assert (stale.id, stale.fresh) == ("PCI-0000:03:00.0", False)


def test_what_may_be_one_of_two_cards_is_left_out() -> None:
    """Of two cards that are alike, and without PCI ids, neither is used, and the problems say why."""
    twin = replace(GEFORCE, id=DeviceId("GPU-b"), pci="0000:02:00.0")
    entry = Listed("Vulkan0", "NVIDIA GeForce RTX 4090", 24564 * MIB, 24000 * MIB)
    found = joined([GEFORCE, twin], [entry, replace(entry, name="Vulkan1")])
    assert shown(found.gpus) == [("GPU-a", "", ""), ("GPU-b", "", "")]
    assert found.problems[0].startswith("Vulkan0 (NVIDIA GeForce RTX 4090) is not used: it may be any of GPU-a, GPU-b")
    placed = [replace(entry, pci=twin.pci), replace(entry, name="Vulkan1", pci=GEFORCE.pci)]
    assert shown(joined([GEFORCE, twin], placed).gpus) == [
        ("GPU-a", "Vulkan", "Vulkan1"), ("GPU-b", "Vulkan", "Vulkan0"),
    ]  # fmt: skip


def test_a_hidden_gpu_is_not_used_through_another_library() -> None:
    """What CUDA_VISIBLE_DEVICES hides, or what is lost, is not used through Vulkan, nor by an old list of CUDA's."""
    entry = Listed("Vulkan0", "NVIDIA GeForce RTX 4090", 24564 * MIB, 24000 * MIB)
    for each in (entry, replace(entry, pci=GEFORCE.pci)):
        assert joined([], [each, Listed("CUDA0", "a card", GIB, GIB), RADEONS], {"NVIDIA"}).gpus[0].vendor == "AMD"
    assert [gpu.id for gpu in joined([], listed("cuda")).gpus] == ["CUDA0", "CUDA1"]  # without NVIDIA's library


def test_an_instance_is_not_the_whole_card() -> None:
    """Vulkan shows a divided card whole: it is used neither in an instance's place nor beside it."""
    instance = replace(GEFORCE, id=DeviceId("MIG-1"), capacity_bytes=GIB, instance=True)
    entry = Listed("Vulkan0", "NVIDIA A100", 80 * GIB, 80 * GIB, pci=GEFORCE.pci)
    for each in (entry, replace(entry, pci="")):
        assert shown(joined([instance], [each]).gpus) == [("MIG-1", "", "")]


def test_n23_integrated_gpus_count_where_their_library_does_well() -> None:
    """N23: an integrated GPU counts through Metal or ROCm, and through Vulkan or SYCL only where that is wanted."""
    metal = joined([], listed("metal")).gpus[0]
    assert (metal.capacity_bytes, metal.reach_bytes) == (0, 49152 * MIB)
    rocm = Listed("ROCm0", "AMD Radeon 8060S", 64000 * MIB, 60000 * MIB)
    assert shown(joined([APU], [rocm]).gpus) == [("PCI-0000:c4:00.0", "ROCm", "ROCm0")]
    left_out = joined([APU], listed("apu"))
    assert left_out.gpus == () and "to use it nevertheless, set integrated_gpus" in left_out.problems[0]
    assert shown(joined([APU], listed("apu"), integrated=True).gpus) == [("PCI-0000:c4:00.0", "Vulkan", "Vulkan0")]
    assert without_list([GEFORCE, RADEON, APU]) == (GEFORCE, RADEON)


MAKERS = {"NVIDIA": "NVIDIA card", "AMD": "AMD Radeon", "Intel": "Intel(R) Arc(TM) A770"}


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[Gpu], list[Listed], dict[str, int]]:
    """Draw the GPUs of drivers, a list, and which card each of their names means; PCI ids are told or not.

    A driver shows all cards of its maker, and the list may lack any.
    """
    known, entries, card_of = [], [], {}
    drivers = draw(st.sets(st.sampled_from(["NVIDIA", "AMD"])))
    for card in range(draw(st.integers(0, 4))):
        maker, size = draw(st.sampled_from([*MAKERS])), draw(st.sampled_from([8 * GIB, 16 * GIB]))
        place = f"0000:0{card}:00.0"
        if maker in drivers:
            id = DeviceId(f"GPU-{card}" if maker == "NVIDIA" else f"PCI-{place}")
            told = place if maker == "AMD" or draw(st.booleans()) else ""
            known.append(Gpu(id, "", size, size, pci=told, vendor=maker, cuda_id=maker == "NVIDIA"))
            card_of[id] = card
        for library in draw(
            st.sets(
                st.sampled_from(
                    {"NVIDIA": ["CUDA", "Vulkan"], "AMD": ["ROCm", "Vulkan"]}.get(maker, ["SYCL", "Vulkan"])
                )
            )
        ):
            entry = Listed(f"{library}{card}", MAKERS[maker], size - 200 * MIB, size, told_integrated=False)
            entries.append(replace(entry, pci=place if draw(st.booleans()) else ""))
            card_of[entry.name] = card
    return known, draw(st.permutations(entries)), card_of


@given(machines())
def test_n23_no_card_counts_twice(machine: tuple[list[Gpu], list[Listed], dict[str, int]]) -> None:
    """N23: however much is told of cards, each counts once at most, and a name is that of the very card."""
    known, entries, card_of = machine
    found = joined(known, entries).gpus
    places = {entry.name: entry.pci for entry in entries}
    cards = [card_of[gpu.id] if gpu.id in card_of else card_of[gpu.listed] for gpu in found]
    assert len(cards) == len(set(cards))
    assert {gpu.id for gpu in known} <= {gpu.id for gpu in found}
    for gpu in found:
        assert not gpu.listed or gpu.id not in card_of or card_of[gpu.listed] == card_of[gpu.id]
    if all(gpu.pci for gpu in known) and all(places.values()):
        through_driver = any(gpu.cuda_id for gpu in known)
        due = {card_of[e.name] for e in entries if not (through_driver and e.library == "CUDA")}
        assert due <= {card for card, gpu in zip(cards, found, strict=True) if gpu.library}
    assert all(gpu.library in ("", *LIBRARIES) for gpu in found)


# -- AMD's driver ------------------------------------------------------------------------------------------------------


def a_card(root: Path, place: str, *, number: int = 0, vendor: str = "0x1002", apu: bool = False, **files: int) -> Path:
    """Write the files of a GPU as Linux shows them; return its folder."""
    folder = root / "devices" / place
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "gpu_metrics").write_bytes(bytes([0x90, 0, 2 if apu else 1, 3]) + bytes(140))
    for name, value in files.items():
        (folder / f"mem_info_{name}").write_text(f"{value}\n")
    for name in (f"card{number}", f"card{number}-DP-1"):
        (root / "drm" / name).mkdir(parents=True)
    (root / "drm" / f"card{number}" / "device").symlink_to(folder)
    (root / "drm" / f"card{number}-DP-1" / "device").symlink_to(root / "drm" / f"card{number}")
    return folder


def test_amds_driver_tells_free_memory_live(tmp_path: Path) -> None:
    """A card of AMD's has the id of its place and its memory as it is now, in the order of places."""
    clock = Clock()
    a_card(tmp_path, "0000:43:00.0", number=0, vram_total=8 * GIB, vram_used=0)
    folder = a_card(tmp_path, "0000:03:00.0", number=1, vram_total=16 * GIB, vram_used=GIB, gtt_total=31 * GIB)
    a_card(tmp_path, "0000:00:02.0", number=2, vendor="0x8086")
    gpus = AmdGpus(tmp_path / "drm", clock)
    assert [(gpu.id, gpu.capacity_bytes, gpu.free_bytes) for gpu in gpus.read()] == [
        ("PCI-0000:03:00.0", 16 * GIB, 15 * GIB), ("PCI-0000:43:00.0", 8 * GIB, 8 * GIB),
    ]  # fmt: skip
    (folder / "mem_info_vram_used").write_text(f"{10 * GIB}\n")
    assert gpus.read()[0].free_bytes == 6 * GIB
    (folder / "mem_info_vram_used").unlink()  # the driver resets it
    a_card(tmp_path, "0000:63:00.0", number=3, vram_total=4 * GIB, vram_used=0)
    assert [gpu.pci for gpu in gpus.read()] == ["0000:43:00.0"]
    clock.now += LOOK_S
    assert [gpu.pci for gpu in gpus.read()] == ["0000:43:00.0", "0000:63:00.0"]


@pytest.mark.parametrize(("kept", "own_bytes"), [(GIB // 2, 0), (96 * GIB, 96 * GIB)])
def test_n23_a_gpu_within_a_processor_has_the_hosts_memory_unless_most_is_kept_for_it(
    tmp_path: Path, kept: int, own_bytes: int
) -> None:
    """N23: the metrics tell a GPU within a processor; what firmware keeps for it, if much, is not the host's."""
    a_card(tmp_path, "0000:c4:00.0", apu=True, vram_total=kept, vram_used=0, gtt_total=16 * GIB)
    (gpu,) = AmdGpus(tmp_path / "drm").read()
    assert (gpu.integrated, gpu.capacity_bytes, gpu.free_bytes) == (True, own_bytes, own_bytes)


def test_without_graphics_there_are_no_gpus(tmp_path: Path) -> None:
    """Where the system shows no graphics nothing is found, and nothing raises."""
    assert AmdGpus(tmp_path / "drm").read() == ()


# -- the reader --------------------------------------------------------------------------------------------------------


class TheList:
    """A list that an engine tells."""

    def __init__(self, *entries: Listed) -> None:
        self.entries: tuple[Listed, ...] | None = entries
        self.fresh, self.wanted = True, 0
        self.figures: list[bool] = []

    def want(self) -> None:
        self.wanted += 1

    def read(self, *, figures: bool) -> tuple[tuple[Listed, ...] | None, bool]:
        self.figures.append(figures)
        return self.entries, self.fresh


def test_the_reader_shows_what_only_an_engine_lists() -> None:
    """A sample has these GPUs with their library and figures, which are not fresh where the list is not."""
    reader, told = DeviceReader(), TheList(Listed("SYCL0", "Intel(R) Arc(TM) A770", 16 * GIB, 9 * GIB))
    reader.list_by(told)
    _, card = reader.sample()
    assert (card.id, card.library, card.capacity_bytes, card.free_bytes, card.fresh, card.integrated) == (
        "SYCL0", "SYCL", 16 * GIB, 9 * GIB, True, False,
    )  # fmt: skip
    told.fresh = False
    reader.want_figures()
    assert not reader.sample()[1].fresh and told.wanted == 1
    assert told.figures == [False, True]  # then the figures matter
    told.entries = None
    assert [sample.id for sample in reader.sample()] == [HOST]
    reader.close()


@beside_stand_in()
def test_n23_nvidias_driver_tells_places(nvml: StandIn) -> None:
    """N23: two cards that are alike are told apart by their places, where Vulkan alone can use them; one is hidden."""
    nvml.say(NvmlGpu("GPU-a", total=8 * GIB), NvmlGpu("GPU-b", total=8 * GIB, free=GIB))
    entry = Listed("Vulkan0", "NVIDIA A card", 8 * GIB, 8 * GIB, pci="0000:02:00.0")
    told = TheList(entry, replace(entry, name="Vulkan1", pci="0000:01:00.0"))
    for environment, names in (
        ({}, [("GPU-a", "Vulkan1"), ("GPU-b", "Vulkan0")]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-b"}, [("GPU-b", "Vulkan0")]),
    ):
        reader = DeviceReader(environment=environment)
        reader.list_by(told)
        assert [sample.free_bytes for sample in reader.sample() if sample.id == "GPU-b"] == [GIB]
        assert [(gpu.id, gpu.listed) for gpu in reader.gpus()] == names
        reader.close()


def test_n21_gpus_that_the_engine_can_use_come_first() -> None:
    """N21: an index of a GPU to prefer counts those that the engine can use, in the order of drivers."""
    gpus = joined([GEFORCE, RADEON], listed("rocm")).gpus
    assert shown(gpus) == [("PCI-0000:03:00.0", "ROCm", "ROCm0"), ("GPU-a", "", "")]


def test_metals_working_set_bounds_the_hosts_memory() -> None:
    """Memory that Metal cannot use is no room for models on a machine whose memory is one."""
    reader = DeviceReader()
    reader.list_by(TheList(Listed("MTL0", "Apple M3 Max", 64 * MIB, 64 * MIB)))
    reader.sample()
    host, gpu = reader.sample()
    assert (host.capacity_bytes, gpu.capacity_bytes, gpu.integrated) == (64 * MIB, 64 * MIB, True)
    reader.close()

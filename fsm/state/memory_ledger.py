"""The memory ledger: bytes by device that exist, that are reported as free, and that are reserved for which owner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.domain.record import Record
from fsm.sizing.footprint import Footprint

NO_FOOTPRINT = Footprint()
Owner = tuple[str, int]  # ("runner" or "memory", its id); ids are never used again


@dataclass(slots=True)
class Account(Record):
    """The bytes by device that are reserved for one owner, and that it was measured to occupy."""

    reserved: dict[DeviceId, int]  # predicted, or declared; never raised, lowered once the peak was observed
    resident: dict[DeviceId, int] = field(default_factory=dict)  # as last measured, on devices where that is possible
    peak: dict[DeviceId, int] = field(default_factory=dict)  # the most that was ever measured
    resident_at_last_sample: dict[DeviceId, int] = field(default_factory=dict)  # when free bytes were last read
    mapped_bytes: int = 0  # of the resident bytes on the host: pages of files, which the host counts as free
    loaded: bool = False  # where nothing is measured, a loaded owner occupies its reservation
    peak_observed: bool = False  # a context was filled: wherever it was measured, reserved <= peak + expected_growth
    expected_growth: dict[DeviceId, int] = field(default_factory=dict)  # bytes that a full context does not show
    projected_peak: dict[DeviceId, int] = field(default_factory=dict)  # the most it may take, by its engine's last word
    predicted: Footprint = NO_FOOTPRINT  # by kind, before it was placed; empty for the program's own memory

    def measure(self, amounts: Mapping[DeviceId, int]) -> bool:
        """Enter the bytes that the owner was measured to occupy; return whether they are a new peak on any device."""
        grown = any(self.peak.get(device, 0) < amount for device, amount in amounts.items())
        self.resident |= amounts
        for device, amount in amounts.items():
            self.peak[device] = max(self.peak.get(device, 0), amount)
        self._lower()
        return grown

    def observe_peak(self, expected_growth: Mapping[DeviceId, int]) -> None:
        """Let the measured peak replace the prediction, even where it is less; `expected_growth` stays reserved too."""
        self.peak_observed, self.expected_growth = True, dict(expected_growth)
        self.projected_peak |= {device: peak + expected_growth.get(device, 0) for device, peak in self.peak.items()}
        self._lower()

    @property
    def held(self) -> dict[DeviceId, int]:
        """The bytes that count as taken, by device."""
        return {device: self.held_bytes(device) for device in (*self.reserved, *self.peak)}

    def _lower(self) -> None:
        for device in self.reserved.keys() & self.peak.keys() if self.peak_observed else ():
            most = self.peak[device] + self.expected_growth.get(device, 0)
            self.reserved[device] = min(self.reserved[device], most)

    def occupied_bytes(self, device: DeviceId) -> int:
        """Return the bytes that the owner occupies, as far as is known."""
        return self.resident.get(device, self.reserved.get(device, 0) if self.loaded else 0)

    def count(self, devices: Iterable[DeviceId]) -> None:
        """Note that the free bytes of `devices` have just been read: occupied bytes are no longer among them."""
        held = self.reserved.keys() | self.resident.keys()
        self.resident_at_last_sample |= {device: self.occupied_bytes(device) for device in devices if device in held}

    def held_bytes(self, device: DeviceId) -> int:
        """Return the bytes that count as taken: the larger of reservation and peak, since a process grows."""
        return max(self.reserved.get(device, 0), self.peak.get(device, 0))

    def expected_bytes(self, device: DeviceId) -> int:
        """Return the bytes to reserve for the next runner like this one: the most that it took, or may yet take."""
        return max(self.projected_peak.get(device, self.reserved.get(device, 0)), self.peak.get(device, 0))

    def reserved_not_touched(self, device: DeviceId) -> int:
        """Return the bytes that the device reported as free but are the owner's: reserved and not occupied, or mapped.

        The pages that a runner maps of its file are page cache: the kernel would drop them, and read them again for
        each token.
        """
        counted = self.resident_at_last_sample.get(device, 0)
        cached = min(counted, self.mapped_bytes) if device == HOST else 0
        return max(0, self.held_bytes(device) - counted + cached)


@dataclass(slots=True)
class Ledger(Record):
    """The devices, and the accounts of all owners.

    Invariant: only free memory is reserved, so on every device the sum of all reservations is at most its capacity,
    unless that capacity shrank afterwards.
    """

    devices: dict[DeviceId, DeviceSample] = field(default_factory=dict)
    accounts: dict[Owner, Account] = field(default_factory=dict)
    available_before: dict[DeviceId, int] = field(default_factory=dict)  # of GPUs in total, one reading before
    overcommitted: set[DeviceId] = field(default_factory=set)  # shrunk or gone devices, while they hold too much

    def sample(self, samples: Iterable[DeviceSample]) -> None:
        """Take over a reading of the devices; a device that is missing in it is gone, its reservations stay."""
        gpus = [id for id, sample in self.devices.items() if sample.kind == "gpu"]
        self.available_before = {gpu: self.total_available(gpu) for gpu in gpus}
        devices = {sample.id: sample for sample in samples}
        for id, old in self.devices.items():
            if id not in devices or devices[id].capacity_bytes < old.capacity_bytes:
                self.overcommitted.add(id)
        self.devices = devices
        for account in self.accounts.values():
            account.count(sample.id for sample in devices.values() if sample.fresh)
        capacity = {sample.id: sample.capacity_bytes for sample in devices.values()}
        self.overcommitted = {id for id in self.overcommitted if self.held_bytes(id) > capacity.get(id, 0)}

    def total_available(self, device: DeviceId) -> int:
        """Return the bytes of a device for this scheduler when it was read: free, or occupied by its own runners."""
        own_bytes = sum(account.resident_at_last_sample.get(device, 0) for account in self.accounts.values())
        return self.devices[device].free_bytes + own_bytes

    def by_memory(self, amounts: Iterable[tuple[DeviceId, int]]) -> dict[DeviceId, int]:
        """Return amounts by the memory that they are taken from: an integrated GPU's are the host's."""
        found: dict[DeviceId, int] = {}
        for device, amount in amounts:
            memory = self.devices[device].memory if device in self.devices else device
            found[memory] = found.get(memory, 0) + amount
        return found

    def reserve(
        self, owner: Owner, amounts: Iterable[tuple[DeviceId, int]], predicted: Footprint = NO_FOOTPRINT
    ) -> None:
        """Reserve `amounts` for an owner that has no account yet."""
        assert owner not in self.accounts, f"{owner} holds a reservation already"
        self.accounts[owner] = Account(dict(amounts), predicted=predicted)

    def release(self, owner: Owner) -> None:
        """Close an owner's account."""
        del self.accounts[owner]

    @property
    def capacity(self) -> dict[DeviceId, int]:
        """The bytes of each memory; an integrated GPU has none of its own."""
        return {one.id: one.capacity_bytes for one in self.devices.values() if not one.integrated}

    def held_bytes(self, device: DeviceId) -> int:
        """Return the sum of the bytes that count as taken on a device: reserved, or measured where that is more."""
        return sum(account.held_bytes(device) for account in self.accounts.values())

    def free_bytes(self, device: DeviceId) -> int:
        """Return the bytes that can still be reserved on a device; negative where it is overdrawn.

        min(capacity - held, reported free - untouched): bytes that are reserved for a loading runner and that it does
        not occupy yet are not free, even where other programs hold memory too.
        """
        sample = self.devices[device]
        return min(
            sample.capacity_bytes - self.held_bytes(device), sample.free_bytes - self._reserved_not_touched(device)
        )

    def held_by_others(self, device: DeviceId) -> int:
        """Return the bytes of a device's capacity that other programs hold; 0 where they take none of it."""
        return self.devices[device].capacity_bytes - self.held_bytes(device) - self.free_bytes(device)

    def _reserved_not_touched(self, device: DeviceId) -> int:
        return sum(account.reserved_not_touched(device) for account in self.accounts.values())

    def available_after(self, free: Mapping[DeviceId, int], owners: Iterable[Owner]) -> dict[DeviceId, int]:
        """Return the bytes that would be free where `free` is now, once some owners have freed all they hold."""
        accounts = [self.accounts[owner] for owner in owners]
        return {device: amount + sum(one.held_bytes(device) for one in accounts) for device, amount in free.items()}

    def view(self) -> object:
        """Return a value of all that plans read here: it is equal to another where both lead to the same plans."""
        devices = [
            replace(sample, free_bytes=sample.free_bytes - self._reserved_not_touched(id), fresh=True)
            for id, sample in self.devices.items()
        ]
        return devices, [(account.reserved.copy(), account.peak.copy()) for account in self.accounts.values()]

    def copy(self) -> Ledger:
        """Return an independent copy."""
        twin = super(Ledger, self).copy()
        twin.accounts = {owner: account.copy() for owner, account in self.accounts.items()}
        return twin

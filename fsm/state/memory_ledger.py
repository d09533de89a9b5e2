"""Bytes per device: what there is, what is reported free, what is reserved by whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.domain.record import Record

Owner = tuple[str, int]  # ("runner" or "memory", its id); ids are never used again


@dataclass(slots=True)
class Account(Record):
    """What one owner was promised, and what it was seen to occupy; bytes by device."""

    reserved: dict[DeviceId, int]  # what was predicted, or declared; never raised, lowered when it has settled
    resident: dict[DeviceId, int] = field(default_factory=dict)  # as last measured, on devices where that is possible
    peak: dict[DeviceId, int] = field(default_factory=dict)  # the most that was ever seen
    resident_at_last_sample: dict[DeviceId, int] = field(
        default_factory=dict
    )  # taken when the devices' free bytes were last read
    mapped_bytes: int = 0  # of what is resident on the host: pages of files, which the host counts as free all the same
    loaded: bool = False  # where nothing is measured, what was promised is taken
    peak_observed: bool = False  # it has shown all it needs: wherever it was measured, promised <= peak + to_come
    expected_growth: dict[DeviceId, int] = field(default_factory=dict)  # what it had yet to show when it settled
    projected_peak: dict[DeviceId, int] = field(
        default_factory=dict
    )  # that it may come to take, by what its engine last said

    def measure(self, amounts: Mapping[DeviceId, int]) -> bool:
        """Note what the owner was seen to occupy; return whether it is more than ever before, on any device."""
        grown = any(self.peak.get(device, 0) < amount for device, amount in amounts.items())
        self.resident |= amounts
        for device, amount in amounts.items():
            self.peak[device] = max(self.peak.get(device, 0), amount)
        self._lower()
        return grown

    def observe_peak(self, to_come: Mapping[DeviceId, int]) -> None:
        """What was measured replaces what was predicted, even where it is less; `to_come` is kept free beside it."""
        self.peak_observed, self.expected_growth = True, dict(to_come)
        self.projected_peak |= {device: peak + to_come.get(device, 0) for device, peak in self.peak.items()}
        self._lower()

    def _lower(self) -> None:
        for device in self.reserved.keys() & self.peak.keys() if self.peak_observed else ():
            most = self.peak[device] + self.expected_growth.get(device, 0)
            self.reserved[device] = min(self.reserved[device], most)

    def occupied_bytes(self, device: DeviceId) -> int:
        """Return what the owner occupies, as far as is known."""
        return self.resident.get(device, self.reserved.get(device, 0) if self.loaded else 0)

    def count(self, devices: Iterable[DeviceId]) -> None:
        """Note that the free bytes of `devices` have just been read: what is occupied is no longer among them."""
        held = self.reserved.keys() | self.resident.keys()
        self.resident_at_last_sample |= {device: self.occupied_bytes(device) for device in devices if device in held}

    def held_bytes(self, device: DeviceId) -> int:
        """Return what counts as taken: a process grows until it has settled, so the larger of both."""
        return max(self.reserved.get(device, 0), self.peak.get(device, 0))

    def expected_bytes(self, device: DeviceId) -> int:
        """Return what the next life like this one is to be promised: the most that this one took, or may yet take."""
        return max(self.projected_peak.get(device, self.reserved.get(device, 0)), self.peak.get(device, 0))

    def reserved_not_touched(self, device: DeviceId) -> int:
        """Return what was reported as free when the device was read, but is spoken for: not occupied, or mapped.

        What a runner maps of its file is page cache: the kernel would give it up, to read it again for each token.
        """
        counted = self.resident_at_last_sample.get(device, 0)
        cached = min(counted, self.mapped_bytes) if device == HOST else 0
        return max(0, self.held_bytes(device) - counted + cached)


@dataclass(slots=True)
class Ledger(Record):
    """The accounts of every device.

    Invariant: a promise is made only of what is free, so on every device the promises' sum is at most its capacity,
    unless that capacity shrank afterwards.
    """

    devices: dict[DeviceId, DeviceSample] = field(default_factory=dict)
    accounts: dict[Owner, Account] = field(default_factory=dict)
    overcommitted: set[DeviceId] = field(
        default_factory=set
    )  # lowered, or gone, and until it fits again holding too much

    def sample(self, samples: Iterable[DeviceSample]) -> None:
        """Take over what was read; a device that is no longer read is gone, what is promised on it stays booked."""
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
        """Return what a device had for all of us when it was read: what was free, and what we had taken."""
        return self.devices[device].free_bytes + sum(
            one.resident_at_last_sample.get(device, 0) for one in self.accounts.values()
        )

    def by_memory(self, amounts: Iterable[tuple[DeviceId, int]]) -> dict[DeviceId, int]:
        """Return amounts by the memory that they are taken from: an integrated GPU's are the host's."""
        booked: dict[DeviceId, int] = {}
        for device, amount in amounts:
            memory = self.devices[device].memory if device in self.devices else device
            booked[memory] = booked.get(memory, 0) + amount
        return booked

    def reserve(self, owner: Owner, amounts: Iterable[tuple[DeviceId, int]]) -> None:
        """Promise `amounts` to an owner that has none yet."""
        assert owner not in self.accounts, f"{owner} holds a reservation already"
        self.accounts[owner] = Account(dict(amounts))

    def release(self, owner: Owner) -> None:
        """Close an owner's account."""
        del self.accounts[owner]

    def reserved_bytes(self, device: DeviceId) -> int:
        """Return the promises' sum on a device."""
        return sum(account.reserved.get(device, 0) for account in self.accounts.values())

    def held_bytes(self, device: DeviceId) -> int:
        """Return the sum of what counts as taken on a device: promised, or measured where that is more."""
        return sum(account.held_bytes(device) for account in self.accounts.values())

    def free_bytes(self, device: DeviceId) -> int:
        """Return what can still be promised on a device; negative where it is overdrawn.

        min(capacity - held, reported free - untouched): what a loading runner was promised but does not occupy yet
        is not free, even where strangers hold memory too.
        """
        sample = self.devices[device]
        return min(
            sample.capacity_bytes - self.held_bytes(device), sample.free_bytes - self._reserved_not_touched(device)
        )

    def held_by_others(self, device: DeviceId) -> int:
        """Return what others hold of what a device has for us; 0 where there is enough for all of us."""
        return self.devices[device].capacity_bytes - self.held_bytes(device) - self.free_bytes(device)

    def _reserved_not_touched(self, device: DeviceId) -> int:
        return sum(account.reserved_not_touched(device) for account in self.accounts.values())

    def available_after(self, free: Mapping[DeviceId, int], owners: Iterable[Owner]) -> dict[DeviceId, int]:
        """Return what would be free where `free` is now, once some owners have given back all they hold."""
        accounts = [self.accounts[owner] for owner in owners]
        return {device: amount + sum(one.held_bytes(device) for one in accounts) for device, amount in free.items()}

    def copy(self) -> Ledger:
        """Return an independent copy."""
        twin = super(Ledger, self).copy()
        twin.accounts = {owner: account.copy() for owner, account in self.accounts.items()}
        return twin

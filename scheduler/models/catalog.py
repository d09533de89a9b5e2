"""Models by name: which resolvers are asked, what a name may look like, and no file outside of a root is opened."""

from __future__ import annotations

import difflib
import heapq
import inspect
import os
import stat
import threading
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol

from scheduler.concurrency.clock import Clock, monotonic_clock
from scheduler.errors.exceptions import InvalidModel, InvalidSettings, ModelNotFound, SchedulerError, UnsupportedOption
from scheduler.errors.former_names import warn_of_former_name
from scheduler.models.model_spec import FIRST_PART, MOST_PARTS, ModelSpec

LONGEST_NAME = 512  # characters
CLOSEST = 5  # names that an error suggests, at most
MOST_NAMES = 20_000  # that are compared with an unknown one, and unknown ones that are remembered
MOST_COMPARED = 40  # texts that are compared exactly
PAIR_BITS = 1021
LISTED_S = 5.0  # for so long a list of all names serves for suggestions: unknown names must not keep disks busy

_RESOLVERS = "an object with location, find(name) and names(); a folder of models goes into Settings(models=...)"


class Resolver(Protocol):
    """A place that knows models by name; `Catalog.add` takes any. Several threads may call its methods at once."""

    @property
    def location(self) -> str:
        """Where it looks, for a person to read; empty where it cannot look at all."""

    def find(self, name: str) -> ModelSpec | None:
        """Return the model of that name as it is now, None if there is none here.

        Called again every two seconds or so for a name in use, in the thread that asks: it is to be quick.
        May raise `ModelNotFound`, to suggest other names, and `InvalidModel`. After any other exception the next
        resolver is called, and the error for a name that no resolver knows quotes the exception.
        """

    def names(self) -> Iterable[str]:
        """Return a name for every model here, each one that `find` takes."""


class Catalog:
    """Finds models by name, at each resolver in turn. Safe to use from any thread."""

    def __init__(self, resolvers: Sequence[Resolver] = (), *, clock: Clock = monotonic_clock) -> None:
        self._resolvers = tuple(resolvers)
        for resolver in self._resolvers:
            _warn_of_place(resolver)
        self._clock = clock
        self._lock = threading.Lock()  # one lists all names, for suggestions; others take those that were listed before
        self._names: tuple[str, ...] = ()  # that were listed last
        self._listed = KnownNames()
        self._listed_until = -float("inf")

    @property
    def places(self) -> tuple[str, ...]:
        """Where it looks, in order, for a person to read."""
        return tuple(filter(None, map(location_of, self._resolvers)))

    def add(self, resolver: Resolver) -> None:
        """Ask this one too from now on, before those that are asked already.

        Raises `InvalidSettings` for what is no resolver.
        """
        methods = (getattr(resolver, name, None) for name in ("find", "names"))
        if isinstance(resolver, type) or not all(map(callable, methods)):
            raise InvalidSettings("resolver", resolver, _RESOLVERS)
        _warn_of_place(resolver)
        self._resolvers = (resolver, *self._resolvers)
        self._listed_until = -float("inf")

    def find(self, name: str) -> ModelSpec:
        """Return the model that has this name now.

        Only what lies inside the places it looks in is ever opened, so that the name may come from a stranger. Raises
        `UnsupportedOption` for what is no name, `ModelNotFound`, with where it looked and names like it, and
        `InvalidModel` for what is there but cannot be used.
        """
        check_name(name)
        looked_in: list[str] = []
        suggestions: list[str] = []
        for resolver in self._resolvers:
            try:
                if (spec := found_by(resolver, name)) is not None:
                    return spec
                places: tuple[str, ...] = (location_of(resolver),)
            except ModelNotFound as error:  # not here either, but it has something to say
                places = error.looked_in or (location_of(resolver),)
                suggestions += error.suggestions
            except SchedulerError:
                raise
            except Exception as error:  # it is broken, or may not look: the others are not
                places = (f"{location_of(resolver)}, which failed with {in_words(error)}",)
            looked_in += filter(None, map(str, places))
        suggestions += self._all_names().closest(name)
        raise ModelNotFound(name, tuple(looked_in), tuple(dict.fromkeys(suggestions)))

    def listing(self, unlisted: MutableMapping[str, str] | None = None) -> Iterator[tuple[str, Resolver]]:
        """Yield every name once, with the resolver that is the first to know it; what cannot be named is left out.

        A place that cannot be listed, or not to its end, comes into `unlisted`, with the reason.
        """
        seen: set[str] = set()
        for resolver in self._resolvers:
            try:
                for name in resolver.names():
                    if name not in seen and _why_not(name) is None:
                        seen.add(name)
                        yield name, resolver
            except Exception as error:
                if unlisted is not None:
                    unlisted[location_of(resolver)] = in_words(error)

    def _all_names(self) -> KnownNames:
        with self._lock:  # and not while they are listed: a resolver may ask here for what it is to list
            if self._clock() < self._listed_until:
                return self._listed
            self._listed_until = self._clock() + LISTED_S
        names = tuple(name for name, _ in islice(self.listing(), MOST_NAMES))
        if names != self._names:
            self._names, self._listed = names, KnownNames(names)
        return self._listed


def location_of(resolver: Resolver) -> str:
    """Return where a resolver looks, for a person to read; the name of its kind where it cannot say."""
    for name in ("location", "place"):  # the latter is the former name
        try:
            if (location := getattr(resolver, name)) is not None:
                return str(location)
        except AttributeError:
            continue
        except Exception:
            break
    return type(resolver).__name__


def _warn_of_place(resolver: Resolver) -> None:
    """Warn of a resolver that says where it looks by the former name alone; no property of it is computed."""
    location = inspect.getattr_static(resolver, "location", None)
    inherited = inspect.getattr_static(Resolver, "location")  # by a class that names the protocol as its base
    if (location is None or location is inherited) and inspect.getattr_static(resolver, "place", None) is not None:
        kind = type(resolver).__name__
        warn_of_former_name(f"{kind}.place", f"{kind}.location")


def found_by(resolver: Resolver, name: str) -> ModelSpec | None:
    """Return what a resolver finds; raises what it raises, and TypeError for what is neither a model nor nothing."""
    found: object = resolver.find(name)
    if found is None or isinstance(found, ModelSpec):
        return found
    raise TypeError(f"find() returned this {type(found).__name__}, and no ModelSpec")


def in_words(error: Exception) -> str:
    """Return what a resolver raised, for a person to read."""
    return str(error) if isinstance(error, SchedulerError) else f"{type(error).__name__}: {error}"


class KnownNames:
    """Names that may be suggested; compared in whole, without their tags, and without what comes before.

    Only the texts that have the most pairs of characters in common with an unknown name are compared exactly, and what
    was found for a name is remembered: unknown names may come from strangers, and in any number.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names: dict[str, list[str]] = {}  # by what is compared
        for each in islice(names, MOST_NAMES):
            short = each.rpartition("/")[2]
            for text in {each, each.partition(":")[0], short, short.partition(":")[0]}:
                self._names.setdefault(text.casefold(), []).append(each)
        self._pairs = [(_pairs(text), text) for text in self._names]
        self._found: dict[str, tuple[str, ...]] = {}

    def closest(self, name: str) -> tuple[str, ...]:
        """Return the few names that are likest to one."""
        if (known := self._found.get(name)) is None:
            if len(self._found) >= MOST_NAMES:
                self._found.clear()
            known = self._found[name] = self._closest(name.casefold())
        return known

    def _closest(self, wanted: str) -> tuple[str, ...]:
        pairs, size = _pairs(wanted), len(wanted)
        alike = heapq.nlargest(
            MOST_COMPARED, self._pairs, key=lambda one: (one[0] & pairs).bit_count() / (size + len(one[1]))
        )
        likely = difflib.get_close_matches(wanted, [text for _, text in alike], CLOSEST)
        return tuple(dict.fromkeys(each for text in likely for each in self._names[text]))[:CLOSEST]


def _pairs(text: str) -> int:
    """Return which pairs of neighbouring characters a text has, as bits: much alike for texts that are much alike."""
    bits = 0
    for first, second in pairwise(f" {text} "):
        bits |= 1 << (31 * ord(first) + ord(second)) % PAIR_BITS
    return bits


def is_path(text: str) -> bool:
    """Tell whether a text is the path of a file rather than a name, which is looked up.

    It is if it is absolute, begins with `~`, or has `.` or `..` between separators; or if it contains a separator, or
    ends in .gguf, and there is such a file, seen from the working folder.
    """
    if os.path.isabs(text) or text.startswith("~") or any(part in (".", "..") for part in text.split(os.sep)):
        return True
    return is_like_a_path(text) and os.path.exists(text) and not os.path.isdir(text)


def is_like_a_path(text: str) -> bool:
    """Tell whether a text could be a relative path."""
    return "/" in text or os.sep in text or text.lower().endswith(".gguf")


def check_name(name: str) -> None:
    """Raise `UnsupportedOption` for what cannot be a model's name: empty, an option, not printable, or a way out."""
    if (reason := _why_not(name)) is not None:
        raise UnsupportedOption("model", name[:LONGEST_NAME], reason)


def _why_not(name: str) -> str | None:
    if not name or name.startswith("-"):
        return "it must be a path or a name, and not begin with '-'"
    if len(name) > LONGEST_NAME:
        return f"a name has at most {LONGEST_NAME} characters"
    if not name.isprintable() or "\\" in name:
        return "a name has no control characters and no backslashes"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "a name has no empty parts, and neither '.' nor '..' between slashes"
    return None


def confined(root: Path, path: Path) -> Path | None:
    """Return the real path of a regular file inside `root`, None if there is nothing.

    Raises `InvalidModel` for what leads out of `root`, whether or not there is anything, and for what is no file, and
    PermissionError where it may not be looked for.
    """
    real_root = os.path.realpath(root)
    real = os.path.realpath(path)
    if os.path.commonpath([real_root, real]) != real_root:
        raise InvalidModel(str(path), f"it leads out of {real_root}; only what lies inside has a name")
    try:
        status = os.stat(real)
    except PermissionError:
        raise
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModel(str(path), "it is not a regular file")
    return Path(real)


def confined_model(root: Path, path: Path) -> bool:
    """Tell whether there is a model at `path`; raises `InvalidModel` if any of its parts is not inside `root`."""
    if confined(root, path) is None:
        return False
    if split := FIRST_PART.search(path.name):
        stem, count = path.name[: split.start()], int(split[1])
        for part in range(2, min(count, MOST_PARTS) + 1):  # of more, none is ever read
            if confined(root, path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf")) is None:
                break  # not complete, which is told when it is read
    return True

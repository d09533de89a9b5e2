"""The command `loadmaster serve`: a scheduler and its server, from the first line to the exit status."""

from __future__ import annotations

import errno
import gc
import ipaddress
import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from fsm.machine.request import ModelId
from scheduler.api.scheduler import Scheduler
from scheduler.cli.serve_settings import SERVE_SETTINGS, Refused, ServeSettings, read_settings
from scheduler.config.settings import SETTINGS
from scheduler.errors.exceptions import InvalidSettings, SchedulerError
from scheduler.errors.formatting import one_line
from scheduler.http.settings import SERVER_SETTINGS, ServerArguments
from scheduler.models.catalog import MOST_NAMES, Catalog
from scheduler.models.configured_models import ConfiguredModels
from scheduler.models.model_spec import ModelSpec
from scheduler.models.sources import Folder, default_resolvers
from scheduler.runtime.request_parser import RequestParser

if TYPE_CHECKING:
    from scheduler.http.server import HttpServer, ServerOptions

log = logging.getLogger("loadmaster")

_SILENT_S = 1.0  # a start that takes longer says what it does
_BACKLOG = 2048  # connections that wait to be accepted
_FILES_OF_A_REQUEST = 2  # the connection of the client, and that to the runner
_OTHER_FILES = 2000  # of connections without a request, of runners, and of model files that are read
_GONE_S = 60  # a client that takes nothing for so long, or whose machine answers nothing, is gone
_PROBE_S = 15
_UNPROTECTED = (
    "connections are not encrypted, and other machines reach this one: put a proxy with TLS in front, or name "
    "--tls-cert and --tls-key"
)
_OF_NODES = ("rules", "patience", "sign_of_life", "body_limit", "body_timeout", "dashboard")  # the same on each machine
_Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def run_serve(flags: Mapping[str, Any]) -> int:
    """Serve until a signal ends it; return the exit status: 0, or 1 after a bug.

    Raises `InvalidSettings` and `Refused` where it cannot start.
    """
    settings = read_settings(flags)
    try:
        from scheduler.http.access_log import logging_to_stderr
        from scheduler.http.server import HttpServer, ServerOptions
    except ModuleNotFoundError as error:
        raise Refused(f"the package {error.name} is missing: pip install 'loadmaster[server]'") from None
    own = settings.own
    _allow_files(settings.server.max_connections)
    options = ServerOptions(tls=_tls(settings), root_path=own["root_path"], proxies=own["forwarded_allow_ips"])
    with ExitStack() as stack:
        addresses = _addresses(own["host"], own["port"])
        unprotected = _is_unprotected(settings, addresses)
        sockets = [stack.enter_context(closing(one)) for one in _bound(settings, addresses)]
        stack.enter_context(logging_to_stderr(own["log_format"]))
        if own["ray"] is not None:
            return _run_front(settings, options, sockets, unprotected=unprotected)
        start = stack.enter_context(closing(_Start()))
        start.doing("looking for the models that are named")
        _check_folders(settings)
        others = Catalog(default_resolvers(settings.scheduler.models))
        specs = _checked(settings, others)
        start.doing("reading the devices")
        scheduler = stack.enter_context(Scheduler(settings.scheduler))
        start.doing("looking for all models")
        models = _Models(flags, settings, scheduler, others, specs)
        count = len(settings.commands) + sum(1 for _ in islice(scheduler.catalog.listing(), MOST_NAMES))

        def ready() -> None:
            start.close()
            _say_ready(count, _url(settings, sockets[0]), unprotected=unprotected)

        reload = None if settings.file is None else models.read_again
        arguments = settings.server_arguments()
        server = HttpServer(scheduler, arguments, options, app=models.app, ready=ready, reload=reload)
        return _run(server, sockets)


def _run_front(
    settings: ServeSettings, options: ServerOptions, sockets: list[socket.socket], *, unprotected: bool
) -> int:
    """Serve what the machines of a Ray cluster have; return the exit status. Raises `Refused`."""
    from scheduler.cluster.front import Front
    from scheduler.cluster.node import NodeArguments
    from scheduler.cluster.nodes import Nodes
    from scheduler.http.server import HttpServer

    if settings.models or settings.commands:
        raise Refused(
            "models of the file are of one machine: with --ray, put their files where each machine finds them"
        )
    told = {row.name: getattr(settings.server, row.name) for row in SERVER_SETTINGS if row.name in _OF_NODES}
    nodes = Nodes(settings.own["ray"], NodeArguments(settings.named, cast(ServerArguments, told)))
    front = Front(nodes, settings.scheduler, settings.server)

    def ready() -> None:
        if front.failure is not None:
            server.should_exit = True
            return
        _warn(unprotected)
        log.info("serving %s at %s; Ctrl-C ends it", _counted(len([*nodes]), "node"), _url(settings, sockets[0]))

    server = HttpServer(front, {}, options, app=front, ready=ready)
    status = _run(server, sockets)
    if front.failure is not None:
        raise Refused(str(front.failure))
    return status


def _warn(unprotected: bool) -> None:
    if unprotected:
        log.warning(_UNPROTECTED)


def _say_ready(count: int, url: str, *, unprotected: bool) -> None:
    _warn(unprotected)
    if not count:
        log.warning("no model has a name: put GGUF files into a folder, and name it with --models")
    log.info("serving %s at %s; Ctrl-C ends it", _counted(count), url)


def _allow_files(requests: int) -> None:
    """Raise the limit of open files to what as many requests at once need, as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_OF_A_REQUEST * requests + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _run(server: HttpServer, sockets: list[socket.socket]) -> int:
    """Run a server; return the exit status.

    What is there by now is left out of Python's collections of garbage meanwhile: a full one stops all threads, for
    some 30 ms with all that a server has imported.
    """
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets)
    finally:
        gc.unfreeze()
    return server.exit_status


class _Start:
    """Says what a start does, once the start has taken more than a second."""

    def __init__(self) -> None:
        self._silent_until = time.monotonic() + _SILENT_S
        self._timer: threading.Timer | None = None

    def doing(self, what: str) -> None:
        """Begin another part of the start."""
        self.close()
        self._timer = threading.Timer(max(0.0, self._silent_until - time.monotonic()), log.info, ("starting: %s", what))
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()


# -- where it listens --------------------------------------------------------------------------------------------------


def _addresses(host: str, port: int) -> list[_Address]:
    """Return the addresses to listen at; raises `Refused` for a host that has none."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise Refused(f"the host {host!r} is not known: name an address of this machine with --host") from None
    return [(family, address) for family, _, _, _, address in found]


def _is_unprotected(settings: ServeSettings, addresses: Sequence[_Address]) -> bool:
    """Tell whether others can read what clients send; raises `Refused` where strangers could be served unasked."""
    key, host = settings.server.api_key, settings.own["host"]
    if key is not None and settings.own["no_key"]:
        raise Refused("there is a key, and --no-key: leave one of them out")
    if all(ipaddress.ip_address(str(address[0])).is_loopback for _, address in addresses):
        return False
    if key is None and not settings.own["no_key"]:
        where = f"the host {host}" if host else "every address"
        raise Refused(
            f"other machines reach {where}: name a file with a key (--api-key-file FILE), or serve every client that "
            "reaches it (--no-key)"
        )
    return settings.own["tls_cert"] is None


def _bound(settings: ServeSettings, addresses: Sequence[_Address]) -> list[socket.socket]:
    """Return sockets that listen at the addresses that this machine has; raises `Refused`."""
    port, sockets = settings.own["port"], list[socket.socket]()
    problem: OSError | None = None
    for family, address in addresses:
        try:
            listening = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # this machine has no such addresses
            problem = error
            continue
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _watch_for_the_gone(listening)
            listening.bind((address[0], port, *address[2:]))
            listening.listen(_BACKLOG)  # now, since only this tells for sure that no one else listens
        except OSError as error:
            listening.close()
            problem = error
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            break
        port = listening.getsockname()[1]  # the same for all, where any was asked for
        sockets.append(listening)
    if problem is not None and (not sockets or problem.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        for listening in sockets:
            listening.close()
        raise Refused(_why_not_bound(settings.own["host"], port, problem))
    return sockets


def _watch_for_the_gone(listening: socket.socket) -> None:
    """Have connections that are accepted end where a client is gone without a word: its machine, or its network."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_S), ("TCP_KEEPINTVL", _PROBE_S), ("TCP_USER_TIMEOUT", 1000 * _GONE_S),
    ):  # fmt: skip
        if (option := getattr(socket, name, None)) is not None:  # not every system has them
            listening.setsockopt(socket.IPPROTO_TCP, option, value)


def _why_not_bound(host: str, port: int, problem: OSError) -> str:
    match problem.errno:
        case errno.EADDRINUSE:
            return f"port {port} is in use, perhaps by Ollama: end that program, or name another port with --port"
        case errno.EACCES:
            return f"port {port} is for root alone: name one from 1024 on with --port"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            return f"{host!r} is no address of this machine: name one with --host"
        case _:
            return f"it cannot listen at {host!r}, port {port} ({problem.strerror}): name others with --host and --port"


def _url(settings: ServeSettings, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    scheme = "http" if settings.own["tls_cert"] is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _tls(settings: ServeSettings) -> ssl.SSLContext | None:
    """Return what encrypts connections, None for plain ones; raises `Refused` for files that cannot be used."""
    certificate, key = settings.own["tls_cert"], settings.own["tls_key"]
    if (certificate is None) != (key is None):
        raise Refused("a certificate and its key belong together: name both --tls-cert and --tls-key")
    if certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # of a key that wants one, no one is asked
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise Refused(
            f"the certificate {certificate} and its key {key} cannot be used ({error}): both are to be PEM files that "
            "this user can read, that belong together, and that have no password"
        ) from None
    return context


# -- models ------------------------------------------------------------------------------------------------------------


def _check_folders(settings: ServeSettings) -> None:
    for folder in settings.scheduler.models:
        try:
            if next(Folder(folder).names(), None) is not None:
                continue
        except OSError as error:
            raise Refused(
                f"the folder {folder} cannot be read ({error.strerror}): name another with --models"
            ) from None
        raise Refused(f"there is no model in the folder {folder}: put GGUF files there, or name another with --models")


def _checked(settings: ServeSettings, others: Catalog) -> list[ModelSpec]:
    """Return the models of a file, based on `others`; raises `Refused` for one that cannot be served."""
    parser = RequestParser(others, require=lambda model: None, pin=lambda model: None)
    specs = []
    try:
        ConfiguredModels("", others).replace(settings.models)
    except InvalidSettings as error:
        raise Refused(f"{settings.file}: {error}") from None
    for model in settings.models:
        try:
            specs.append(model.spec(others))
            parser.parse(specs[-1], {})  # a request that names nothing checks what the model names
        except SchedulerError as error:
            raise Refused(f"the model {model.name!r} in {settings.file}: {error}") from None
    return specs


class _Models:
    """The models of the file, which is read again on request."""

    def __init__(
        self,
        flags: Mapping[str, Any],
        settings: ServeSettings,
        scheduler: Scheduler,
        others: Catalog,
        specs: Sequence[ModelSpec],
    ) -> None:
        self._flags = flags
        self._settings = settings
        from scheduler.http.app import application
        from scheduler.http.service import Service

        self._scheduler = scheduler
        self._service = Service(scheduler, settings.server)
        self.app = application(self._service)
        self._others = others  # where the models are that those of the file are based on
        self._resolver = ConfiguredModels(f"the file {settings.file}", others)
        self._pinned: dict[ModelId, ModelSpec] = {}
        self._reading = threading.Lock()
        self._resolver.replace(settings.models)
        self._take(specs)
        if settings.file is not None:
            self._scheduler.catalog.add(self._resolver)
            self._service.commands = settings.commands

    def read_again(self) -> None:
        """Read the file again, and take what can change while running; where it cannot be used, nothing changes."""
        with self._reading:
            try:
                fresh = read_settings(self._flags)
                specs = _checked(fresh, self._others)
                before = self._scheduler.settings
                changes: dict[str, Any] = {
                    row.name: getattr(fresh.scheduler, row.name)
                    for row in SETTINGS
                    if row.changeable and getattr(fresh.scheduler, row.name) != getattr(before, row.name)
                }
                self._scheduler.configure(**changes)
            except (SchedulerError, Refused) as error:
                log.error("%s; everything stays as it was", one_line(str(error)))
                return
            self._resolver.replace(fresh.models)
            self._service.commands = fresh.commands
            self._take(specs)
            changed = f"; {', '.join(changes)} changed" if changes else ""
            kept = f"; {', '.join(stay)} cannot change before a restart" if (stay := self._staying(fresh)) else ""
            count = _counted(len(specs) + len(fresh.commands))
            log.info("read %s again: it names %s%s%s", fresh.file, count, changed, kept)

    def _staying(self, fresh: ServeSettings) -> list[str]:
        """Return the settings that the file changes, and that cannot change."""
        now = self._settings
        pairs = [(row.name, fresh.own[row.name], now.own[row.name]) for row in SERVE_SETTINGS]
        pairs += [(row.name, getattr(fresh.server, row.name), getattr(now.server, row.name)) for row in SERVER_SETTINGS]
        fixed = [row.name for row in SETTINGS if not row.changeable]
        pairs += [(name, getattr(fresh.scheduler, name), getattr(now.scheduler, name)) for name in fixed]
        return [name for name, asked, there in pairs if asked != there]

    def _take(self, specs: Sequence[ModelSpec]) -> None:
        """Pin the models that are to be pinned, and those no longer that were."""
        pinned = {spec.id: spec for spec in specs if spec.pin}
        for id, spec in self._pinned.items():
            if id not in pinned:
                self._scheduler.unpin(spec)
        for id, spec in pinned.items():
            if id not in self._pinned:
                self._scheduler.pin(spec)
        self._pinned = pinned


def _counted(count: int, what: str = "model") -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"

"""The command `neft registry serve`: the registry over HTTP, with a page to look at."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import closing, suppress
from typing import Annotated

import typer

from flows.registry_options import OUT, Debug, Location, open_registry, registry_app
from neft.errors import InputError

TOKEN = "NEFT_TOKEN"
_LOOPBACK_NAMES = ("127.0.0.1", "localhost")


@registry_app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 5055,
    mlflow: Annotated[str | None, typer.Option(metavar="URL", help="MLflow's page, for links to the runs.")] = None,
    prefect: Annotated[str | None, typer.Option(metavar="URL", help="Prefect's page, for links to the runs.")] = None,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Serve the registry as a page and as JSON, until Ctrl-C. With NEFT_TOKEN set, aliases and tags can be written.

    Example: neft registry serve --port 8000
    """
    from registry.server import Links, create_app

    links = Links(mlflow, prefect)
    with open_registry(location) as registry, closing(_listening(host, port)) as listener:
        OUT.print(announcement(host, listener.getsockname()[1]), highlight=False, markup=False, soft_wrap=True)
        OUT.file.flush()
        import uvicorn

        hosts = _LOOPBACK_NAMES if host in _LOOPBACK_NAMES else ()
        app = create_app(registry, os.environ.get(TOKEN), links, hosts)
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        with suppress(KeyboardInterrupt):  # the ordinary end
            uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound already, so that what prevents it is said before anything starts.

    Raises:
        InputError: no such address, or the port is taken or not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host!r} is no address of this machine: {error}; leave it out for 127.0.0.1"
        ) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen at {host} port {port}: {reason.lower()}; end what listens there, or choose another --port"
        ) from error
    return listener


def announcement(host: str, port: int) -> str:
    """What is said when the server begins to listen."""
    shown = f"[{host}]" if ":" in host else host
    lines = [f"the registry is at http://{shown}:{port}, its API at http://{shown}:{port}/api/docs; Ctrl-C ends it"]
    if not _is_loopback(host):
        lines += [
            f"{host} can be reached from other machines, and there is no encryption: everyone on the way can read what "
            "is sent, the token too; put a server that speaks HTTPS in front, or use an SSH tunnel"
        ]
    if not os.environ.get(TOKEN):
        lines += [f"it only reads; with {TOKEN} set, aliases and tags can be written"]
    return "\n".join(lines)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""What every verb works with: the options, the output, and a way to run its async part."""

from __future__ import annotations

import asyncio
import functools
import sys
import uuid
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import click

from resilver.address import parse_address
from resilver.cli.options import Options, options_of
from resilver.cli.output import Output
from resilver.errors import Invalid

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from resilver.cli.client import Client
    from resilver.credentials import Credentials

PORT_DEFAULT: Final = 7400

P = ParamSpec("P")
R = TypeVar("R")


class Session:
    """One run of the command."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.output = Output(as_json=options.output == "json")

    def addresses(self) -> list[str]:
        """The coordinators that were named, checked."""
        texts = [text.strip() for text in self.options.coordinator.split(",") if text.strip()]
        if not texts:
            raise Invalid("INVALID_FIELD", "--coordinator names nobody; write it as HOST:PORT[,HOST:PORT…]")
        try:
            addresses = [parse_address(text, default_port=PORT_DEFAULT) for text in texts]
        except ValueError as error:
            raise Invalid("INVALID_FIELD", f"--coordinator: {error}") from error
        for address in addresses:
            if not address.host or not address.port:
                raise Invalid("INVALID_FIELD", f"--coordinator: {address} does not say whom to ask: write HOST:PORT")
        return [str(address) for address in addresses]

    def tls(self) -> Credentials | None:
        """Who asks, if it was said; None is for a cluster without TLS."""
        options = self.options
        files = {"ca": options.tls_ca, "cert": options.tls_cert, "key": options.tls_key}
        if not any(files.values()):
            return None
        for what, path in files.items():
            if not path:
                raise Invalid("INVALID_FIELD", f"--tls-{what} is missing: TLS wants --tls-ca, --tls-cert and --tls-key")
        from resilver.config import Tls  # noqa: PLC0415  # only who has a certificate needs it
        from resilver.credentials import Credentials  # noqa: PLC0415  # as above

        return Credentials(Tls(**files))

    def run(self, work: Callable[[Client], Awaitable[R]]) -> R:
        """Runs a verb's async part with a client of the cluster."""
        from resilver.cli.client import Client  # noqa: PLC0415  # gRPC takes longer to import than all else together

        tls = self.tls()

        async def main() -> R:
            async with Client(self.addresses(), timeout_s=self.options.timeout_s, tls=tls) as client:
                return await work(client)

        return asyncio.run(main())

    @property
    def on_terminal(self) -> bool:
        """Whether somebody is there who can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def needs_confirmation(self, question: str) -> None:
        """Ends the command, nothing done, if the question could neither be asked nor was answered by `--yes`."""
        if not self.options.yes and not self.on_terminal:
            raise Invalid("INVALID_FIELD", f"{question} There is no terminal to ask on; say it with --yes")

    def confirm(self, question: str) -> None:
        """Asks on a terminal; without one `--yes` must have been given. A no ends the command, nothing done."""
        if self.options.yes:
            return
        self.needs_confirmation(question)
        if not click.confirm(question, err=True):
            raise Invalid("INVALID_FIELD", "not confirmed; nothing was changed")


def pass_session(function: Callable[Concatenate[Session, P], R]) -> Callable[P, R]:
    """Gives a click command its session as the first argument."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(Session(options_of(click.get_current_context())), *args, **kwargs)

    return wrapped


def request_id() -> str:
    """A new id for a change, so that it is done once however often it is sent."""
    return str(uuid.uuid4())


def select(volumes: tuple[str, ...], *, all_volumes: bool) -> dict[str, Any]:
    """The `volumes` and `all` of a request; one of the two must be given."""
    if volumes and all_volumes:
        raise Invalid("INVALID_FIELD", "name volumes or give --all, not both")
    if not volumes and not all_volumes:
        raise Invalid("INVALID_FIELD", "name the volumes, or give --all")
    return {"volumes": list(volumes), "all": all_volumes}


def resolve(text: str, known: Iterable[str], what: str) -> str:
    """The whole of a shortened id, which must be unique; one that is not known goes to the server as it is."""
    ids = list(dict.fromkeys(known))
    if text in ids:
        return text
    near = [identity for identity in ids if identity.startswith(text)]
    if len(near) > 1:
        raise Invalid("INVALID_FIELD", f"{text!r} could be {len(near)} {what}s: {', '.join(sorted(near)[:8])}")
    return near[0] if near else text

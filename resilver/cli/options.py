"""The options that every verb takes, before the verb or after it.

`Verb` and `Verbs` add them to each command, take them off again before the command's own function is called, and
leave what was given on the root context: what stands nearer to the verb wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import click

from resilver.limits import rate_fault

if TYPE_CHECKING:
    from collections.abc import Sequence

COORDINATOR_DEFAULT: Final = "127.0.0.1:7400"
_META: Final = "resilver.options"
_GLOBALS: Final = ("coordinator", "output", "timeout", "yes", "tls_ca", "tls_cert", "tls_key")
_TLS: Final = {"ca": "The CA's certificates", "cert": "Your certificate", "key": "Its key"}
_RATE: Final = re.compile(
    r"(?P<number>[0-9]{1,15}(?:\.[0-9]+)?) ?(?P<unit>(?P<prefix>[kKMGT])?(?P<binary>(?<=[kKMGT])i)?B(?:/s)?)?"
)
_SPAN: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)?")
_SPAN_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for besides the verb. `timeout_s` None: each call has its own bound."""

    coordinator: str = COORDINATOR_DEFAULT
    output: str = "table"
    timeout_s: float | None = None
    yes: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""


class Span(click.ParamType[float]):
    """A length of time: `30`, `30s`, `10m`, `2h`, `1d`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _SPAN.fullmatch(str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no length of time; write it like 30s, 10m, 2h or 1d", param, ctx)
        return float(match[1]) * _SPAN_SECONDS[match[2]]


SPAN: Final = Span()


class Rate(click.ParamType[int]):
    """Bytes a second: `50MB`, `50MiB`, `800kB`, `1.5GB`; 0 is no cap."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _RATE.fullmatch(str(value).strip())
        if match is None or (match["unit"] is None and float(match["number"])):
            self.fail(f"{value!r} is no rate; write it like 50MB, 50MiB or 800kB a second, or 0 for none", param, ctx)
        power = "kmgt".find((match["prefix"] or "").lower()[:1] or "?") + 1
        bytes_s = int(float(match["number"]) * float(1024 if match["binary"] else 1000) ** power)
        if fault := rate_fault(bytes_s):
            self.fail(f"{value!r} {fault}", param, ctx)
        return bytes_s


RATE: Final = Rate()


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    click.echo(f"resilver {own_version()}")
    ctx.exit()


def own_version() -> str:
    """The version of this installation."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  # slow, and seldom asked for

    try:
        return version("resilver")
    except PackageNotFoundError:
        return "unknown"


def _global_params(*, environment: bool) -> list[click.Parameter]:
    """New ones for each command; only the root's look at the environment, so that an option always beats it."""
    return [
        click.Option(
            ["--coordinator"],
            metavar="H:P[,H:P…]",
            envvar="RESILVER_COORDINATOR" if environment else None,
            help=f"Whom to ask, in this order. [env RESILVER_COORDINATOR; default {COORDINATOR_DEFAULT}]",
        ),
        *(
            click.Option(
                [f"--tls-{what}"],
                metavar="FILE",
                envvar=f"RESILVER_TLS_{what.upper()}" if environment else None,
                help=f"{said}, as PEM. [env RESILVER_TLS_{what.upper()}]",
            )
            for what, said in _TLS.items()
        ),
        click.Option(["-o", "--output"], type=click.Choice(["table", "json"]), help="A screen or JSON. [table]"),
        click.Option(["--timeout"], type=SPAN, help="Give up waiting after this long, such as 30s; exit code 4."),
        click.Option(["--yes"], is_flag=True, help="Do not ask for confirmation."),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and exit.",
        ),
    ]


def options_of(ctx: click.Context) -> Options:
    """What was given so far."""
    return ctx.find_root().meta.get(_META) or Options()


def _merge(ctx: click.Context) -> None:
    given = {name: ctx.params.pop(name, None) for name in _GLOBALS}
    options = options_of(ctx)
    ctx.find_root().meta[_META] = replace(
        options,
        coordinator=given["coordinator"] or options.coordinator,
        output=given["output"] or options.output,
        timeout_s=given["timeout"] or options.timeout_s,
        yes=bool(given["yes"]) or options.yes,
        tls_ca=given["tls_ca"] or options.tls_ca,
        tls_cert=given["tls_cert"] or options.tls_cert,
        tls_key=given["tls_key"] or options.tls_key,
    )


class Verb(click.Command):
    """A command that takes the global options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_global_params(environment=False))

    def invoke(self, ctx: click.Context) -> Any:
        _merge(ctx)
        return super().invoke(ctx)


class Verbs(click.Group):
    """A group of commands that takes the global options too."""

    command_class = Verb

    def __init__(self, *args: Any, environment: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_global_params(environment=environment))

    def invoke(self, ctx: click.Context) -> Any:
        _merge(ctx)
        return super().invoke(ctx)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON; for errors that are met before it could be parsed."""
    return bool({"-ojson", "-o=json", "--output=json"}.intersection(arguments)) or any(
        this in ("-o", "--output") and following == "json" for this, following in pairwise(arguments)
    )

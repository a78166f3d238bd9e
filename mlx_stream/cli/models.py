"""`mlx_stream models`: list models worth pulling that fit a device; touches no network."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mlx_stream.cli import options
from mlx_stream.program.exits import notify

if TYPE_CHECKING:
    from mlx_stream.plan.offers import Offer


@options.verb
def models(
    *,
    device: Annotated[
        str | None, Option(help="A device that `mlx_stream devices` lists. Default: this machine.")
    ] = None,
    own: options.Devices = None,
    json: options.AsJson = False,
) -> None:
    """List models worth pulling that fit a device, with the largest window that fits.

    Use the name or the repository as MODEL. The list ships with this version; --json shows the
    source of each entry.
    """
    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.plan import devices
    from mlx_stream.plan.offers import make_offers

    place = devices.find(device, own) if device is not None else devices.here()
    offers = make_offers(place)
    if json:
        print_json({"device": place.name, "models": [as_json(offer) for offer in offers]})
        return
    columns = ["name", "download", "window", "tested", "license", "repository"]
    print_table(columns, [row(offer) for offer in offers if offer.fits])
    if larger := [offer.model.name for offer in offers if not offer.fits]:
        notify(f"these do not fit {place.title}: {', '.join(larger)}")


def row(offer: "Offer") -> list[str]:
    model, window = offer.model, f"{offer.plan.window:,}"
    tested = "itself" if model.tested else "its family"
    return [
        model.name,
        download_size(offer.stored),
        window,
        tested,
        model.license,
        model.repository,
    ]


def download_size(amount: int) -> str:
    """Return "2.3 GB", or "270 MB" for less than 1 GB."""
    return f"{amount / 1e9:.1f} GB" if amount >= 995e6 else f"{round(amount / 1e7) * 10} MB"


def as_json(offer: "Offer") -> dict[str, Any]:
    model, plan = offer.model, offer.plan
    return {
        "name": model.name,
        "repository": model.repository,
        "family": model.config["model_type"],
        "license": model.license,
        "tested": model.tested,
        "stored_bytes": offer.stored,
        "fits": offer.fits,
        "window": plan.window,
        "total_bytes": plan.total,
        "tokens_per_second": plan.tokens_per_second,
        "seen": model.seen,
        "license_source": model.license_source,
        "shape_source": model.shape_source,
        "bytes_source": model.bytes_source,
    }

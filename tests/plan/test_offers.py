"""Offers of listed models: each fits by `plan`, on machines of every size, without the network."""

from itertools import pairwise

import pytest

from mlx_stream.hub.catalog import listed_models
from mlx_stream.plan.devices import Device, read_devices
from mlx_stream.plan.inspect import of_config
from mlx_stream.plan.offers import make_offers, suggest_model
from mlx_stream.plan.planner import FITS, PlanRequest, make_plan

SIZES = (8, 16, 32, 64)


def mac(gigabytes: int) -> Device:
    entry = {"name": "mac", "kind": "laptop", "memory_gb": gigabytes}
    return next(read_devices({"device": [entry]}, "here", set()))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))


@pytest.mark.parametrize("gigabytes", SIZES)
def test_every_offer_fits_by_the_plan_of_its_config(gigabytes):
    device = mac(gigabytes)
    offers = make_offers(device)
    suggested = suggest_model(device)
    assert suggested is not None and suggested.model.suggested
    fitting = [offer for offer in offers if offer.fits]
    assert suggested.model in [offer.model for offer in fitting]
    for offer in [*fitting, suggested]:
        summary = of_config(offer.model.name, offer.model.config)
        plan = make_plan(summary, device, PlanRequest(window=offer.plan.window))
        quantized = offer.model.config.get("quantization")
        assert (plan.verdict, plan.recipe.bits) == (FITS, None if quantized else 16)
        assert plan.total == offer.plan.total <= device.budget.amount
    for offer in offers:
        if not offer.fits:
            assert offer.plan.total + 2**28 > device.budget.amount


def test_a_larger_machine_gets_no_smaller_offer():
    for small, large in pairwise(SIZES):
        pairs = zip(make_offers(mac(small)), make_offers(mac(large)), strict=True)
        assert all(a.plan.window <= b.plan.window for a, b in pairs)
        few, more = suggest_model(mac(small)), suggest_model(mac(large))
        assert few is not None and more is not None and few.stored <= more.stored
    assert suggest_model(mac(2)) is None


def test_the_shapes_give_the_sizes_that_the_hub_lists():
    """A file consists of its tensors and a header of a few hundred kilobytes."""
    seen = {model.name: model.bytes for model in listed_models() if model.bytes}
    assert len(seen) == 2
    for model in listed_models():
        assert model.bytes is None or model.bytes_source
    by_name = {offer.model.name: offer for offer in make_offers(mac(64))}
    for name, size in seen.items():
        assert by_name[name].stored == size
        assert by_name[name].plan.weights == pytest.approx(size, rel=3e-5)

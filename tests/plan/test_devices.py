"""Built-in devices and a user's own: checked strictly, each figure with its source."""

from pathlib import Path

import pytest

from mlx_stream.errors import DeviceError
from mlx_stream.plan import devices
from mlx_stream.plan.devices import GB, all_devices, built_in, find

MINE = """
[[device]]
name = "my-mac"
title = "A Mac of mine"
kind = "laptop"
memory_gb = 48
budget_gb = 40
bandwidth_gb_s = 273.5
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "devices.toml"


def refused(own: Path, text: str) -> str:
    own.write_text(text, encoding="utf-8")
    with pytest.raises(DeviceError) as error:
        all_devices(own)
    message = str(error.value)
    assert message.startswith(f"{own}: ") and len(message.splitlines()) == 1
    return message.removeprefix(f"{own}: ")


# --- built-in devices ---


def test_every_figure_is_sane_and_has_a_source():
    names = [device.name for device in built_in()]
    assert len(names) == len(set(names)) > 100
    for device in built_in():
        figures = [device.memory, device.budget, device.bandwidth]
        mobile = device.kind in ("phone", "tablet")
        assert (device.without_entitlement is not None) == mobile, device.name
        if device.without_entitlement is not None:
            figures.append(device.without_entitlement)
            assert device.without_entitlement.amount < device.budget.amount
        assert 0.5 < device.budget.amount / device.memory.amount < 0.9, device.name
        for figure in figures:
            assert figure is not None and len(figure.source) > 10, device.name
            assert figure.source != "devices.toml", f"{device.name} has a figure of no source"
        assert device.bandwidth is not None and 3e10 < device.bandwidth.amount < 1e12
        assert device.year is not None and 2020 <= device.year <= 2026 and device.chip


def test_an_unpublished_figure_is_estimated_by_a_rule():
    published, estimated = find("macbook-air-m2-16gb"), find("macbook-pro-m3-pro-18gb")
    assert not published.budget.estimated and published.budget.amount == int(10.67 * GB)
    assert estimated.budget.estimated and estimated.budget.amount == pytest.approx(12 * GB, 1e-3)
    assert find("macbook-pro-m3-pro-36gb").budget.amount == 27 * GB
    phone = find("iphone-17-pro")
    assert phone.budget.estimated and phone.budget.amount == 9 * GB
    assert phone.without_entitlement is not None
    assert phone.without_entitlement.amount == 4.5 * GB


def test_the_bandwidth_of_a_mac_is_known_where_its_chip_and_memory_tell():
    for memory, bandwidth in ((64, 546e9), (36, 410e9)):
        known = devices.known_bandwidth("M4 Max", memory * GB)
        assert known is not None and known.amount == bandwidth
    for mac in (device for device in built_in() if device.kind in ("laptop", "desktop")):
        found = devices.known_bandwidth(mac.chip, mac.memory.amount)
        assert found is not None and mac.bandwidth is not None
        assert found.amount == mac.bandwidth.amount, mac.name
    assert devices.known_bandwidth("M9", 64 * GB) is None
    assert devices.known_bandwidth("M4 Max", 20 * GB) is None


# --- a user's own devices ---


def test_own_devices_are_added(own):
    own.write_text(MINE)
    device = find("my-mac", own)
    assert (device.memory.amount, device.budget.amount) == (48 * GB, 40 * GB)
    assert device.bandwidth is not None and device.bandwidth.amount == 273.5e9
    assert device.budget.source == str(own) and not device.budget.estimated
    assert find("iphone-16", own) == find("iphone-16")
    assert len(all_devices()) == len(built_in())
    devices.user_file().parent.mkdir(parents=True)
    devices.user_file().write_text(MINE)
    assert all_devices()[-1].name == "my-mac"


def test_the_defaults_of_an_own_device_are_those_of_its_kind(own):
    own.write_text('[[device]]\nname = "p"\nkind = "phone"\nmemory_gb = [8, 10]\n')
    small, large = find("p-8gb", own), find("p-10gb", own)
    assert small.budget == find("iphone-16").budget
    assert small.bandwidth is None and small.title == "p-8gb"
    assert large.budget.estimated and large.budget.amount == 7.5 * GB


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (('budget_gb = 40', 'budget = 40'), "unknown key 'budget'; the known keys are name, "),
        (('memory_gb = 48', ''), "device 1: memory_gb is missing"),
        (('memory_gb = 48', 'memory_gb = "48"'), "a positive number, or a list of them, not '48'"),
        (('memory_gb = 48', 'memory_gb = []'), "a positive number, or a list of them, not []"),
        (('memory_gb = 48', 'memory_gb = [48, 48]'), "the name 'my-mac-48gb' is taken"),
        (('budget_gb = 40', 'budget_gb = true'), "budget_gb must be a positive number, not True"),
        (('budget_gb = 40', 'budget_gb = nan'), "budget_gb must be a positive number, not nan"),
        (('budget_gb = 40', 'budget_gb = [40]'), "budget_gb must be a positive number, not [40]"),
        (('budget_gb = 40', 'budget_gb = 49'), "budget_gb is more than its memory of 48 GB"),
        (('273.5', '-1'), "bandwidth_gb_s must be a positive number, not -1"),
        (('"laptop"', '"toaster"'), "kind must be one of phone, tablet, laptop, desktop"),
        (('"my-mac"', '"My Mac"'), "name must be 1 to 64 characters from a-z, 0-9 and '-'"),
        (('"my-mac"', '7'), "name must be 1 to 64 characters from a-z, 0-9 and '-', not 7"),
        (('"A Mac of mine"', r'"a\u001b[31m"'), "title must be a line of text"),
        (('"my-mac"', '"iphone-16"'), "the name 'iphone-16' is taken; choose another"),
        (('budget_gb = 40', 'budget_gb = 40\nwithout_entitlement_gb = 3'), "only for phones"),
        (('[[device]]', 'colour = 1\n[[device]]'), "unknown key 'colour'; expected only"),
        (('[[device]]', '[device]'), "device must be a list of tables, written [[device]]"),
        (('[[device]]', '[[device]'), "not valid TOML: "),
        (('[[device]]', 'a = ' + '[' * 100_000), "nested too deeply"),
        (('[[device]]', MINE + '[[device]]'), "device 2: the name 'my-mac' is taken"),
        (('budget_gb = 40', 'year = "old"'), "year must be a year, not 'old'"),
    ],
)  # fmt: skip
def test_own_devices_are_checked_strictly(own, change, why):
    assert why in refused(own, MINE.replace(*change))


def test_a_file_that_cannot_be_read_is_one_line(own, tmp_path):
    with pytest.raises(DeviceError, match="cannot be read: No such file"):
        all_devices(own)
    with pytest.raises(DeviceError, match="cannot be read: not a file"):
        all_devices(tmp_path)
    own.write_bytes(b"\xff")
    with pytest.raises(DeviceError, match="not UTF-8 at byte 0"):
        all_devices(own)
    own.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(DeviceError, match="the limit is 1 MB"):
        all_devices(own)

"""Where `.tflite` files are timed: one class per kind of device, all with the same few methods."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tflite_export.devices.device import Device, DeviceInfo, LoadedModel
from tflite_export.errors import DeviceError

if TYPE_CHECKING:
    from tflite_export.devices.local import LocalDevice

__all__ = ["DEVICES", "Device", "DeviceInfo", "LoadedModel", "open_device"]


def _local(address: str) -> "LocalDevice":
    from tflite_export.devices.local import LocalDevice

    if address:
        raise DeviceError(f"device 'local' takes no address, but got '{address}': write just 'local'.")
    return LocalDevice()


# The kind before the colon, and what makes a device from the address behind it.
DEVICES: dict[str, Callable[[str], Device]] = {
    "local": _local,
}


def open_device(name: str) -> Device:
    """Return the device called `kind` or `kind:address`.

    Raises:
        DeviceError: there is no such kind, or the address does not suit it.
    """
    kind, _, address = name.partition(":")
    if kind not in DEVICES:
        raise DeviceError(f"there is no device kind '{kind}': use one of {sorted(DEVICES)}.")
    return DEVICES[kind](address)

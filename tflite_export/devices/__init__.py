"""Where `.tflite` files are timed: one class per kind of device, all with the same few methods."""

from collections.abc import Callable
from types import MappingProxyType

from tflite_export.devices.device import (
    Answer,
    Delegate,
    Device,
    DeviceInfo,
    DeviceOptions,
    Nature,
    Quota,
    Timing,
)
from tflite_export.errors import DeviceError, OptionError

__all__ = [
    "DEVICES",
    "Answer",
    "Delegate",
    "Device",
    "DeviceInfo",
    "DeviceOptions",
    "Nature",
    "Quota",
    "Timing",
    "open_device",
]


def _local(address: str, options: DeviceOptions) -> Device:
    from tflite_export.devices.local import LocalDevice

    _refuse_address("local", address)
    if options.delegate != Delegate.CPU:
        raise OptionError(f"the device 'local' runs on the CPU, not with the delegate '{options.delegate}'.")
    return LocalDevice()


def _adb(address: str, options: DeviceOptions) -> Device:
    from tflite_export.devices.remote import RemoteDevice
    from tflite_export.devices.transport import AdbTransport

    return RemoteDevice(AdbTransport(address), options)


def _ssh(address: str, options: DeviceOptions) -> Device:
    from tflite_export.devices.remote import RemoteDevice
    from tflite_export.devices.transport import SshTransport

    return RemoteDevice(SshTransport(address, config=options.ssh_config), options)


def _edgetpu(address: str, options: DeviceOptions) -> Device:
    from tflite_export.devices.edgetpu import EdgeTpuDevice

    _refuse_address("edgetpu", address)
    return EdgeTpuDevice(options)


def _ethosu(address: str, options: DeviceOptions) -> Device:
    from tflite_export.devices.ethosu import EthosUDevice

    return EthosUDevice(address)


def _file(address: str, options: DeviceOptions) -> Device:
    from tflite_export.devices.logs import LogDevice

    return LogDevice(address)


DEVICES: MappingProxyType[str, Callable[[str, DeviceOptions], Device]] = MappingProxyType(
    {
        "local": _local,
        "adb": _adb,
        "ssh": _ssh,
        "edgetpu": _edgetpu,
        "ethos-u": _ethosu,
        "file": _file,
    }
)
"""The kind before the colon, and what makes a device from the address behind it. An Ethos-U's address is its name."""


def open_device(name: str, options: DeviceOptions | None = None) -> Device:
    """Return the device called `kind` or `kind:address`; close it after use.

    `local` · `adb` or `adb:SERIAL` · `ssh:user@host[:port]` · `edgetpu` · `ethos-u55-256` and its like · `file:LOG`.

    Raises:
        DeviceError: there is no such kind, the address does not suit it, or the device is not there.
        OptionError: an option does not go with the kind.
    """
    kind, _, address = name.partition(":")
    if kind.startswith("ethos-u"):
        kind, address = "ethos-u", name
    if kind not in DEVICES:
        raise DeviceError(f"there is no device kind '{kind}': use one of {sorted(DEVICES)}.")
    return DEVICES[kind](address, options or DeviceOptions())


def _refuse_address(kind: str, address: str) -> None:
    if address:
        raise DeviceError(f"device '{kind}' takes no address, but got '{address}': write just '{kind}'.")

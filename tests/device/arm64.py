"""A Python for 64-bit Arm with a LiteRT runtime, on a machine that is none: qemu's user mode and Debian's packages.

Nothing is installed: packages are unpacked into a folder, by apt and pip as they are.
"""

import os
import platform
import shlex
import subprocess
import zipfile
from pathlib import Path

# The Python of Debian 12 with what it and the wheels are linked to.
PACKAGES = (
    "libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal"
)
# Newer runtimes end with a segmentation fault in qemu 7.2.
WHEELS = ("numpy<2.5", "ai-edge-litert==1.4.0", "flatbuffers", "backports.strenum", "tqdm", "typing_extensions")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


class CannotBeHadError(Exception):
    """This machine has no such packages, or no network."""


def make_python(folder: Path) -> Path:
    """Return a program that takes Python's arguments and runs them on an emulated Arm processor.

    Raises:
        CannotBeHadError: why not.
    """
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if (release.get("VERSION_CODENAME"), platform.machine()) != ("bookworm", "x86_64"):
        raise CannotBeHadError("only Debian 12 on x86-64 has the packages that were tried")
    unpack_debs(folder)
    unpack_wheels(folder)
    (qemu,) = (folder / "qemu").glob("usr/bin/qemu-aarch64-static")
    root = folder / "root"
    program = folder / "python3"
    command = shlex.join([str(qemu), "-L", str(root), str(root / "usr/bin/python3.11")])
    program.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder / "site"))} exec {command} "$@"\n')
    program.chmod(0o755)
    return program


def unpack_debs(folder: Path) -> None:
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / name).mkdir(parents=True)
    # lists of its own: the machine's stay those of its own processor
    own = ["Dir::State::Lists=" + str(folder / "lists"), "Dir::Cache=" + str(folder / "cache")]
    arm = [f"-o{setting}" for setting in ("APT::Architecture=arm64", "APT::Architectures=arm64", *own)]
    run("apt-get", "-qq", *arm, "update")
    run("apt-get", "-qq", *arm, "download", *PACKAGES.split(), cwd=folder / "debs")
    run("apt-get", "-qq", "download", "qemu-user-static", cwd=folder / "debs")
    for path in (folder / "debs").glob("*.deb"):
        run("dpkg", "-x", path, folder / ("qemu" if path.name.startswith("qemu") else "root"))


def unpack_wheels(folder: Path) -> None:
    platforms = [f"--platform={one}" for one in PLATFORMS]
    python = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
    run("pip", "download", "-q", *python, *platforms, "-d", folder / "wheels", *WHEELS)
    for path in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder / "site")


def run(*command: object, cwd: Path | None = None) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600, env=os.environ.copy())
    except FileNotFoundError as error:
        raise CannotBeHadError(f"{words[0]} is not here") from error
    if done.returncode:
        raise CannotBeHadError(f"{' '.join(words[:4])} ...: {done.stderr.strip()[-300:]}")

"""CSV rows that are appended one by one, so that an experiment that was stopped goes on where it was."""

import csv
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
SHARED_DATA = HERE.parents[2] / "shared" / "data"


def shared_loader() -> ModuleType:
    """The loader of the real images and weights beside the repository."""
    if not (SHARED_DATA / "load.py").is_file():
        raise SystemExit(f"This experiment needs the real images and weights in {SHARED_DATA}.")
    spec = importlib.util.spec_from_file_location("shared_data_load", SHARED_DATA / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Records:
    """Rows of one CSV file; some columns together say which run a row is."""

    def __init__(self, path: Path, key: tuple[str, ...], values: tuple[str, ...]) -> None:
        self.path, self.key, self.columns = path, key, (*key, *values)
        self.rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    def find(self, **key: object) -> dict[str, str] | None:
        wanted = {name: str(value) for name, value in key.items()}
        return next((row for row in self.rows if all(row[name] == value for name, value in wanted.items())), None)

    def ensure(self, run: Callable[[], dict[str, object]], **key: object) -> dict[str, str]:
        """Return the row of a run, from the file or from running it now."""
        if (row := self.find(**key)) is not None:
            return row
        row = {name: str(value) for name, value in {**key, **run()}.items()}
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        print(row, flush=True)
        return row

"""Rows of a CSV file that are measured one by one, in processes: what is there is not measured again."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
from tqdm import tqdm


def measured_rows(path: Path, key: list[str], cells: list[tuple], measure: Callable, workers: int) -> pd.DataFrame:
    """All rows of the file, by `key`, after measure(*cell) → dict has been run for the cells that it lacked."""
    rows = pd.read_csv(path).set_index(key) if path.exists() else pd.DataFrame()
    todo = [cell for cell in cells if cell not in rows.index]
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(measure, *cell): cell for cell in todo}
        for future in tqdm(as_completed(futures), total=len(todo), unit="run", smoothing=0):
            row = pd.DataFrame([future.result()], index=pd.MultiIndex.from_tuples([futures[future]], names=key))
            rows = pd.concat([rows, row]).sort_index()
            rows.to_csv(path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)  # a kill leaves the old file whole
    return rows

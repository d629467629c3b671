"""Results from Python: `raylab.open_results(path)`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylab.results.queries import open_views, query
from raylab.results.statement import quote_settings
from raylab.results.tables import SETTING_COLUMNS
from raylab.store.storage import open_results as open_folder
from raylab.store.storage import pull

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class Results:
    """A results folder, or this machine's copy of one at a URL, to ask. Every call sees the rows as they are then."""

    def __init__(self, where: str | Path) -> None:
        self.folder = open_folder(str(where))

    def query(self, sql: str) -> "pa.Table":
        """The answer to SQL over tables and ready views, as `raylab query` gives it. Raises JobError."""
        pull(self.folder)
        return query(self.folder, sql)

    def table(self, name: str) -> "pa.Table":
        """A whole table or ready view. Raises JobError."""
        return self.query(f'from "{name}"')

    def frame(self, sql: str) -> Any:
        """The answer as a pandas data frame; needs pandas (`pip install raylab[pandas]`). Raises JobError."""
        return self.query(sql).to_pandas()

    def connect(self, sql: str | None = None) -> "duckdb.DuckDBPyConnection":
        """A DuckDB connection with the rows of this moment, to ask many times; with `sql`, only of what that needs.

        It reads and writes no files. Raises JobError.
        """
        pull(self.folder)
        return open_views(self.folder, None if sql is None else quote_settings(sql, SETTING_COLUMNS))


def open_results(where: str | Path) -> Results:
    """Results in a folder or at a URL (`s3://...`). Raises JobError where there is none."""
    results = Results(where)
    results.query("select 1")
    return results

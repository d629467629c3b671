"""raylab: hyperparameter and ablation studies of text encoders for healthcare text, on Ray."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from raylab.results.reader import Results

__version__ = "0.1.0"


def open_results(where: "str | Path") -> "Results":
    """Results in a folder or at a URL, to be asked from Python: Arrow tables, pandas frames, a DuckDB connection.

    Raises raylab.base.mistakes.JobError where there is none.
    """
    # `import raylab` loads nothing.
    from raylab.results.reader import open_results

    return open_results(where)

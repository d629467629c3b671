"""The report of a job: one page, its figures and its tables; each subject a module, all listed in `report.py`."""

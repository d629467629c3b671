import gc

import pytest

from raylab.base.imports import quick_imports


def fail_to_import(made):
    with quick_imports():
        assert not gc.isenabled()
        made += [[number] for number in range(1000)]
        raise ImportError


def test_collection_goes_on_after_imports_and_leaves_out_what_they_made():
    made, before = [], gc.get_freeze_count()
    try:
        with pytest.raises(ImportError):
            fail_to_import(made)
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
    finally:
        gc.unfreeze()

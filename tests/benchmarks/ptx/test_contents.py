"""Which bytes hold something, as torch's operations and a kernel's stores leave them."""

import numpy as np
import torch

from ptx.contents import Contents


def kinds(contents):
    return {kind for kind, *_ in contents.faults}


def test_what_torch_empty_made_must_be_written_before_it_is_read():
    with Contents() as contents:
        made = torch.empty(4, dtype=torch.float32, device="cpu")
        made[:2] = 1.0
        made[:2].sum()
        assert not contents.faults
        made.sum()
    assert kinds(contents) == {"undefined read"}


def test_it_holds_nan_until_then():
    with Contents():
        assert bytes(Contents.bytes_of(torch.empty(3, dtype=torch.bfloat16, device="cpu"))) == b"\xff" * 6


def test_results_of_operations_hold_something():
    before = torch.arange(6, device="cpu")
    with Contents() as contents:
        made = (before.view(2, 3).t().contiguous() + 1).to(torch.float32)
        made.mul_(2).sum()
        assert contents.is_new(made)
        assert not contents.is_new(before)
    assert not contents.faults


def test_what_a_kernel_stored_may_be_read():
    with Contents() as contents:
        made = torch.empty(4, dtype=torch.int32, device="cpu")
        contents.note_passed(made)
        stored = np.arange(16) < 8
        contents.note_written(made.untyped_storage().data_ptr(), stored)
        made[:2].sum()
        assert not contents.faults
        contents.check_all_written()
    assert kinds(contents) == {"output not written"}


def test_elements_between_the_rows_of_a_view_need_not_be_written():
    with Contents() as contents:
        rows = torch.empty(12, dtype=torch.float32, device="cpu").as_strided((2, 3), (5, 1), 1)
        contents.note_passed(rows)
        rows.fill_(1.0)
        rows.sum()
        contents.check_all_written()
    assert not contents.faults

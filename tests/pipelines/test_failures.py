import errno
import os

import pytest

from gigavim import errors
from gigavim_pipelines.failures import ADVICE, classify


def system(number, name="/data/a.svs"):
    return OSError(number, os.strerror(number), name)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "may_pass"),
    [
        (system(errno.EIO), "I/O", True),
        (system(errno.ESTALE), "I/O", True),
        (ConnectionResetError("gone"), "I/O", True),
        (system(errno.EACCES), "permission", False),
        (caused(errors.SlideError("cannot be opened"), system(errno.EACCES)), "permission", False),
        (system(errno.ENOSPC), "disk", True),
        (system(errno.EDQUOT), "disk", True),
        (system(errno.EFBIG), "disk", True),
        (caused(errors.OutputError("cannot be written"), system(errno.ENOSPC)), "disk", True),
        (caused(errors.OutputError("cannot be written"), system(errno.EACCES)), "output", False),
        (system(errno.ENOENT), "slide", False),
        (errors.CorruptSlideError("cut"), "corrupt", False),
        (errors.MissingMppError("none"), "no mpp", False),
        (MemoryError(), "memory", True),
        (KeyError("x"), "defect", False),
    ],
)
def test_what_an_error_means(error, reason, may_pass):
    failure = classify(error)
    assert (failure.reason, failure.may_pass) == (reason, may_pass)
    assert failure.message
    assert failure.advice == ADVICE[reason]


def test_the_systems_own_errors_name_the_file_first():
    assert classify(system(errno.EACCES)).message == "/data/a.svs: Permission denied"

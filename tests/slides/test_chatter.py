"""What C libraries write to standard error stays out of sight, and Python's own does not."""

import logging
import os

from gigavim.slides.chatter import silenced


def test_what_is_written_meanwhile_is_dropped(capfd):
    os.write(2, b"before ")
    with silenced():
        os.write(2, b"meanwhile ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


def test_details_are_shown_to_those_who_want_them(capfd, caplog):
    with caplog.at_level(logging.INFO, "gigavim.slides.chatter"), silenced():
        os.write(2, b"meanwhile")
    assert capfd.readouterr().err == "meanwhile"

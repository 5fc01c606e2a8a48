"""The little of OME-XML that reading needs."""

import re
from xml.etree import ElementTree

MAX_XML_CHARS = 16 << 20


def pixels_attributes(xml: str) -> dict[str, str]:
    """Return the attributes of the first image's Pixels element; empty if there is none."""
    root = _parse(xml)
    if root is None:
        return {}
    for element in root.iter():
        if _name(element) == "Pixels":
            return dict(element.attrib)
    return {}


def channel_names(xml: str) -> tuple[str, ...]:
    """Return the names of the first image's channels, "" where one has none."""
    root = _parse(xml)
    if root is None:
        return ()
    for element in root.iter():
        if _name(element) == "Pixels":
            return tuple(
                child.attrib.get("Name", "") for child in element if _name(child) == "Channel"
            )
    return ()


def _parse(xml: str) -> ElementTree.Element | None:
    # A document type may define entities that expand without end; OME-XML has none.
    if len(xml) > MAX_XML_CHARS or re.search(r"<!(DOCTYPE|ENTITY)", xml):
        return None
    try:
        return ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError):
        return None


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""

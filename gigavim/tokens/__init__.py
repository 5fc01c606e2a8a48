"""From pixels to tokens: the grid of patches, the cells that are kept, their order, their stream.

The modules are imported one by one (`from gigavim.tokens.order import ScanOrder`), since `tissue`
and `stream` pull heavier libraries than the others.
"""

"""From pixels to tokens: the grid of patches, which cells are kept, their order, and their stream.

The modules are imported one by one (`from gigavim.tokens.order import ScanOrder`), since `tissue` and
`stream` pull heavier libraries than the others.
"""

"""The sizes of Vim by name. Those of the paper carry the published switches and head."""

from gigavim.model.config import VimConfig

REGISTRY: dict[str, VimConfig] = {
    "vim-nano": VimConfig(
        d_model=96,
        depth=12,
        patch_px=8,
        stride_px=8,
        class_token="none",
        pooling="mean",
        position="block",
        grid_hw=(16, 16),
    ),
    "vim-tiny": VimConfig(d_model=192, depth=24, num_classes=1000),
    "vim-tiny-stride8": VimConfig(
        d_model=192, depth=24, stride_px=8, grid_hw=(27, 27), num_classes=1000
    ),
    "vim-small": VimConfig(d_model=384, depth=24, num_classes=1000),
    "vim-small-stride8": VimConfig(
        d_model=384, depth=24, stride_px=8, grid_hw=(27, 27), num_classes=1000
    ),
    "vim-base": VimConfig(d_model=768, depth=24, num_classes=1000),
}

"""What the paper has measured: Tables 1 and 2 of Fang et al., NeurIPS 2022 (arXiv 2210.00129).

The comments in configs/experiment and the table in docs/memory.md repeat figures of these; tests compare them.
"""

TABLE_1 = {  # batch of a GPU; its MiB without and with SBP; top-1 in percent without and with SBP
    "vit_tiny": ("ViT-Tiny", 256, 8248, 5587, 73.68, 73.09),
    "vit_base": ("ViT-Base", 64, 10083, 7436, 81.22, 80.62),
    "convnext_tiny": ("ConvNeXt-Tiny", 128, 12134, 7059, 82.1, 81.61),
    "convnext_base": ("ConvNeXt-Base", 64, 14130, 8758, 83.8, 83.27),
}
TABLE_2 = {  # GB without and with SBP, box AP without and with it, mask AP likewise; two images
    "mask_rcnn_convnext_tiny": ("Mask R-CNN, ConvNeXt-Tiny", 8.6, 5.9, 46.2, 45.5, 41.7, 41.1),
    "cascade_mask_rcnn_convnext_base": ("Cascade Mask R-CNN, ConvNeXt-Base", 17.4, 12.5, 52.7, 52.5, 45.6, 45.4),
}

"""The papers that a card asks to cite."""

from __future__ import annotations

from ..models.methods import METHODS

PAPERS = {
    "cam": "Zhou, Khosla, Lapedriza, Oliva and Torralba, “Learning Deep Features for Discriminative Localization”, "
    "CVPR 2016.",
    "pamr": "Araslanov and Roth, “Single-Stage Semantic Segmentation from Image Labels”, CVPR 2020 (PAMR).",
    "crf": "Krähenbühl and Koltun, “Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials”, "
    "NeurIPS 2011.",
    "grid_crf": "Krähenbühl and Koltun, “Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials”, "
    "NeurIPS 2011 (one kernel, whose sums a grid of pixels estimates).",
    "irn": "Ahn, Cho and Kwak, “Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations”, CVPR "
    "2019 (random walk).",
    "affinitynet": "Ahn and Kwak, “Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly "
    "Supervised Semantic Segmentation”, CVPR 2018 (random walk).",
    "matting": "Wang et al., “Treating Pseudo-labels Generation as Image Matting for Weakly Supervised Semantic "
    "Segmentation”, ICCV 2023.",
    "deeplab_v1": "Chen, Papandreou, Kokkinos, Murphy and Yuille, “Semantic Image Segmentation with Deep "
    "Convolutional Nets and Fully Connected CRFs”, ICLR 2015.",
    "deeplab_v2": "Chen, Papandreou, Kokkinos, Murphy and Yuille, “DeepLab: Semantic Image Segmentation with Deep "
    "Convolutional Nets, Atrous Convolution, and Fully Connected CRFs”, TPAMI 2018.",
    "deeplab_v3_plus": "Chen, Zhu, Papandreou, Schroff and Adam, “Encoder-Decoder with Atrous Separable Convolution "
    "for Semantic Image Segmentation”, ECCV 2018.",
}


def papers_of_masks(recipe: dict) -> list[str]:
    """Of the methods and the refinement that a recipe's pseudo masks rest on, in order."""
    methods = recipe.get("cam", {}).get("methods") or {}
    walk = (recipe.get("affinity") or {}).get("kind", "irn")
    names = [walk if step == "walk" else step for step in refinements(recipe)]
    return [
        PAPERS["cam"],
        *(METHODS[name][1].paper for name in methods if name in METHODS),
        *(PAPERS[name] for name in names if name in PAPERS),
    ]


def refinements(recipe: dict) -> list[str]:
    """Names of the steps of `masks.refine`."""
    return [next(iter(step)) if isinstance(step, dict) else step for step in recipe.get("masks", {}).get("refine", [])]

"""The methods and backbones of this package; importing this file registers them.

A model is saved with a copy of this file that names only what it uses, and with the files of these alone.
"""

from .attention import AttentionAffinity
from .contrast import Contrast
from .d2cam import D2cam
from .drs import Drs
from .icd import Icd
from .plain_vit import PlainVit
from .plda import Plda
from .seam import Seam
from .toco import Toco
from .vgg import Vgg16Backbone
from .wide_resnet import WideResNet38Backbone

COMPONENTS = [
    AttentionAffinity,
    Contrast,
    D2cam,
    Drs,
    Icd,
    PlainVit,
    Plda,
    Seam,
    Toco,
    Vgg16Backbone,
    WideResNet38Backbone,
]
